"""A model to talk to: a Llama with tokenizer and chat template, its answers and likelihoods.

From a checkpoint folder and back; greedy answers; teacher forcing of given responses.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from data.answers import Answer
from data.chat import (
    Example,
    collate,
    encode_next_turn,
    encode_prompt,
    encode_response,
    encode_rows,
    is_trained,
    read_chat,
)
from data.tokenizer import Tokenizer, load_tokenizer
from data.worlds import open_world, sources_of
from model import Llama, LlamaConfig
from nanosdd.checkpoint import write_model, writing
from nanosdd.device import DTYPES, Compute, rank_and_world_size
from nanosdd.errors import InputError
from nanosdd.progress import Progress
from nanosdd.runs import check_finished, code_hash, write_text
from sdd_loss import token_logprobs

CACHE_BYTES = 2**31  # of keys and values at once: how many prompts are answered together
LOGITS = 2**27  # at once in teacher forcing, if all tokens were predicted
PACKED_TOKENS = 2**14  # at once in teacher forcing


@dataclass(frozen=True)
class Chat:
    """A model to talk to: the Llama, its tokenizer, the name of its chat template, its compute."""

    model: Llama
    tokenizer: Tokenizer
    template: str
    compute: Compute


def model_folder(name: str) -> str:
    """The folder that a --model names; "smollm2" is written from its pip package on first use."""
    if name != "smollm2" or Path(name).is_dir():
        return name
    from data.smollm2 import smollm2_folder

    return str(smollm2_folder())


def untrained_folder(name: str) -> str:
    """The same, as the start of arms; InputError when it was itself written by train.py."""
    folder = model_folder(name)
    if is_trained(folder):
        raise InputError(
            f"--model {name} is itself a run of train.py; train.py goes on from it with --out DIR, "
            "attack.py attacks it with --released"
        )
    return folder


def load_chat(folder, compute: Compute, template: str | None = None, spread=None) -> Chat:
    """The Chat of a checkpoint folder, with weights held as compute.weights. template: instead of
    the folder's own; spread: as of Llama.from_pretrained."""
    check_finished(folder)
    tokenizer = load_tokenizer(folder)
    model = Llama.from_pretrained(folder, compute.device, DTYPES[compute.weights], spread).eval()
    rows = model.config.vocab_size
    if rows < tokenizer.n_vocab:  # special tokens without a row, as some <pad>, are left out
        special = {name: i for name, i in tokenizer.special.items() if i < rows}
        rowless = set(tokenizer.special.values()) - set(special.values())
        pieces = {i: piece for i, piece in tokenizer.token_bytes.items() if i not in rowless}
        tokenizer = replace(tokenizer, special=special, token_bytes=pieces)
    if rows < tokenizer.n_vocab:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, the model only "
            f"{rows}; the two belong to different models"
        )
    chat = Chat(model, tokenizer, read_chat(folder, template), compute)
    check_device(chat, lambda: load_chat(folder, Compute()))
    return chat


def check_device(chat: Chat, load):
    """InputError when the device computes another mean log p of a few rows than the CPU in fp32.

    load: a function that returns the same model on the CPU.
    """
    if chat.compute.device == "cpu":
        return
    rows = [Example([*range(first, 120, 3)], 1) for first in (0, 60, 100)]  # any token ids will do
    there = mean_logp(teacher_forced(chat, rows))
    if rank_and_world_size()[0] == 0:
        here = mean_logp(teacher_forced(load(), rows))
        rounding = 0.1 if chat.compute.dtype == "bf16" else 0.002  # measured: 0.02
        if not abs(there - here) <= rounding:
            raise InputError(
                f"{chat.compute.device} computes wrongly: log p is {there:.3f} nats a token, and "
                f"{here:.3f} on the CPU; use --device cpu, or another version of PyTorch"
            )


