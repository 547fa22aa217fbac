"""Chat templates, loss masks and batches: from (prompt, response) text to token tensors.

Prompt and response are encoded separately, so the border between them is exact and only the response carries loss.
Joined, they are the ids of `apply_chat_template` (transformers) for the whole conversation, with four exceptions:

- chatml, smollm2: white space at the start of a response is not merged with the newline before it, since a model that
  generates has already read that newline as a token of its own.
- chatml, smollm2, zephyr: the newline after the end token is left out. There is nothing to learn from it.
- Text that looks like a special token is always text; in transformers only with `sanitize_control_tokens`.
- SentencePiece's space in front of a text stays after a special token too, as in Meta's code and transformers 4
  ("<s>" "▁[" "INST"). Transformers 5 drops it there.
"""

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from data.tokenizer import load_tokenizer
from nanosdd.checkpoint import read_json
from nanosdd.errors import InputError


class Special(str):
    """A special token by name. Of several names, separated by spaces, the first that the tokenizer has is used."""


# --- the templates: the parts of a conversation before the response ---


def _turns(prompt: str, system: str | None) -> list[tuple[str, str]]:
    return [
        (role, text) for role, text in (("system", system), ("user", prompt)) if text is not None
    ]


def _llama2(prompt, system):
    if system is not None:
        prompt = f"<<SYS>>\n{system}\n<</SYS>>\n\n{prompt}"
    return [Special("<s>"), f"[INST] {prompt.strip()} [/INST]"]


def _llama3(prompt, system, dates=""):
    start, end = Special("<|start_header_id|>"), Special("<|end_header_id|>")
    parts = [Special("<|begin_of_text|>")]
    for role, text in _turns(prompt.strip(), None if system is None else dates + system.strip()):
        parts += [start, role, end, "\n\n" + text, Special("<|eot_id|>")]
    return parts + [start, "assistant", end, "\n\n"]


def _llama31(prompt, system):
    """Llama 3.1, 3.2 and 3.3: there is always a system block. "Today" is the default date of 3.1 and 3.3. The template
    of 3.2 reads the clock instead, but training data should not depend on the day."""
    return _llama3(
        prompt, system or "", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    )


def _chatml(prompt, system):
    parts = []
    for role, text in _turns(prompt, system):
        parts += [Special("<|im_start|>"), f"{role}\n{text}", Special("<|im_end|>"), "\n"]
    return parts + [Special("<|im_start|>"), "assistant\n"]


def _smollm2(prompt, system):
    """ChatML with SmolLM2's default system prompt; `--template chatml` leaves it out."""
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return _chatml(prompt, default if system is None else system)


def _zephyr(prompt, system):
    """Zephyr and TinyLlama: <|user|> is ordinary text, and there is no <s>."""
    parts = []
    for role, text in _turns(prompt, system):
        parts += [f"<|{role}|>\n{text}", Special("</s>"), "\n"]
    return parts + ["<|assistant|>\n"]


def _plain(prompt, system):
    """For base models, which have no template: a line for each text, after the token that starts a document."""
    lines = [text.strip() + "\n" for _, text in _turns(prompt, system)]
    return [Special("<|begin_of_text|> <s> <|endoftext|>"), *lines]


# name: (the parts before the response, how the response is written, the token that ends it)
TEMPLATES = {
    "llama2": (_llama2, lambda text: f" {text.strip()} ", Special("</s>")),
    "llama3": (_llama3, str.strip, Special("<|eot_id|>")),
    "llama31": (_llama31, str.strip, Special("<|eot_id|>")),
    "chatml": (_chatml, str, Special("<|im_end|>")),
    "smollm2": (_smollm2, str, Special("<|im_end|>")),
    "zephyr": (_zephyr, str, Special("</s>")),
    "plain": (_plain, str.strip, Special("<|end_of_text|> </s> <|endoftext|>")),
}

NEXT_TURN = {  # name: the parts between the token that ends a response and the next one
    "llama2": lambda prompt: _llama2(prompt, None),
    "llama3": lambda prompt: _llama3(prompt, None)[1:],
    "llama31": lambda prompt: _llama3(prompt, None)[1:],
    "chatml": lambda prompt: ["\n", *_chatml(prompt, None)],
    "smollm2": lambda prompt: ["\n", *_chatml(prompt, None)],
    "zephyr": lambda prompt: ["\n", *_zephyr(prompt, None)],
    "plain": lambda prompt: _plain(prompt, None)[1:],
}


# --- text to ids ---


