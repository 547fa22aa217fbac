"""The chat templates: golden ids from transformers, detection, and a comparison with Meta's code.

tests/golden/chat/make_golden.py wrote the golden cases. What needs sentencepiece, or real files (in
the folder NANOSDD_REAL_DATA), is skipped without them.
"""

import json
import os
import random
from functools import lru_cache
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

import data.chat
from data.chat import (
    SPECIAL,
    TEMPLATES,
    encode_next_turn,
    encode_prompt,
    encode_response,
    read_chat,
)
from data.recognise import recognise
from data.tokenizer import load_tokenizer, write_llama3_tokenizer
from nanosdd.errors import InputError

GOLDEN = Path(__file__).parent.parent / "golden" / "chat"
KNOWN = json.loads((GOLDEN / "../../../data/chat_templates.json").read_text())
CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]
JINJA = {path.stem: path.read_text(encoding="utf-8") for path in sorted(GOLDEN.glob("*.jinja"))}
OURS = {name: name for name in JINJA} | {"llama32": "llama31"}  # which differ in the date alone
PUBLISHED = sorted(JINJA.keys() - {"plain"})
# one vocabulary in three kinds of file
LLAMA2_KINDS = ["tiny_llama2_json", "tiny_metaspace_json", "tiny_sentencepiece"]


@lru_cache
def tokenizer_in(folder):
    return load_tokenizer(GOLDEN / folder)


# --- golden cases ---


@pytest.mark.parametrize("name", JINJA)
@pytest.mark.parametrize("kind", LLAMA2_KINDS)
def test_golden(name, kind):
    """Prompt and response have the ids of the whole conversation or, where that merges the two,
    at least its text."""
    template = OURS[name]
    for case in (case for case in CASES if case["template"] == name):
        tokenizer = tokenizer_in(case["tokenizer"].replace(LLAMA2_KINDS[0], kind))
        prompt = encode_prompt(tokenizer, template, case["prompt"], case["system"])
        response = encode_response(tokenizer, template, case["response"])
        assert prompt == case["prompt_ids"], case["text"]
        after_end = tokenizer.encode("\n") if case["whole_text"].endswith("\n") else []  # left out
        if case["answer_ids"] is not None:
            assert response + after_end == case["answer_ids"], case["whole_text"]
        else:
            assert template in ("chatml", "smollm2") and case["response"][0].isspace()
            assert tokenizer.decode(prompt + response + after_end) == case["whole_text"]


@pytest.mark.parametrize("template, name", [("zephyr", "</s>"), ("chatml", r"<\|im_start\|>")])
def test_a_tokenizer_without_the_special_token_is_refused(template, name):
    with pytest.raises(InputError, match=f"{template}.*{name}.*--template"):
        encode_prompt(tokenizer_in("tiny_llama3"), template, "hi")


class Spelled:
    """A tokenizer whose ids are the texts themselves."""

    special = {name: name for form in TEMPLATES.values() for name in SPECIAL.findall(str(form))}
    encode = list
    dummy_prefix = False


@pytest.mark.parametrize("name", KNOWN["templates"])
def test_our_templates_write_the_known_texts(name):
    """chat_templates.json is of transformers, which make_golden.py asked."""
    for turns, text in zip(KNOWN["conversations"], KNOWN["templates"][name]["texts"], strict=True):
        system = turns[0]["content"] if turns[0]["role"] == "system" else None
        turns = [turn["content"] for turn in turns if turn["role"] != "system"]
        ids = encode_prompt(Spelled, name, turns[0], system)
        for response, prompt in zip(turns[1::2], turns[2::2]):
            ids += encode_response(Spelled, name, response)
            ids += encode_next_turn(Spelled, name, prompt)
        assert "".join(ids) == text


# --- which template a folder needs ---


@pytest.fixture
def folder(tmp_path):
    """A function that writes a tokenizer_config.json, and returns its folder."""

    def write(**config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_template_is_recognised(name, folder):
    template = JINJA[name]
    # in a JSON file "\n" may be a newline or, as in Python, a backslash and an n
    for text in (template, template.replace("\\n", "\n"), template.replace("'", '"')):
        assert recognise(text, {}) == OURS[name]
    # the newer place goes first, as in transformers
    path = folder(chat_template="{{ 'another' }}")
    (path / "chat_template.jinja").write_text(template)
    assert read_chat(path) == OURS[name]


SPOKEN = "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
SPOKEN += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    "name, template",
    [
        ("chatml", SPOKEN),
        ("chatml", JINJA["smollm2"].replace("'system' %}", "'system' and false %}")),
        ("chatml", "{%- if tools is not none %}tools{% endif %}" + JINJA["chatml"]),
        ("llama2", "{% if false %}{{ raise_exception('no') }}{% endif %}" + JINJA["llama2"]),
        (
            "llama3",
            JINJA["llama3"].split("{% if add_gen")[0] + "{{ '<|start_header_id|>assistant"
            "<|end_header_id|>\n\n' }}",
        ),  # its first version, with or without add_generation_prompt
        ("llama3", JINJA["llama3"].replace("bos_token", "'<|begin_of_text|>'")),
        ("zephyr", JINJA["zephyr"].replace("eos_token", "'</s>'")),
        ("chatml", "{% generation %}" + JINJA["chatml"] + "{%- endgeneration %}"),
    ],
)
def test_a_template_that_writes_the_same_is_the_same(name, template):
    assert recognise(template, {}) == name


