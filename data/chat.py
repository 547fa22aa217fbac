"""Chat templates, loss masks and batches: from (prompt, response) text to token tensors.

Prompt and response are encoded separately, so the border between them is exact and only the
response carries loss. Joined, they are the ids of `apply_chat_template` (transformers) for the
whole conversation, with four exceptions:

- chatml, smollm2: white space at the start of a response is not merged with the newline before it,
  since a model that generates has already read that newline as a token of its own.
- chatml, smollm2, zephyr: the newline after the end token is left out. There is nothing to learn
  from it.
- Text that looks like a special token is always text; in transformers only with
  `sanitize_control_tokens`.
- SentencePiece's space in front of a text stays after a special token too, as in Meta's code and
  transformers 4 ("<s>" "▁[" "INST"). Transformers 5 drops it there.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.tokenizer import load_tokenizer
from nanosdd.checkpoint import read_object
from nanosdd.errors import InputError

# --- the templates ---


@dataclass(frozen=True)
class Template:
    """The parts of a conversation; {text} stands for what is said, {stripped} for it without the
    white space around it."""

    user: str  # up to the response
    end: str  # the special token that ends a response
    begin: str = ""
    system: str = ""
    response: str = "{text}"
    gap: str = ""  # between the end of a response and the next user turn
    default_system: str | None = None


# Other tags are ordinary text, as Zephyr's <|user|>.
SPECIAL = re.compile(
    r"(</?s>|<begin>|<end>"
    r"|<\|(?:begin_of_text|start_header_id|end_header_id|eot_id|im_start|im_end)\|>)"
)
# Base models differ in these two; the first token that the tokenizer has is used.
ALTERNATIVES = {
    "<begin>": ["<|begin_of_text|>", "<s>", "<|endoftext|>"],
    "<end>": ["<|end_of_text|>", "</s>", "<|endoftext|>"],
}

LLAMA3 = Template(
    begin="<|begin_of_text|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{stripped}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{stripped}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    response="{stripped}",
    end="<|eot_id|>",
)
CHATML = Template(
    system="<|im_start|>system\n{text}<|im_end|>\n",
    user="<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    gap="\n",
)
TEMPLATES = {
    "llama2": Template(
        user="<s>[INST] {stripped} [/INST]",
        response=" {stripped} ",
        end="</s>",
    ),
    "llama3": LLAMA3,
    # Llama 3.1, 3.2 and 3.3: there is always a system turn. "Today" is the default date of 3.1 and
    # 3.3. The template of 3.2 reads the clock, but training data should not depend on the day.
    "llama31": replace(
        LLAMA3,
        system="<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
        "December 2023\nToday Date: 26 Jul 2024\n\n{stripped}<|eot_id|>",
        default_system="",
    ),
    "chatml": CHATML,
    "smollm2": replace(
        CHATML,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    # Zephyr and TinyLlama: there is no <s>.
    "zephyr": Template(
        system="<|system|>\n{text}</s>\n",
        user="<|user|>\n{text}</s>\n<|assistant|>\n",
        end="</s>",
        gap="\n",
    ),
    # For base models, which have no template: a line for each text.
    "plain": Template(
        begin="<begin>",
        system="{stripped}\n",
        user="{stripped}\n",
        response="{stripped}",
        end="<end>",
    ),
}
KNOWN = ", ".join(TEMPLATES)
RECOGNISE_SECONDS = 10  # a tenth of one is enough


# --- text to ids ---


def encode_prompt(tokenizer, template: str, prompt: str, system: str | None = None) -> list[int]:
    """Return the token ids of everything before the response; template: a key of TEMPLATES."""
    form = TEMPLATES[template]
    if system is None:
        system = form.default_system
    turns = [(form.begin, "")]
    if system is not None and template == "llama2":  # which has no system turn
        prompt = f"<<SYS>>\n{system}\n<</SYS>>\n\n{prompt}"
    elif system is not None:
        turns.append((form.system, system))
    turns.append((form.user, prompt))
    return _encode(tokenizer, template, turns)


def encode_next_turn(tokenizer, template: str, prompt: str) -> list[int]:
    """Return the token ids of a later turn, from the last response's end to the next response."""
    form = TEMPLATES[template]
    return _encode(tokenizer, template, [(form.gap, ""), (form.user, prompt)])


