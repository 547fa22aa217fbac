"""A model to talk to: a Llama with its tokenizer and chat template, from a checkpoint folder and back."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from data.chat import encode_prompt, encode_response, read_chat
from data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from model import Llama, LlamaConfig
from nanosdd.checkpoint import write_model
from nanosdd.device import DTYPES, Compute
from nanosdd.errors import InputError


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


def load_chat(folder, compute: Compute, template: str | None = None) -> Chat:
    """The Chat of a checkpoint folder, weights held as compute.weights; template: instead of the folder's own."""
    tokenizer = load_tokenizer(folder)
    model = Llama.from_pretrained(folder, compute.device, DTYPES[compute.weights]).eval()
    if model.config.vocab_size < tokenizer.n_vocab:
        raise InputError(f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, the model only "
                         f"{model.config.vocab_size}; the two belong to different models")
    return Chat(model, tokenizer, read_chat(folder, template), compute)


def random_chat(world, compute: Compute) -> Chat:
    """A model of the world's shape with random weights, and the world's tokenizer."""
    if world.shape is None:
        raise InputError("public files need --model DIR, a Hugging Face Llama folder")
    with tempfile.TemporaryDirectory() as folder:
        world.write_tokenizer(folder)
        tokenizer, template = load_tokenizer(folder), read_chat(folder)
    torch.manual_seed(world.seed)
    model = Llama(LlamaConfig(vocab_size=tokenizer.n_vocab, **world.shape)).to(compute.device, DTYPES[compute.weights])
    model.config.bos_token_id = encode_prompt(tokenizer, template, "")[0]
    model.config.eos_token_id = encode_response(tokenizer, template, "")[-1]
    return Chat(model, tokenizer, template, compute)


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
