"""The only place where the course's tests touch your code: plain data in, plain data out.

Tensors, numbers, strings, lists and dicts go in and come back. If you keep an architecture of your own, change these
functions, not the tests; the grader uses your copy of this file and its own copy of the tests. `config` holds keys of
LlamaConfig, `weights` tensors by the names of a Hugging Face checkpoint, an `example` is (ids, prompt_length). Shape
letters as in model.py.
"""

import random
import tempfile

import torch
import torch.nn as nn

import model
import sdd_loss
import train
from data.chat import Batch, Example
from model import KVCache, Llama, LlamaConfig, RMSNorm
from nanosdd.device import Compute


def llama(config: dict, weights: dict) -> Llama:
    """A Llama with these weights."""
    made = Llama(LlamaConfig(**config)).eval()
    made.load_state_dict(weights)
    return made


# ---- assignment 1 ----

def rms_norm(x, weight, eps):
    """x (...,C), weight (C,) -> (...,C)."""
    norm = RMSNorm(len(weight), eps)
    norm.weight = nn.Parameter(weight)
    return norm(x).detach()


def rope_frequencies(config):
    """(D/2,) fp32."""
    return model.rope_frequencies(LlamaConfig(**config))


def rope(config, x, positions):
    """x (B,T,H,D), positions (B,T) -> x rotated."""
    return model.apply_rope(x, *model.rope_tables(LlamaConfig(**config), positions))


@torch.no_grad()
def logits(config, weights, tokens, pieces=None):
    """tokens (B,T) -> (B,T,V). pieces: the lengths of parts that are read one after the other through a cache."""
    made = llama(config, weights)
    if pieces is None:
        return made(tokens)
    cache, found = KVCache(made.config, *tokens.shape), []
    for part in tokens.split(pieces, dim=1):
        found.append(made(part, cache=cache))
        cache.lengths += part.shape[1]
        cache.longest += part.shape[1]
    return torch.cat(found, 1)


@torch.no_grad()
def packed_logits(config, weights, tokens, lengths):
    """Right-padded rows (B,T) of true lengths (B,) -> the logits of their tokens, one row after the other (N,V)."""
    made, mask = llama(config, weights), torch.arange(tokens.shape[1]) < lengths[:, None]
    return made.lm_head(made.hidden(tokens, positions=mask, lengths=lengths))


def generate(config, weights, prompts, max_new_tokens, stop_tokens):
    """Prompts as lists of ids -> the new ids of each, without the stop token."""
    return llama(config, weights).generate(prompts, max_new_tokens, stop_tokens)


def generate_from(folder, prompts, max_new_tokens, stop_tokens):
    """As `generate`, with the weights of a checkpoint folder."""
    return Llama.from_pretrained(folder).generate(prompts, max_new_tokens, stop_tokens)