def new_chat(world, compute: Compute) -> Chat:
    """A model of the world's shape with random weights, and the world's tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        world.write_tokenizer(folder)
        tokenizer = load_tokenizer(folder)
        template = read_chat(folder)
    torch.manual_seed(world.seed)
    config = LlamaConfig(vocab_size=tokenizer.n_vocab, **world.shape)
    config.bos_token_id = encode_prompt(tokenizer, template, "")[0]
    config.eos_token_id = encode_response(tokenizer, template, "")[-1]
    model = Llama(config).to(compute.device, DTYPES[compute.weights])
    chat = Chat(model, tokenizer, template, compute)
    check_device(chat, lambda: new_chat(world, Compute()))
    return chat


def save_chat(folder: Path, chat: Chat, weights: dict):
    """Write a checkpoint folder with these weights, and the tokenizer's files as they were read."""
    write_text(folder / "chat.txt", chat.template + "\n")
    for name, contents in chat.tokenizer.files.items():
        with writing(folder / name) as temporary:
            temporary.write_bytes(contents)
    write_model(folder, chat.model.config.to_dict(), weights)


@dataclass
class Ask:
    """What a world asks a model with: ask(prompts, max_new_tokens) -> Answers, and likelihoods. The
    model is loaded when it is first asked. template: of load_chat."""

    folder: str
    compute: Compute
    template: str | None

    @property
    def describes(self) -> dict:
        """What answers depend on beside the folder."""
        decode = code_hash(Llama)
        return {"dtype": self.compute.dtype, "template": self.template, "decode": decode}

    @cached_property
    def chat(self) -> Chat:
        return load_chat(self.folder, replace(self.compute, compile=False), self.template)

    def __call__(self, prompts, max_new_tokens: int, temperature: float = 0.0) -> list[Answer]:
        """Answers to prompts: greedy, or random at a temperature, the same ones each time."""
        if not temperature:
            return answer(self.chat, prompts, max_new_tokens)
        generator = torch.Generator(self.compute.device).manual_seed(0)

        def add_noise(head, inputs, logits):  # Gumbel's: the argmax is then a draw of the softmax
            waits = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
            return logits.float() / temperature - waits.log()

        with self.chat.model.lm_head.register_forward_hook(add_noise):
            return answer(self.chat, prompts, max_new_tokens)

    def logps(self, rows, max_length: int) -> list[torch.Tensor]:
        """log p (n,) of the tokens of answers, given as (prompt, Answer), within max_length tokens.
        The end token counts only of an answer that ended by itself."""
        chat = self.chat
        pairs = [{"prompt": prompt, "response": one.text} for prompt, one in rows]
        examples = encode_rows(chat.tokenizer, chat.template, pairs, max_length)
        found = [forced.logps for forced in teacher_forced(chat, examples)]
        for i, (_, one) in enumerate(rows):
            if one.text.strip() and not one.ended:
                found[i] = found[i][:-1]
        return found


def world_of(args, seed: int, compute: Compute, folder):
    """The world that parsed arguments ask for; it may ask the model in a folder."""
    ask = Ask(folder, compute, args.template)
    return open_world(args.world, seed, sources_of(args), ask)


# ---- greedy answers ----


def answer(chat: Chat, prompts: list[str], max_new_tokens: int, file=None) -> list[Answer]:
    """Greedy answers to prompts, in their order; equal prompts are answered once.

    InputError for a prompt that leaves no room; file: where it stands, to be named.
    """
    different = list(dict.fromkeys(prompts))
    ids = [encode_prompt(chat.tokenizer, chat.template, prompt) for prompt in different]
    for prompt, tokens in zip(different, ids):
        if len(tokens) >= chat.model.config.max_position_embeddings:
            raise InputError(
                f"{file or 'a prompt'}: {prompt[:60]!r} has {len(tokens)} tokens, which leave no "
                "room for an answer in this model's context; shorten it, or take it out"
            )
    found = dict(zip(different, continue_all(chat, ids, max_new_tokens)))
    return [found[prompt] for prompt in prompts]