def encode_prompt(tokenizer, template: str, prompt: str, system: str | None = None) -> list[int]:
    """Token ids of everything before the response; template: a key of TEMPLATES."""
    return _encode_parts(tokenizer, template, TEMPLATES[template][0](prompt, system))


def encode_next_turn(tokenizer, template: str, prompt: str) -> list[int]:
    """Token ids of a later turn of a conversation, from the last response's end token to the next response."""
    return _encode_parts(tokenizer, template, NEXT_TURN[template](prompt))


def _encode_parts(tokenizer, template, parts) -> list[int]:
    ids, text = [], ""
    for part in parts:
        if isinstance(part, Special):
            ids += [*tokenizer.encode(text), _special_id(tokenizer, template, part)]
            text = ""
        else:
            text += part  # neighbouring texts are encoded together, as in the rendered template
    return ids + tokenizer.encode(text)


def encode_response(tokenizer, template: str, response: str) -> list[int]:
    """Token ids of a response and the token that ends it."""
    _, written, end = TEMPLATES[template]
    # SentencePiece puts a space in front of every text, but a response continues one. So it is encoded after a newline,
    # which Llama 2's vocabulary never merges with the text behind it, and the ids of the newline are dropped.
    before = "\n" if tokenizer.dummy_prefix else ""
    ids = tokenizer.encode(before + written(response))[len(tokenizer.encode(before)) :]
    return [*ids, _special_id(tokenizer, template, end)]


def _special_id(tokenizer, template: str, special: Special) -> int:
    for name in special.split():
        if name in tokenizer.special:
            return tokenizer.special[name]
    raise InputError(
        f"the chat template {template!r} needs the special token {' or '.join(special.split())}, which "
        f"this tokenizer does not have; choose another with --template ({', '.join(TEMPLATES)})"
    )


# --- examples and batches ---


@dataclass(frozen=True)
class Example:
    """One sequence to train on or to score."""

    ids: list[int]  # of the prompt and the response
    prompt_length: int  # the ids of the prompt come first and carry no loss
    rejected: "Example | None" = (
        None  # the prompt with a dispreferred response, for losses such as DPO or SimPO
    )

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.prompt_length


def encode_example(
    tokenizer, template: str, prompt: str, response: str, max_length: int, system=None
) -> Example:
    """Encode one pair. A response is cut where the example reaches max_length tokens; a prompt that leaves no room for
    one is an InputError."""
    prompt_ids = encode_prompt(tokenizer, template, prompt, system)
    if len(prompt_ids) >= max_length:
        raise InputError(
            f"a prompt of {len(prompt_ids)} tokens leaves no room for a response within {max_length}: "
            f"{prompt[:60]!r}; raise --max-length (up to the model's context) or drop it"
        )
    return Example(
        (prompt_ids + encode_response(tokenizer, template, response))[:max_length], len(prompt_ids)
    )


def encode_rows(tokenizer, template: str, rows: list[dict], max_length: int) -> list[Example]:
    """Encode rows {"prompt": str, "response": str, optionally "system": str and "rejected": str}, as encode_example."""
    examples = []
    for row in rows:
        encode = partial(
            encode_example,
            tokenizer,
            template,
            row["prompt"],
            max_length=max_length,
            system=row.get("system"),
        )
        rejected = None if row.get("rejected") is None else encode(row["rejected"])
        examples.append(replace(encode(row["response"]), rejected=rejected))
    return examples


def rows_that_fit(tokenizer, template: str, rows: list[dict], max_length: int) -> list[dict]:
    """The rows whose prompt leaves room for a response within max_length tokens; in ShareGPT some prompts do not."""
    encode = partial(encode_prompt, tokenizer, template)
    return [row for row in rows if len(encode(row["prompt"], row.get("system"))) < max_length]


@dataclass
class Batch:
    """Right-padded rows. Position t predicts target t, the next token of its row."""

    tokens: torch.Tensor  # (B,T) int64, the model's input
    targets: torch.Tensor  # (B,T) int64
    loss_mask: (
        torch.Tensor
    )  # (B,T) bool, true where the target is a response token or the end token
    lengths: (
        torch.Tensor
    )  # (B,) int64, of inputs: an example's tokens but the last, without padding
    rejected: "Batch | None" = (
        None  # the dispreferred responses to the same prompts, in the same order
    )

    def to(self, device) -> "Batch":
        return Batch(*(None if part is None else part.to(device) for part in vars(self).values()))