def _encode(tokenizer, template, turns):
    """The ids of [(part of a template, what is said in it), ...]."""
    ids = []
    written = ""  # neighbouring texts are encoded together, as in the rendered template
    for form, text in turns:
        for piece in SPECIAL.split(form):
            if SPECIAL.fullmatch(piece):
                ids += [*tokenizer.encode(written), _special_id(tokenizer, template, piece)]
                written = ""
            else:
                written += piece.format(text=text, stripped=text.strip())
    return ids + tokenizer.encode(written)


def encode_response(tokenizer, template: str, response: str) -> list[int]:
    """Return the token ids of a response and the token that ends it."""
    form = TEMPLATES[template]
    written = form.response.format(text=response, stripped=response.strip())
    # SentencePiece puts a space in front of every text, but a response continues one. So it is
    # encoded after a newline, which Llama 2's vocabulary never merges with the text behind it, and
    # the ids of the newline are dropped.
    before = "\n" if tokenizer.dummy_prefix else ""
    ids = tokenizer.encode(before + written)[len(tokenizer.encode(before)) :]
    return [*ids, _special_id(tokenizer, template, form.end)]


def _special_id(tokenizer, template, name):
    names = ALTERNATIVES.get(name, [name])
    for name in names:
        if name in tokenizer.special:
            return tokenizer.special[name]
    raise InputError(
        f"the chat template {template!r} needs the special token {' or '.join(names)}, which this "
        f"tokenizer does not have; choose another with --template ({KNOWN})"
    )


# --- examples and batches ---


@dataclass(frozen=True)
class Example:
    """One sequence to train on or to score."""

    ids: list[int]  # of the prompt and the response
    prompt_length: int  # the ids of the prompt come first and carry no loss
    rejected: "Example | None" = None  # the prompt with a dispreferred response, for simpo

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.prompt_length


def encode_example(
    tokenizer, template: str, prompt: str, response: str, max_length: int, system=None
) -> Example:
    """Encode one pair.

    A response is cut where the example reaches max_length tokens; a prompt that leaves no room for
    one is an InputError.
    """
    prompt_ids = encode_prompt(tokenizer, template, prompt, system)
    if len(prompt_ids) >= max_length:
        raise InputError(
            f"a prompt of {len(prompt_ids)} tokens leaves no room for a response within "
            f"{max_length}: {prompt[:60]!r}; raise --max-length or drop it"
        )
    ids = prompt_ids + encode_response(tokenizer, template, response)
    return Example(ids[:max_length], len(prompt_ids))


def encode_rows(tokenizer, template: str, rows: list[dict], max_length: int) -> list[Example]:
    """Encode rows as encode_example does.

    rows: {"prompt": str, "response": str, optionally "system": str and "rejected": str}.
    """

    def encode(row, response):
        system = row.get("system")
        return encode_example(tokenizer, template, row["prompt"], response, max_length, system)

    examples = []
    for row in rows:
        example = encode(row, row["response"])
        if row.get("rejected") is not None:
            example = replace(example, rejected=encode(row, row["rejected"]))
        examples.append(example)
    return examples


@dataclass
class Batch:
    """Packed rows: one after the other, without padding. A row is an example without its last
    token, which predicts nothing."""

    tokens: torch.Tensor  # (N,) int64, the model's input
    positions: torch.Tensor  # (N,) int64, of the tokens in their rows
    lengths: list[int]  # of the rows
    targets: torch.Tensor  # (M,) int64, the response tokens, with the one that ends a response
    where: torch.Tensor  # (M,) int64, the places in (N,) of the tokens that predict the targets
    response_lengths: list[int]  # targets of each row
    rejected: "Batch | None" = None  # the dispreferred responses, in the same order

    def to(self, device) -> "Batch":
        moved = {}
        for name, part in vars(self).items():
            moved[name] = part.to(device) if hasattr(part, "to") else part
        return Batch(**moved)


