"""Faster decoding steps for `Llama.generate`, with the same tokens: torch.compile, and matrix products of few rows."""

import functools

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nanosdd.errors import InputError


def next_tokens(model, tokens: torch.Tensor, cache) -> torch.Tensor:
    """The next token of every row after these: (B,) -> (B,) int64; the cache's rows grow by one, up to its size."""
    new = model(tokens[:, None], cache=cache)[:, 0].argmax(dim=-1)
    cache.lengths.add_(1).clamp_(max=cache.size - 1)  # finished rows may still be in the batch
    return new


@functools.cache
def _compiled():
    return torch.compile(next_tokens, dynamic=True, fullgraph=True, mode="reduce-overhead")


def compiled_next_tokens(model, tokens: torch.Tensor, cache) -> torch.Tensor:
    """`next_tokens` through torch.compile (on CUDA as a CUDA graph), for a cache whose `longest` does not change."""
    for tensor in [cache.lengths, *(cached for layer in cache.layers for cached in layer)]:
        torch._dynamo.mark_static_address(tensor)  # written in place: a CUDA graph must know where it stays
    torch.compiler.cudagraph_mark_step_begin()
    return _compiled()(model, tokens, cache).clone()  # the next run overwrites the graph's own output


def check_finite(logits: torch.Tensor, model, tokens: torch.Tensor):
    """InputError, naming the first layer where it begins, when logits are NaN or infinite: argmax would still answer.

    tokens (B,T): what the model read.
    """
    if logits.isfinite().all():
        return
    found, watched = [], [("the embedding", model.model.embed_tokens), *(
        (f"layer {i}", block) for i, block in enumerate(model.model.layers)), ("the last norm", model.model.norm)]
    handles = [part.register_forward_hook(
        lambda module, given, out, name=name: None if out.isfinite().all() else found.append(name))
        for name, part in watched]
    with torch.no_grad():
        model(tokens[:1])
    for handle in handles:
        handle.remove()
    raise InputError(f"the model's logits are not finite, from {found[0] if found else 'the head'} on; its weights are "
                     "broken or too large for this dtype: train or fetch it again, or use --dtype fp32")


class FewRows(TorchFunctionMode):
    """While active, F.linear computes x @ weight.T of few rows as (weight @ x.T).T: up to twice as fast on a CPU.

    The two orders call different BLAS routines. A single row is duplicated where a layer has more outputs than inputs:
    there two rows are faster than one.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:  # no layer has a bias
            x, weight = args[0].flatten(0, -2), args[1]  # (n,C), (V,C)
            if 1 < len(x) <= 32 or len(x) == 1 and len(weight) > weight.shape[1]:
                y = (weight @ (x if len(x) > 1 else x.repeat(2, 1)).T).T[:len(x)]
                return y.view(*args[0].shape[:-1], -1)
        return function(*args, **(kwargs or {}))
