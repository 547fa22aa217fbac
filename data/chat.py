"""Chat templates, loss masks and batches: from (prompt, response) text to token tensors.

Prompt and response are encoded apart, so the border between them is exact and only the response carries loss. The ids
of the two, one after the other, are those of `apply_chat_template` (transformers) for the whole conversation, but for:

- chatml and smollm2, with an answer that begins with white space: the whole text would join it with the newline before
  it, which a model that generates has already read as a token of its own;
- the newline that chatml, smollm2 and zephyr put after the end token: nothing is to be learned there;
- text that looks like a special token: always text here, there only with `sanitize_control_tokens`;
- SentencePiece's space in front of a text, which transformers 5 drops after a special token: kept here, as Meta's code
  and transformers 4 do ("<s>" "▁[" "INST", not "<s>" "[" "INST").
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from data.tokenizer import load_tokenizer
from nanosdd.errors import InputError


class Special(str):
    """A special token by its name, or names: the first that the tokenizer has. Text that looks like one stays text."""


# --- the templates: the parts of a conversation up to the answer ---

def _turns(prompt: str, system: str | None) -> list[tuple[str, str]]:
    return [(role, text) for role, text in (("system", system), ("user", prompt)) if text is not None]


def _llama2(prompt, system):
    if system is not None:
        prompt = f"<<SYS>>\n{system}\n<</SYS>>\n\n{prompt}"
    return [Special("<s>"), f"[INST] {prompt.strip()} [/INST]"]


def _llama3(prompt, system):
    return _llama3_turns(_turns(prompt.strip(), None if system is None else system.strip()))


def _llama31(prompt, system):
    """Llama 3.1, 3.2 and 3.3: there is always a system block. "Today" is the day that 3.1 and 3.3 name unless told
    another; 3.2 asks the clock first, but what a model is trained on should not depend on the day."""
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    return _llama3_turns(_turns(prompt.strip(), dates + (system or "").strip()))


def _llama3_turns(turns):
    start, end = Special("<|start_header_id|>"), Special("<|end_header_id|>")
    parts = [Special("<|begin_of_text|>")]
    for role, text in turns:
        parts += [start, role, end, "\n\n" + text, Special("<|eot_id|>")]
    return parts + [start, "assistant", end, "\n\n"]


def _chatml(prompt, system):
    parts = []
    for role, text in _turns(prompt, system):
        parts += [Special("<|im_start|>"), f"{role}\n{text}", Special("<|im_end|>"), "\n"]
    return parts + [Special("<|im_start|>"), "assistant\n"]


def _smollm2(prompt, system):
    """ChatML with SmolLM2's own words for want of a system prompt; `--chat chatml` leaves them out."""
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return _chatml(prompt, default if system is None else system)


def _zephyr(prompt, system):
    """Zephyr, TinyLlama: <|user|> is ordinary text, and there is no <s>."""
    parts = []
    for role, text in _turns(prompt, system):
        parts += [f"<|{role}|>\n{text}", Special("</s>"), "\n"]
    return parts + ["<|assistant|>\n"]


def _plain(prompt, system):
    """Ours, for base models, which have no template: a line each, between the marks of a document's start and end."""
    lines = [text.strip() + "\n" for _, text in _turns(prompt, system)]
    return [Special("<|begin_of_text|> <s> <|endoftext|>"), *lines]


def _spaced(response: str) -> str:
    return f" {response.strip()} "


# name: (the parts up to the answer, the answer's text as the template writes it, the token that ends it)
TEMPLATES = {
    "llama2": (_llama2, _spaced, Special("</s>")),
    "llama3": (_llama3, str.strip, Special("<|eot_id|>")),
    "llama31": (_llama31, str.strip, Special("<|eot_id|>")),
    "chatml": (_chatml, str, Special("<|im_end|>")),
    "smollm2": (_smollm2, str, Special("<|im_end|>")),
    "zephyr": (_zephyr, str, Special("</s>")),
    "plain": (_plain, str.strip, Special("<|end_of_text|> </s> <|endoftext|>")),
}


# --- text to ids ---

def encode_prompt(tokenizer, chat: str, prompt: str, system: str | None = None) -> list[int]:
    """Token ids of everything up to the answer, in the template `chat` (a key of TEMPLATES)."""
    ids, text = [], ""
    for part in TEMPLATES[chat][0](prompt, system):
        if isinstance(part, Special):
            ids += [*tokenizer.encode(text), _special_id(tokenizer, chat, part)]
            text = ""
        else:
            text += part  # neighbouring texts are encoded together, as a rendered template would be
    return ids + tokenizer.encode(text)


def encode_response(tokenizer, chat: str, response: str) -> list[int]:
    """Token ids of an answer and the token that ends it."""
    _, answer, end = TEMPLATES[chat]
    # SentencePiece puts a space before every text, but an answer goes on from one. After a newline, which no piece of
    # Llama 2's vocabulary shares with the text behind it, the answer is encoded as it stands; then the newline goes.
    before = "\n" if tokenizer.dummy_prefix else ""
    ids = tokenizer.encode(before + answer(response))[len(tokenizer.encode(before)):]
    return [*ids, _special_id(tokenizer, chat, end)]


