"""A small random-weight Llama folder around a real tokenizer, to try commands on real files."""

import shutil
from pathlib import Path

import torch

from data.tokenizer import TOKENIZER_FILES, load_tokenizer
from model import Llama, LlamaConfig


def make(out, tokenizer_folder, context=2048):
    """Write the folder: 2 layers of width 64, the head tied, as many ids as the tokenizer has."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=tokenizer.n_vocab,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        rope_theta=500000.0,
    )
    Llama(config).save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_folder) / name).is_file():
            shutil.copyfile(Path(tokenizer_folder) / name, Path(out) / name)
