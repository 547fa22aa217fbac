"""The chat templates: golden ids from transformers, which template a folder needs, and comparisons with the peers.

tests/golden/chat/make_golden.py wrote the golden cases. A test that needs a peer (transformers, sentencepiece) or real
files (in the folder NANOSDD_REAL_DATA) is skipped without them.
"""

import json
import os
import random
from functools import lru_cache
from pathlib import Path

import pytest

from data.chat import (
    NEXT_TURN,
    TEMPLATES,
    encode_example,
    encode_next_turn,
    encode_prompt,
    encode_response,
    read_chat,
)
from data.tokenizer import load_tokenizer, write_llama3_tokenizer
from nanosdd.errors import InputError

GOLDEN = Path(__file__).parent.parent / "golden" / "chat"
CASES = json.loads((GOLDEN / "golden.json").read_text())["cases"]
JINJA = {path.stem: path.read_text(encoding="utf-8") for path in sorted(GOLDEN.glob("*.jinja"))}
OURS = {
    name: "llama31" if name == "llama32" else name for name in JINJA
}  # 3.1 and 3.2 differ in today's date alone
LLAMA2_KINDS = [
    "tiny_llama2_json",
    "tiny_metaspace_json",
    "tiny_sentencepiece",
]  # one vocabulary, three kinds of file


@lru_cache
def tokenizer_in(folder):
    return load_tokenizer(GOLDEN / folder)


@pytest.fixture
def toy(tmp_path):
    write_llama3_tokenizer(tmp_path, ["user", "assistant", "system", "\n\n", "hi", " there", "yes"])
    return load_tokenizer(tmp_path)


def check(case, tokenizer):
    """Prompt and response have the ids of the whole conversation or, where that merges the two, at least its text."""
    template = OURS[case["template"]]
    prompt = encode_prompt(tokenizer, template, case["prompt"], case["system"])
    response = encode_response(tokenizer, template, case["response"])
    assert prompt == case["prompt_ids"], case["text"]
    after_end = (
        tokenizer.encode("\n") if case["whole_text"].endswith("\n") else []
    )  # which we leave out
    if case["answer_ids"] is not None:
        assert response + after_end == case["answer_ids"], case["whole_text"]
    else:
        assert template in ("chatml", "smollm2") and case["response"][0].isspace()
        assert tokenizer.decode(prompt + response + after_end) == case["whole_text"]


# --- golden cases ---


@pytest.mark.parametrize("template", JINJA)
def test_golden(template):
    cases = [case for case in CASES if case["template"] == template]
    assert len(cases) >= 9
    for case in cases:
        check(case, tokenizer_in(case["tokenizer"]))


@pytest.mark.parametrize("kind", LLAMA2_KINDS)
def test_golden_whatever_file_holds_the_sentencepiece_vocabulary(kind):
    cases = [case for case in CASES if "llama2" in case["tokenizer"]]
    assert {case["template"] for case in cases} == {"llama2", "zephyr", "plain"}
    for case in cases:
        check(case, tokenizer_in(f"../tokenizer/{kind}"))


def test_the_golden_cases_cover_responses_that_merge_with_the_prompt():
    merged = {case["template"] for case in CASES if case["answer_ids"] is None}
    assert merged == {"chatml", "smollm2"}  # the check above says when


def test_the_towns_ids_by_hand(toy):
    """The toy model is trained on exactly these."""
    user, assistant, _, lines, hi, there, yes = range(256, 263)
    begin, start, end, turn = (
        toy.special[f"<|{name}|>"]
        for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id")
    )
    prompt = [begin, start, user, end, lines, hi, there, turn, start, assistant, end, lines]
    assert encode_prompt(toy, "llama3", "hi there") == prompt
    assert encode_response(toy, "llama3", "yes there") == [yes, there, turn]
    example = encode_example(toy, "llama3", "hi there", "yes there", 128)
    assert example.ids == prompt + [yes, there, turn] and example.prompt_length == len(prompt)