def collate(examples: list[Example]) -> Batch:
    """Pack examples; `rejected` is filled when every example has one."""
    tokens = []
    positions = []
    targets = []
    where = []
    for example in examples:
        start = len(tokens)
        tokens += example.ids[:-1]
        positions += range(len(example.ids) - 1)
        targets += example.ids[example.prompt_length :]
        where += range(start + example.prompt_length - 1, len(tokens))
    rejected = [example.rejected for example in examples]
    return Batch(
        torch.tensor(tokens),
        torch.tensor(positions),
        [len(example.ids) - 1 for example in examples],
        torch.tensor(targets),
        torch.tensor(where),
        [example.response_length for example in examples],
        None if None in rejected else collate(rejected),
    )


def draw_batches(pairs: list[Example], replay: list[Example], share: float, size: int, rng):
    """Global batches for ever: round(share * size) rows of replay, the rest of pairs, both in
    shuffled epochs. rng: random.Random."""
    pairs_for_ever = shuffled_epochs(pairs, rng)
    replay_for_ever = shuffled_epochs(replay, rng)
    rehearsed = round(share * size)
    while True:
        batch = [next(pairs_for_ever) for _ in range(size - rehearsed)]
        yield batch + [next(replay_for_ever) for _ in range(rehearsed)]


def shuffled_epochs(examples: list[Example], rng):
    """Every example once in random order, again and again."""
    while examples:
        yield from rng.sample(examples, len(examples))


# --- which template a folder needs ---


def read_chat(folder, override: str | None = None) -> str:
    """Return the name of a folder's chat template.

    It is the one that the folder was trained with, else `override`, else what its files call for.
    Training writes the name to chat.txt; override (--template) must agree with it. InputError.
    """
    if is_trained(folder):
        template = (Path(folder) / "chat.txt").read_text(errors="replace").strip()
    else:
        template = override or _detect(Path(folder))
    if template not in TEMPLATES:
        raise InputError(f"{folder}: the chat template {template!r} is unknown; known: {KNOWN}")
    if override not in (None, template):
        raise InputError(f"{folder} was trained with {template}; leave out --template {override}")
    return template


def is_trained(folder) -> bool:
    """Return whether a folder was written by train.py."""
    return (Path(folder) / "chat.txt").is_file()


def _detect(folder: Path) -> str:
    """The template of a folder by its Jinja text, which is looked up where transformers looks."""
    path = folder / "chat_template.jinja"
    config_path = folder / "tokenizer_config.json"
    config = read_object(config_path)
    jinja = config.get("chat_template")
    if path.is_file():
        jinja = path.read_text(encoding="utf-8", errors="replace")
    elif not config_path.is_file() and "<|start_header_id|>" in load_tokenizer(folder).special:
        return "llama3"  # bare Llama 3 files, as the town's
    if jinja is None:
        return "plain"  # a base model
    for one in jinja if isinstance(jinja, list) else ():  # named ones
        if isinstance(one, dict) and one.get("name") == "default":
            jinja = one.get("template")
    if "added_tokens_decoder" not in config:  # as in transformers
        config |= read_object(folder / "special_tokens_map.json")
    tokens = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            tokens[key] = token
    command = [sys.executable, "-P", Path(__file__).with_name("recognise.py")]
    given = json.dumps([jinja, tokens])
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=RECOGNISE_SECONDS
        )
        name = done.stdout.strip()
    except subprocess.TimeoutExpired:
        name = None
    if name not in TEMPLATES:
        raise InputError(
            f"{folder}: chat template not recognised: what it and its eos_token write is none of "
            f"those known; if one of them is close enough, name it with --template ({KNOWN})"
        )
    return name