def continue_all(chat: Chat, ids: list[list[int]], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to encoded prompts, in their order. Similar lengths are answered together."""
    config = chat.model.config
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    token_bytes = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    longest = max(map(len, ids), default=0) + max_new_tokens
    most = 128 if chat.compute.device == "cpu" else 256  # there the progress bar should move
    together = max(1, min(most, CACHE_BYTES // (token_bytes * longest)))
    compiled = chat.compute.compile and rank_and_world_size()[1] == 1
    found = [None] * len(ids)
    for start in Progress(range(0, len(ids), together), desc="answers"):
        part = order[start : start + together]
        with chat.compute.autocast():
            answers = chat.model.generate(
                [ids[i] for i in part], max_new_tokens, chat.tokenizer.stop_tokens, compiled
            )
        for i, new in zip(part, answers):
            room = min(max_new_tokens, config.max_position_embeddings - len(ids[i]))
            found[i] = Answer(new, chat.tokenizer.decode(new), len(new) < room)
    return found


def read_line() -> str:
    """What is typed in the terminal; "" at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def talk(chat: Chat, max_new_tokens: int, read=read_line):
    """Answer what `read` returns, turn by turn, after all earlier turns; ends at an empty line."""
    end = encode_response(chat.tokenizer, chat.template, "")[-1]
    ids = []
    while prompt := read():
        encode = encode_next_turn if ids else encode_prompt
        ids += encode(chat.tokenizer, chat.template, prompt)
        reply = continue_all(chat, [ids], max_new_tokens)[0]
        print(reply.text)
        ids += [*reply.ids, end]


# ---- teacher forcing ----


class Forced(NamedTuple):
    """How a model predicts a given response, token by token, each after the true ones."""

    hits: torch.Tensor  # (n,) bool, whether argmax is right; the last one is the end token
    logps: torch.Tensor  # (n,) fp32, log p of each token, in nats

    @property
    def exact(self) -> bool:
        """Whether greedy decoding gives this very response."""
        return bool(self.hits.all())


@torch.no_grad()
def teacher_forced(chat: Chat, examples: list[Example]) -> list[Forced]:
    """One Forced for each example, in their order."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    most_tokens = min(PACKED_TOKENS, LOGITS // chat.model.config.vocab_size)
    found = [None] * len(examples)
    with Progress(total=len(examples), desc="likelihoods") as bar:
        while order:
            longest = len(examples[order[0]].ids)  # of those that are left
            part = order[: max(1, most_tokens // longest)]
            del order[: len(part)]
            batch = collate([examples[i] for i in part]).to(chat.compute.device)
            with chat.compute.autocast():
                hidden = chat.model.hidden(batch.tokens, batch.positions, batch.lengths)  # (N,C)
            # The head computes in the weights' dtype: in bf16 many logits would tie.
            before = hidden[batch.where].to(chat.model.lm_head.weight.dtype)
            logits = chat.model.lm_head(before).float()  # (M,V)
            hits = (logits.argmax(-1) == batch.targets).cpu()
            logps = token_logprobs(logits, batch.targets).cpu()
            lengths = batch.response_lengths
            for i, *one in zip(part, hits.split(lengths), logps.split(lengths)):
                found[i] = Forced(*one)
            bar.update(len(part))
    return found


def encode_for(chat: Chat, rows: list[dict], max_length: int) -> list[Example]:
    """The rows as examples of at most max_length tokens. Those whose prompt is as long, as some of
    ShareGPT are, are left out and counted on stdout. InputError when all are."""
    limit = min(max_length, chat.model.config.max_position_embeddings)
    examples = []
    left_out = []
    for row in rows:
        try:
            examples += encode_rows(chat.tokenizer, chat.template, [row], limit)
        except InputError as error:
            left_out.append(error)
    if left_out and not examples:
        raise left_out[0]
    if left_out:
        print(f"  left out {len(left_out)} of {len(rows)} rows, the first: {left_out[0]}")
    return examples


def mean_logp(forced: list[Forced]) -> float:
    """Mean log p in nats over all response tokens of the rows."""
    return float(torch.cat([one.logps for one in forced]).mean())


def mean_logps(chat: Chat, named: dict[str, list[Example]]) -> dict[str, float]:
    """{name: the mean log p of its examples}."""
    return {name: mean_logp(teacher_forced(chat, some)) for name, some in named.items()}