def test_a_later_turn_by_hand(toy):
    user, assistant, _, lines, hi, there, yes = range(256, 263)
    start, end, turn = (
        toy.special[f"<|{name}|>"] for name in ("start_header_id", "end_header_id", "eot_id")
    )
    expected = [start, user, end, lines, hi, there, turn, start, assistant, end, lines]
    assert (
        encode_next_turn(toy, "llama3", "hi there")
        == encode_next_turn(toy, "llama31", " hi there")
        == expected
    )
    assert NEXT_TURN["zephyr"]("x") == ["\n", "<|user|>\nx", "</s>", "\n", "<|assistant|>\n"]
    assert (
        NEXT_TURN["smollm2"]("x")
        == NEXT_TURN["chatml"]("x")
        == ["\n", "<|im_start|>", "user\nx", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"]
    )
    assert NEXT_TURN["llama2"]("x") == ["<s>", "[INST] x [/INST]"] and NEXT_TURN["plain"](" x") == [
        "x\n"
    ]
    assert NEXT_TURN.keys() == TEMPLATES.keys()


def test_text_never_becomes_a_special_token():
    for template, folder in [
        ("llama2", "../tokenizer/tiny_llama2_json"),
        ("llama3", "tiny_llama3"),
        ("chatml", "../tokenizer/tiny_smollm2"),
    ]:
        tokenizer = tokenizer_in(folder)
        special = set(tokenizer.special.values())
        text = "".join(tokenizer.special)
        plain, odd = (encode_prompt(tokenizer, template, text, text) for text in ("x", "x" + text))
        assert [i for i in odd if i in special] == [i for i in plain if i in special]
        assert not special & set(encode_response(tokenizer, template, text)[:-1])


@pytest.mark.parametrize(
    "template, folder",
    [
        ("llama2", "../tokenizer/tiny_sentencepiece"),
        ("zephyr", "../tokenizer/tiny_llama2_json"),
        ("plain", "../tokenizer/tiny_metaspace_json"),
        ("llama31", "tiny_llama3"),
        ("smollm2", "../tokenizer/tiny_smollm2"),
    ],
)
def test_a_response_decodes_to_its_text_and_ends_with_a_stop_token(template, folder):
    tokenizer = tokenizer_in(folder)
    ids = encode_response(tokenizer, template, "the bread\n\n  is ready")
    assert tokenizer.decode(ids[:-1]).strip() == "the bread\n\n  is ready"
    assert ids[-1] in tokenizer.stop_tokens


def test_a_tokenizer_without_the_special_token_is_refused(toy):
    for template, name in [("llama2", "<s>"), ("zephyr", "</s>"), ("chatml", r"<\|im_start\|>")]:
        with pytest.raises(InputError, match=f"{template}.*{name}.*--template"):
            encode_prompt(toy, template, "hi")
    with pytest.raises(InputError, match=r"<\|im_end\|>"):
        encode_response(toy, "chatml", "hi")


# --- which template a folder needs ---


@pytest.mark.parametrize("name", sorted(JINJA.keys() - {"plain"}))
def test_a_published_template_is_recognised(name, tmp_path):
    config = tmp_path / "tokenizer_config.json"
    both = [
        {"name": "tool_use", "template": "{{ tools }}"},
        {"name": "default", "template": JINJA[name]},
    ]
    # in a JSON file "\n" may be a newline or, as in Python, a backslash and an n
    for template in (
        JINJA[name],
        JINJA[name].replace("\\n", "\n"),
        JINJA[name].replace("'", '"'),
        both,
    ):
        config.write_text(json.dumps({"chat_template": template}))
        assert read_chat(tmp_path) == OURS[name]
    config.write_text(json.dumps({"chat_template": "{{ 'another' }}"}))
    (tmp_path / "chat_template.jinja").write_text(
        JINJA[name]
    )  # the newer place goes first, as in transformers
    assert read_chat(tmp_path) == OURS[name]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        JINJA["smollm2"].replace("SmolLM", "Qwen"),  # another default system prompt
        "{{ bos_token }}" + JINJA["chatml"],
        JINJA["chatml"].replace("'\\n' + message['content']", "message['content']"),
        JINJA["chatml"] + "{{ '<think>' }}",
        JINJA["llama3"].replace("\\n\\n", "\\n"),
        JINJA["llama3"].replace("| trim", ""),
        "{{ '<|start_header_id|>system<|end_header_id|>' }}" + JINJA["llama3"],
        JINJA["llama31"].replace("December 2023", "June 2024"),
        JINJA["llama31"].replace("26 Jul 2024", "1 Jan 2025"),
        JINJA["zephyr"].replace("eos_token", "'<|end|>'"),
        JINJA["zephyr"].replace("}}\n", "}}"),  # the same on one line: no newline after each turn
        JINJA["llama2"].replace("<<SYS>>", "").replace("<</SYS>>", ""),
        JINJA["llama2"].replace("bos_token + ", ""),
        "",
    ],
)
def test_an_unknown_template_is_refused_unless_one_is_named(template, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(InputError) as error:
        read_chat(tmp_path)
    assert "tokenizer_config.json" in str(
        error.value
    ) and "--template (llama2, llama3, llama31, " in str(error.value)
    assert read_chat(tmp_path, "chatml") == "chatml"


def test_without_a_template(tmp_path):
    town, base, empty = (tmp_path / name for name in ("town", "base", "empty"))
    write_llama3_tokenizer(town, ["hi"])
    assert read_chat(town) == "llama3"
    write_llama3_tokenizer(base, ["hi"])
    (base / "tokenizer_config.json").write_text(
        '{"bos_token": "<|begin_of_text|>", "chat_template": null}'
    )
    assert read_chat(base) == "plain"
    assert read_chat(GOLDEN / "../tokenizer/tiny_sentencepiece") == "plain"
    with pytest.raises(InputError, match="no tokenizer"):
        read_chat(empty)
    (base / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer_config.json is not valid JSON"):
        read_chat(base)


def test_the_template_a_checkpoint_was_trained_with_stays(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": JINJA["llama2"]}))
    assert read_chat(tmp_path) == "llama2"
    assert read_chat(tmp_path, "plain") == "plain"
    (tmp_path / "chat.txt").write_text("plain\n")
    assert read_chat(tmp_path) == read_chat(tmp_path, "plain") == "plain"
    with pytest.raises(InputError, match="--template llama2: .*trained with plain"):
        read_chat(tmp_path, "llama2")
    with pytest.raises(InputError, match="--template: .*'llama4' is unknown; known: llama2, "):
        read_chat(tmp_path, "llama4")
    (tmp_path / "chat.txt").write_text("alpaca\n")
    with pytest.raises(InputError, match="chat.txt: .*'alpaca' is unknown"):
        read_chat(tmp_path)


# --- comparisons with the peers ---


def random_text(rng):
    words = [
        "the",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "bread",
        " ready",
        "7",
        "123",
        ".",
        "?!",
        "'s",
        "é",
        "世界",
        "👍",
        "[/INST]",
        "<<SYS>>",
        "{{ x }}",
        "▁",
    ]
    return "".join(rng.choices(words, k=rng.randint(0, 8)))


def test_random_conversations_equal_transformers():
    transformers = pytest.importorskip("transformers")
    rng = random.Random(0)
    models = {
        (case["template"], case["tokenizer"], case["text"][:3])
        for case in CASES
        if case["template"] != "plain"
    }
    assert len({template for template, *_ in models}) == len(JINJA) - 1
    for template, folder, _ in sorted(models):
        names = {
            "tiny_llama3": ("<|begin_of_text|>", "<|eot_id|>"),
            "tiny_smollm2": ("<|im_start|>", "<|im_end|>"),
        }
        begin, end = names.get(Path(folder).name, ("<s>", "</s>"))
        peer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(GOLDEN / folder / "tokenizer.json"),
            bos_token=begin,
            eos_token=end,
            chat_template=JINJA[template],
        )
        merged = 0
        for _ in range(40):
            system, prompt, response = (
                rng.choice([None, random_text(rng)]),
                random_text(rng),
                random_text(rng),
            )
            turns = [{"role": "system", "content": system}] if system is not None else []
            turns += [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ]
            how = dict(return_dict=False, date_string="26 Jul 2024")
            ids = peer.apply_chat_template(turns[:-1], add_generation_prompt=True, **how)
            whole = peer.apply_chat_template(turns, **how)
            rest = whole[len(ids) :] if whole[: len(ids)] == ids else None
            check(
                {
                    "template": template,
                    "system": system,
                    "prompt": prompt,
                    "response": response,
                    "text": prompt,
                    "whole_text": peer.apply_chat_template(
                        turns, tokenize=False, date_string="26 Jul 2024"
                    ),
                    "prompt_ids": ids,
                    "answer_ids": rest,
                },
                tokenizer_in(folder),
            )
            if rest is None:
                merged += 1
            elif begin != "<s>":  # transformers 5 drops SentencePiece's space after a special token
                tokenizer, ours = tokenizer_in(folder), OURS[template]
                later = {"role": "user", "content": random_text(rng)}
                assert peer.apply_chat_template(
                    [*turns, later], add_generation_prompt=True, **how
                ) == [
                    *encode_prompt(tokenizer, ours, prompt, system),
                    *encode_response(tokenizer, ours, response),
                    *encode_next_turn(tokenizer, ours, later["content"]),
                ]
        assert merged < 30


@pytest.mark.parametrize("size", ["tiny", "real"])
def test_llama2_equals_metas_code(size):
    """Meta's code encodes the whole turn, "[INST] ask [/INST] answer ", as one text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder, rows, rng = GOLDEN / "../tokenizer/tiny_sentencepiece", [], random.Random(1)
    if size == "real":
        if "NANOSDD_REAL_DATA" not in os.environ:
            pytest.skip("NANOSDD_REAL_DATA is not set: no real tokenizer files")
        folder = Path(os.environ["NANOSDD_REAL_DATA"]) / "tokenizers" / "llama2"
        path = Path(os.environ["NANOSDD_REAL_DATA"]) / "alpaca" / "alpaca_en_demo.json"
        rows = [
            (row["instruction"], row["output"])
            for row in json.loads(path.read_text(encoding="utf-8"))
        ]
    peer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    for prompt, response in rows + [(random_text(rng), random_text(rng)) for _ in range(100)]:
        ids = peer.encode(
            f"[INST] {prompt.strip()} [/INST] {response.strip()} ", add_bos=True, add_eos=True
        )
        assert (
            encode_prompt(tokenizer, "llama2", prompt)
            + encode_response(tokenizer, "llama2", response)
            == ids
        )


def test_every_template_has_a_golden_case():
    assert {OURS[case["template"]] for case in CASES} == set(TEMPLATES)
