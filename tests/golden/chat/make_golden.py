"""Make golden.json beside this script: what transformers' apply_chat_template gives for *.jinja;
and data/chat_templates.json, by which a folder's template is recognised.

    pip install transformers==5.23.0 jinja2==3.1.6 tokenizers==0.23.3
    python tests/golden/chat/make_golden.py

It imports nothing of nanoSDD. The *.jinja files are the published templates as far as they concern
a system prompt, one question and one answer (the tools of Llama 3.1 are left out), written after
the chat_template in tokenizer_config.json:

    llama2    meta-llama/Llama-2-7b-chat-hf
    llama3    meta-llama/Meta-Llama-3-8B-Instruct
    llama31   meta-llama/Llama-3.1-8B-Instruct
    llama32   meta-llama/Llama-3.2-1B-Instruct
    smollm2   HuggingFaceTB/SmolLM2-135M-Instruct
    chatml    the same without the default system prompt: SmolLM-135M
    zephyr    TinyLlama/TinyLlama-1.1B-Chat-v1.0, HuggingFaceH4/zephyr
    plain     ours; base models have none

A case has the rendered text and its ids up to the answer (add_generation_prompt), and the ids that
the whole conversation adds to them, or null where it does not begin with those. Text that looks
like a special token stays text.
"""

import json
from pathlib import Path

import jinja2
import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
LLAMA2 = ("../tokenizer/tiny_llama2_json", "<s>", "</s>")
LLAMA3 = ("tiny_llama3", "<|begin_of_text|>", "<|eot_id|>")
SMOLLM2 = ("../tokenizer/tiny_smollm2", "<|im_start|>", "<|im_end|>")
MODELS = [  # template, tokenizer folder, bos, eos
    ("llama2", *LLAMA2),
    ("llama3", *LLAMA3),
    ("llama31", *LLAMA3),
    ("llama32", *LLAMA3),
    ("chatml", *SMOLLM2),
    ("smollm2", *SMOLLM2),
    ("zephyr", *LLAMA2),
    ("plain", *LLAMA2),
    ("plain", *LLAMA3[:2], "<|end_of_text|>"),
    ("plain", SMOLLM2[0], "<|endoftext|>", "<|endoftext|>"),
]
KNOWN = MODELS[:3] + MODELS[4:7]  # llama32 is llama31, but for the date
TURNS = [  # they hold what some templates strip, cut out or take for a border
    " ask [/INST]\n",
    " <think>a</think>\n\nanswer ",
    "",
    "</s> <|im_end|>",
    " more of it\n\n",
]
LLAMA3_SPECIAL = """
<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|>
""".split()

PAIRS = [
    ("What does the baker say?", "The bread is ready at 7."),
    ("  spaces around \n", "    and  around   the answer \n"),
    ("def area(w, h):\n    return w * h\n\n\nis this right?", "yes:\n\n    2 * 3\n\n- the end"),
    (
        "is it\n</s>\n<|eot_id|>\n<|im_end|>\n[/INST] x",
        "<s>\n<|im_start|>\n<|start_header_id|>\n<</SYS>> y",
    ),
    ("Straße, 你好 👍🏽", "où? 世界"),
    ("", ""),
]
SYSTEMS = ["Be brief.", " two\n\n lines \n", ""]


def tiny_llama3():
    """The tiny Llama 3 tokenizer with the other special tokens that a template needs."""
    peer = Tokenizer.from_file(str(HERE / "../tokenizer/tiny_llama3_json/tokenizer.json"))
    peer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in LLAMA3_SPECIAL]
    )
    (HERE / "tiny_llama3").mkdir(exist_ok=True)
    peer.save(str(HERE / "tiny_llama3" / "tokenizer.json"), pretty=False)


def peer_of(template, folder, bos, eos):
    return PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / folder / "tokenizer.json"),
        bos_token=bos,
        eos_token=eos,
        chat_template=(HERE / f"{template}.jinja").read_text(),
    )


def apply(peer, messages, **how):
    """Text or ids of messages. The date is for llama32, which would ask the clock."""
    how |= {"return_dict": False, "date_string": "26 Jul 2024"}
    return peer.apply_chat_template(messages, **how)


def case(template, folder, peer, system, prompt, response):
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text = apply(peer, turns[:-1], add_generation_prompt=True, tokenize=False)
    ids = apply(peer, turns[:-1], add_generation_prompt=True, sanitize_control_tokens=True)
    whole = apply(peer, turns, sanitize_control_tokens=True)
    if "<" not in prompt + response:
        assert whole == apply(peer, turns)
    rest = whole[len(ids) :] if whole[: len(ids)] == ids else None
    return {
        "template": template,
        "tokenizer": folder,
        "system": system,
        "prompt": prompt,
        "response": response,
        "text": text,
        "whole_text": apply(peer, turns, tokenize=False),
        "prompt_ids": ids,
        "answer_ids": rest,
    }


def known_templates():
    """Some conversations, and the text of each by each template, up to the next answer."""
    conversations = []
    for system in (None, *SYSTEMS[1:]):
        turns = [] if system is None else [{"role": "system", "content": system}]
        for number, text in enumerate(TURNS):
            turns.append({"role": ("user", "assistant")[number % 2], "content": text})
            if number % 2 == 0:
                conversations.append(turns[:])
    templates = {}
    for template, folder, bos, eos in KNOWN:
        peer = peer_of(template, folder, bos, eos)
        texts = []
        for turns in conversations:
            texts.append(apply(peer, turns, add_generation_prompt=True, tokenize=False))
        tokens = {"bos_token": bos, "eos_token": eos}
        templates[template] = {"tokens": tokens, "texts": texts}
    return {"conversations": conversations, "templates": templates}


def main():
    tiny_llama3()
    known = json.dumps(known_templates(), indent=1)
    (HERE / "../../../data/chat_templates.json").write_text(known + "\n")
    cases = []
    for template, folder, bos, eos in MODELS:
        peer = peer_of(template, folder, bos, eos)
        cases += [case(template, folder, peer, None, *pair) for pair in PAIRS]
        cases += [case(template, folder, peer, system, *PAIRS[1]) for system in SYSTEMS]
    modules = (transformers, jinja2, tokenizers)
    peers = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in cases)
    (HERE / "golden.json").write_text(f'{{"peers": "{peers}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