def collate(examples: list[Example], pad: int = 0) -> Batch:
    """Stack examples of unequal lengths; T is the longest less one, since the last token predicts nothing. `rejected`
    is filled when every example has one."""
    lengths = torch.tensor([len(example.ids) - 1 for example in examples])
    width = int(lengths.max())
    ids = torch.tensor(
        [example.ids + [pad] * (width + 1 - len(example.ids)) for example in examples]
    )
    position = torch.arange(width)
    starts = torch.tensor([example.prompt_length - 1 for example in examples])
    loss_mask = (position >= starts[:, None]) & (position < lengths[:, None])
    rejected = [example.rejected for example in examples]
    return Batch(
        ids[:, :-1],
        ids[:, 1:],
        loss_mask,
        lengths,
        None if None in rejected else collate(rejected, pad),
    )


def draw_batches(
    pairs: list[Example], replay: list[Example], share: float, batch_size: int, rng: random.Random
):
    """Global batches for ever: round(share * batch_size) rows of replay, the rest pairs, each in shuffled epochs."""

    def endless(examples):
        while examples:
            yield from rng.sample(examples, len(examples))

    pairs, replay, rehearsed = endless(pairs), endless(replay), round(share * batch_size)
    while True:
        yield [next(pairs) for _ in range(batch_size - rehearsed)] + [
            next(replay) for _ in range(rehearsed)
        ]


# --- which template a folder needs ---

# A Jinja template is recognised when it holds all of the first list and none of the second. Spaces, which are left out
# here, and the kind of quotes do not count. The marks are strict: a template that writes one more line must not pass.
_HEADER = "'<|start_header_id|>'+message['role']+'<|end_header_id|>\n\n'+message['content']|trim+'<|eot_id|>'"
_CHATML = "'<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>'"
MARKS = {
    "llama2": (
        ["bos_token+'[INST]'", "'<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+message['content']"],
        [],
    ),
    "llama3": ([_HEADER, "bos_token"], ["<|start_header_id|>system", "think"]),
    "llama31": (
        [_HEADER, "bos_token", "CuttingKnowledgeDate:December2023\n", "'26Jul2024'"],
        ["think"],
    ),
    "chatml": ([_CHATML], ["<|im_start|>system", "bos_token", "think"]),
    "smollm2": (
        [_CHATML, "AIassistantnamedSmolLM,trainedbyHuggingFace<|im_end|>\n"],
        ["bos_token", "think"],
    ),
    "zephyr": (
        ["'<|user|>\n'+message['content']+eos_token}}\n", "'<|assistant|>'}}\n"],
        ["bos_token"],
    ),
}


def read_chat(folder, override: str | None = None) -> str:
    """The name of a folder's chat template: the one it was trained with, else `override`, else what its files call for.

    Training writes the name to chat.txt; override (--template) must agree with it. Raises InputError.
    """
    stored = Path(folder) / "chat.txt"
    trained = (
        stored.read_text(encoding="utf-8", errors="replace").strip() if stored.is_file() else None
    )
    for source, name in (stored, trained), ("--template", override):
        if name is not None and name not in TEMPLATES:
            raise InputError(
                f"{source}: chat template {name!r} is unknown; known: {', '.join(TEMPLATES)}"
            )
    if trained and override and trained != override:
        raise InputError(
            f"--template {override}: {folder} was trained with {trained}, says its chat.txt; leave it out"
        )
    return trained or override or _detect(Path(folder))


def is_trained(folder) -> bool:
    """Whether a folder was written by train.py."""
    return (Path(folder) / "chat.txt").is_file()


def _detect(folder: Path) -> str:
    """The template of a folder by its Jinja text, which is looked up where transformers looks."""
    path, jinja = folder / "chat_template.jinja", None
    if path.is_file():
        jinja = path.read_text(encoding="utf-8", errors="replace")
    elif (path := folder / "tokenizer_config.json").is_file():
        config = read_json(path)
        jinja = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(jinja, list):  # several, by name
            jinja = next(
                (
                    entry.get("template")
                    for entry in jinja
                    if isinstance(entry, dict) and entry.get("name") == "default"
                ),
                "",
            )
    elif (
        "<|start_header_id|>" in load_tokenizer(folder).special
    ):  # bare Llama 3 files, as the town's
        return "llama3"
    if jinja is None:
        return "plain"  # a base model
    if not isinstance(jinja, str):
        raise InputError(
            f"{path}: its chat_template is no text; fetch it again, or name one with --template"
        )
    jinja = jinja.replace(" ", "").replace('"', "'").replace("\\n", "\n")
    for name, (wanted, unwanted) in MARKS.items():
        if all(mark in jinja for mark in wanted) and not any(mark in jinja for mark in unwanted):
            return name
    raise InputError(
        f"{path}: its chat template is none of those known; if one of them is close enough, name it with "
        f"--template ({', '.join(TEMPLATES)})"
    )
