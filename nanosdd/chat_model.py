"""A model to talk to: a Llama with its tokenizer and chat template, from a checkpoint folder and back; its greedy
answers."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from data.answers import Answer
from data.chat import encode_next_turn, encode_prompt, encode_response, is_trained, read_chat
from data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from model import Llama, LlamaConfig
from nanosdd.checkpoint import write_model
from nanosdd.device import DTYPES, Compute, rank_and_world_size
from nanosdd.errors import InputError, escaped
from nanosdd.progress import Progress

CACHE_BYTES = 2**31  # of keys and values at once; decides how many prompts are answered together


@dataclass(frozen=True)
class Chat:
    """A model to talk to: the Llama, its tokenizer, the name of its chat template, and how it computes."""

    model: Llama
    tokenizer: Tokenizer
    template: str
    compute: Compute


def model_folder(name: str) -> str:
    """The folder that a --model names; "smollm2" is written from its pip package on first use (data/smollm2.py)."""
    if name != "smollm2" or Path(name).is_dir():
        return name
    from data.smollm2 import smollm2_folder

    return str(smollm2_folder())


def untrained_folder(name: str) -> str:
    """The folder that a --model names, as the start of arms; InputError when it was itself written by train.py."""
    folder = model_folder(name)
    if is_trained(folder):
        raise InputError(
            f"--model {name} is itself a run of train.py; train.py goes on from it with --out DIR, "
            "attack.py attacks it with --released"
        )
    return folder


def load_chat(folder, compute: Compute, template: str | None = None, spread=None) -> Chat:
    """The Chat of a checkpoint folder, weights held as compute.weights; template: instead of the folder's own; spread:
    as of Llama.from_pretrained."""
    code = sorted(
        file.name
        for kind in ("bin", "pt", "pth", "pkl", "py")
        for file in Path(folder).glob(f"*.{kind}")
    )
    if code:
        print(
            f"{folder}: {escaped(', '.join(code))} could run code and are ignored; weights are read from safetensors"
        )
    tokenizer = load_tokenizer(folder)
    model = Llama.from_pretrained(folder, compute.device, DTYPES[compute.weights], spread).eval()
    if model.config.vocab_size < tokenizer.n_vocab:
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, the model only "
            f"{model.config.vocab_size}; the two belong to different models"
        )
    return Chat(model, tokenizer, read_chat(folder, template), compute)


def random_chat(world, compute: Compute) -> Chat:
    """A model of the world's shape with random weights, and the world's tokenizer."""
    if world.shape is None:
        raise InputError("public files need --model DIR, a Hugging Face Llama folder")
    with tempfile.TemporaryDirectory() as folder:
        world.write_tokenizer(folder)
        tokenizer, template = load_tokenizer(folder), read_chat(folder)
    torch.manual_seed(world.seed)
    model = Llama(LlamaConfig(vocab_size=tokenizer.n_vocab, **world.shape)).to(
        compute.device, DTYPES[compute.weights]
    )
    model.config.bos_token_id = encode_prompt(tokenizer, template, "")[0]
    model.config.eos_token_id = encode_response(tokenizer, template, "")[-1]
    return Chat(model, tokenizer, template, compute)


def answer(chat: Chat, prompts: list[str], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to prompts, in their order."""
    return continue_all(
        chat,
        [encode_prompt(chat.tokenizer, chat.template, prompt) for prompt in prompts],
        max_new_tokens,
    )


def answer_each(chat: Chat, prompts: list[str], max_new_tokens: int) -> dict[str, Answer]:
    """{prompt: greedy answer}; each prompt is answered once."""
    prompts = list(dict.fromkeys(prompts))
    return dict(zip(prompts, answer(chat, prompts, max_new_tokens)))


def continue_all(chat: Chat, ids: list[list[int]], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to encoded prompts, in their order. Prompts of similar length are answered together."""
    config = chat.model.config
    order, found = sorted(range(len(ids)), key=lambda i: len(ids[i])), {}
    place = (
        8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )  # bytes of a token, k and v
    most = 128 if chat.compute.device == "cpu" else 256  # there the progress bar should move
    together = max(
        1, min(most, CACHE_BYTES // (place * (max(map(len, ids), default=0) + max_new_tokens)))
    )
    compiled = (
        chat.compute.compile and rank_and_world_size()[1] == 1
    )  # several processes share their layers
    for start in Progress(range(0, len(order), together), desc="answers"):
        part = order[start : start + together]
        with chat.compute.autocast():
            answers = chat.model.generate(
                [ids[i] for i in part], max_new_tokens, chat.tokenizer.stop_tokens, compiled
            )
        for i, new in zip(part, answers):
            room = min(max_new_tokens, config.max_position_embeddings - len(ids[i]))
            found[i] = Answer(new, chat.tokenizer.decode(new), len(new) < room)
    return [found[i] for i in range(len(ids))]


def read_line() -> str:
    """What is typed in the terminal; "" at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def talk(chat: Chat, max_new_tokens: int, read=read_line):
    """Answer what `read` returns, turn by turn, with all earlier turns before it; ends at an empty line."""
    ids, end = [], encode_response(chat.tokenizer, chat.template, "")[-1]
    while prompt := read():
        encode = encode_next_turn if ids else encode_prompt
        ids += encode(chat.tokenizer, chat.template, prompt)
        if len(ids) >= chat.model.config.max_position_embeddings:
            raise InputError(
                "the conversation fills the model's context of "
                f"{chat.model.config.max_position_embeddings} tokens; start a new one"
            )
        reply = continue_all(chat, [ids], max_new_tokens)[0]
        print(escaped(reply.text))
        ids += [*reply.ids, end]


def save_chat(folder, chat: Chat, weights: dict, tokenizer_from):
    """Write a checkpoint folder with these weights by name. tokenizer_from: a folder to copy the tokenizer's files of,
    or a world that writes its own."""
    write_model(folder, chat.model.config.to_dict(), weights)
    (Path(folder) / "chat.txt").write_text(chat.template + "\n")
    if hasattr(tokenizer_from, "write_tokenizer"):
        tokenizer_from.write_tokenizer(folder)
        return
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_from) / name).is_file():
            shutil.copy(Path(tokenizer_from) / name, Path(folder) / name)