# a system prompt of the template's own, where the published one has none
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': "
    "'Be brief.'}] + messages %}{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        JINJA["smollm2"].replace("SmolLM", "Qwen"),  # another default system prompt
        "{{ bos_token }}" + JINJA["chatml"],
        JINJA["chatml"].replace("'\\n' + message['content']", "message['content']"),
        JINJA["chatml"].replace("'<|im_end|>' + '\\n'", "'<|im_end|>'"),
        JINJA["chatml"] + "{{ '<think>' }}",
        JINJA["llama3"].replace("\\n\\n", "\\n"),
        JINJA["llama3"].replace("| trim", ""),
        JINJA["llama31"].replace("26 Jul 2024", "1 Jan 2025"),
        JINJA["zephyr"].replace("eos_token", "'<|end|>'"),
        JINJA["zephyr"].replace("}}\n", "}}"),  # the same on one line: no newline after each turn
        JINJA["llama2"].replace("<<SYS>>", "").replace("<</SYS>>", ""),
        JINJA["llama2"].replace("bos_token + ", ""),
        *(DEFAULT + JINJA[name] for name in ("llama2", "llama3", "chatml", "zephyr")),
        # text that no mark mentions: before, between, after
        *("Hello. " + JINJA[name] for name in OURS),
        *(JINJA[name] + "{% if messages | length > 2 %}Hello.{% endif %}" for name in OURS),
        *(JINJA[name].replace("message['content']", "message['content'][:9]") for name in OURS),
    ],
)
def test_a_template_that_writes_anything_else_is_unknown(template):
    assert template not in JINJA.values()
    try:
        assert recognise(template, {}) is None
    except TemplateError:
        assert "llama2" not in template


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'another' }}",
        "{% for i in range(99999) %}" * 9 + "x" + "{% endfor %}" * 9,  # does not end
        JINJA["chatml"] + "{% set x = 'x' * 2 ** 31 %}",  # takes memory and time
        "{% for",
        "\ud800",
        "",
        [{"name": "tool_use", "template": JINJA["chatml"]}],
    ],
)
def test_an_unknown_template_is_refused_unless_one_is_named(template, folder, monkeypatch):
    monkeypatch.setattr(data.chat, "RECOGNISE_SECONDS", 1)
    path = folder(chat_template=template)
    with pytest.raises(InputError, match="none of those known.*--template .llama2, llama3, "):
        read_chat(path)
    assert read_chat(path, "chatml") == "chatml"


@pytest.mark.parametrize("name", ["llama2", "zephyr"])
def test_an_eos_token_that_ours_does_not_write_is_unknown(name):
    """In transformers it takes the place of </s>."""
    for eos, expected in (("</s>", name), ("", None), ("<|im_end|>", None)):
        assert recognise(JINJA[name], {"eos_token": eos}) == expected
    assert recognise(JINJA["chatml"], {"eos_token": ""}) == "chatml"  # which does not name it


def test_of_named_templates_the_default_is_read(folder):
    named = [{"name": "tool_use"}, {"name": "default", "template": JINJA["llama2"]}]
    assert read_chat(folder(chat_template=named)) == "llama2"


def test_a_token_may_be_an_object(folder):
    for eos in ({"__type": "AddedToken", "content": "</s>", "lstrip": False}, None):
        assert read_chat(folder(chat_template=JINJA["zephyr"], eos_token=eos)) == "zephyr"
    with pytest.raises(InputError, match="eos_token"):
        read_chat(folder(chat_template=JINJA["zephyr"], eos_token={"content": "<|im_end|>"}))
    path = folder(chat_template=JINJA["zephyr"])
    (path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(InputError, match="eos_token"):
        read_chat(path)


def test_without_a_template(tmp_path, folder):
    with pytest.raises(InputError, match="expected tokenizer.json or tokenizer.model"):
        read_chat(tmp_path)
    write_llama3_tokenizer(tmp_path, ["hi"])
    assert read_chat(tmp_path) == "llama3"
    assert read_chat(folder(bos_token="<|begin_of_text|>", chat_template=None)) == "plain"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert read_chat(tmp_path) == "plain"


def test_the_template_a_checkpoint_was_trained_with_stays(folder):
    path = folder(chat_template=JINJA["llama2"])
    assert read_chat(path, "plain") == "plain"
    with pytest.raises(InputError, match="'llama4' is unknown; known: llama2, "):
        read_chat(path, "llama4")
    (path / "chat.txt").write_text("plain\n")
    assert read_chat(path) == read_chat(path, "plain") == "plain"
    with pytest.raises(InputError, match="trained with plain; leave out --template llama2"):
        read_chat(path, "llama2")


# --- Meta's code ---

WORDS = "the| |  |\n|\n\n|\t|bread| ready|7|123|.|?!|'s|é|[/INST]|<<SYS>>|{{ x }}|▁".split("|")
WORDS += ["世界", "👍"]


def random_text(rng):
    return "".join(rng.choices(WORDS, k=rng.randint(0, 8)))


@pytest.mark.parametrize("size", ["tiny", "real"])
def test_llama2_equals_metas_code(size):
    """Meta's code encodes the whole turn, "[INST] ask [/INST] answer ", as one text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = GOLDEN / "../tokenizer/tiny_sentencepiece"
    if size == "real":
        if "NANOSDD_REAL_DATA" not in os.environ:
            pytest.skip("NANOSDD_REAL_DATA is not set: no real tokenizer files")
        folder = Path(os.environ["NANOSDD_REAL_DATA"]) / "tokenizers" / "llama2"
    peer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    rng = random.Random(1)
    for _ in range(300):
        prompt = random_text(rng)
        response = random_text(rng)
        text = f"[INST] {prompt.strip()} [/INST] {response.strip()} "
        ids = encode_prompt(tokenizer, "llama2", prompt)
        ids += encode_response(tokenizer, "llama2", response)
        assert ids == peer.encode(text, add_bos=True, add_eos=True)