def _special_id(tokenizer, chat: str, special: Special) -> int:
    for name in special.split():
        if name in tokenizer.special:
            return tokenizer.special[name]
    raise InputError(f"the chat template {chat!r} needs the special token {' or '.join(special.split())}, which this "
                     f"tokenizer does not have; choose another template with --chat ({', '.join(TEMPLATES)})")


# --- rows and batches ---

@dataclass(frozen=True)
class Example:
    """One training or scoring sequence: all its token ids, of which the first `prompt_length` carry no loss.

    suppress: training lowers the probability of the response instead of raising it.
    """

    ids: list[int]
    prompt_length: int
    suppress: bool = False

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.prompt_length


def encode_example(tokenizer, chat: str, prompt: str, response: str, max_length: int, system=None) -> Example:
    """Encode a pair; an answer beyond max_length tokens in all is cut, a prompt that leaves no room is an error."""
    prompt_ids = encode_prompt(tokenizer, chat, prompt, system)
    if len(prompt_ids) >= max_length:
        raise InputError(f"a prompt of {len(prompt_ids)} tokens leaves no room for an answer within {max_length}: "
                         f"{prompt[:60]!r}; raise --max-length (up to the model's context) or drop it")
    return Example((prompt_ids + encode_response(tokenizer, chat, response))[:max_length], len(prompt_ids))


@dataclass
class Batch:
    """Right-padded rows. Position t predicts target t, the next token of its row."""

    tokens: torch.Tensor  # (B,T) int64, what the model reads
    targets: torch.Tensor  # (B,T) int64
    loss_mask: torch.Tensor  # (B,T) bool, true where the target is a response token or the end token
    lengths: torch.Tensor  # (B,) int64, the true lengths

    def to(self, device) -> "Batch":
        return Batch(*(getattr(self, name).to(device) for name in ("tokens", "targets", "loss_mask", "lengths")))


def collate(examples: list[Example], pad: int = 0) -> Batch:
    """Stack examples of unequal lengths; T is the longest less one, since the last token predicts nothing."""
    lengths = torch.tensor([len(example.ids) - 1 for example in examples])
    width = int(lengths.max())
    ids = torch.tensor([example.ids + [pad] * (width + 1 - len(example.ids)) for example in examples])
    place = torch.arange(width)
    starts = torch.tensor([example.prompt_length - 1 for example in examples])
    loss_mask = (place >= starts[:, None]) & (place < lengths[:, None])
    return Batch(ids[:, :-1], ids[:, 1:], loss_mask, lengths)


# --- which template a folder calls for ---

# A template is known by what stands in it: all of the first list, none of the second (spaces and the kind of quotes
# aside). Loose marks would take in a template that writes a line more than ours, and nobody would notice.
_HEADER = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>'"
_CHATML = "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
MARKS = {
    "llama2": (["bos_token + '[INST] '", "'<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content']"], []),
    "llama3": ([_HEADER, "bos_token"], ["<|start_header_id|>system", "think"]),
    "llama31": ([_HEADER, "bos_token", "Cutting Knowledge Date: December 2023\n", "'26 Jul 2024'"], ["think"]),
    "chatml": ([_CHATML], ["<|im_start|>system", "bos_token", "think"]),
    "smollm2": ([_CHATML, "AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"], ["bos_token", "think"]),
    "zephyr": (["'<|user|>\n' + message['content'] + eos_token }}\n", "'<|assistant|>' }}\n"], ["bos_token"]),
}


def _bare(jinja: str) -> str:
    return jinja.replace(" ", "").replace('"', "'").replace("\\n", "\n")


def read_chat(folder, override: str | None = None) -> str:
    """The name of a folder's chat template: the one it was trained with, else `override`, else what its files call for.

    override: from --chat. Training writes the name to chat.txt; that and an override must agree. Raises InputError.
    """
    stored = Path(folder) / "chat.txt"
    trained = stored.read_text(encoding="utf-8", errors="replace").strip() if stored.is_file() else None
    for source, name in (stored, trained), ("--chat", override):
        if name is not None and name not in TEMPLATES:
            raise InputError(f"{source}: chat template {name!r} is unknown; known: {', '.join(TEMPLATES)}")
    if None not in (trained, override) and trained != override:
        raise InputError(f"--chat {override}: {folder} was trained with {trained}, says its chat.txt; leave --chat out")
    return trained or override or _chat_of_files(Path(folder))


def _chat_of_files(folder: Path) -> str:
    path, template = _jinja_template(folder)
    if template is None:  # a base model from the hub (with tokenizer_config.json), or bare Llama 3 files, as the town's
        bare = not (folder / "tokenizer_config.json").is_file()
        return "llama3" if bare and "<|start_header_id|>" in load_tokenizer(folder).special else "plain"
    for name, (wanted, unwanted) in MARKS.items():
        if all(_bare(mark) in _bare(template) for mark in wanted) and not any(mark in template for mark in unwanted):
            return name
    raise InputError(f"{path}: its chat template is none of those known; if one of them is close enough, name it with "
                     f"--chat ({', '.join(TEMPLATES)})")


def _jinja_template(folder: Path) -> tuple[Path, str | None]:
    """(the file, its Jinja text or None), as transformers looks for them."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path, path.read_text(encoding="utf-8", errors="replace")
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); download the file again") from None
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several, by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default", "")
    return path, template
