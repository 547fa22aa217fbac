"""Faster ways to the same numbers: decoding steps through torch.compile, and what a CPU computes faster otherwise."""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanosdd.errors import InputError


def next_tokens(model, tokens: torch.Tensor, cache) -> torch.Tensor:
    """The next token of every row after these: (B,) -> (B,) int64; the cache's rows grow by one, to its last place."""
    new = model(tokens[:, None], cache=cache)[:, 0].argmax(dim=-1)
    cache.lengths.add_(1).clamp_(max=cache.size - 1)  # finished rows may still be in the batch
    return new


@functools.cache
def _compiled():
    return torch.compile(next_tokens, dynamic=True, fullgraph=True, mode="reduce-overhead")


def compiled_next_tokens(model, tokens: torch.Tensor, cache) -> torch.Tensor:
    """`next_tokens` through torch.compile (on CUDA as a CUDA graph), for a cache whose `longest` does not change."""
    for tensor in [cache.lengths, *(cached for layer in cache.layers for cached in layer)]:
        torch._dynamo.mark_static_address(
            tensor
        )  # written in place: a CUDA graph must know where it stays
    torch.compiler.cudagraph_mark_step_begin()
    return _compiled()(
        model, tokens, cache
    ).clone()  # the next run overwrites the graph's own output


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which matrix products with a weight are computed: autocast's, where it is on, else its own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def check_finite(logits: torch.Tensor, model, tokens: torch.Tensor):
    """InputError, naming the first layer where it begins, when logits are NaN or infinite: argmax would still answer.

    tokens (B,T): what the model read.
    """
    if logits.isfinite().all():
        return
    found, watched = (
        [],
        [
            ("the embedding", model.model.embed_tokens),
            *((f"layer {i}", block) for i, block in enumerate(model.model.layers)),
            ("the last norm", model.model.norm),
        ],
    )
    handles = [
        part.register_forward_hook(
            lambda module, given, out, name=name: (
                None if out.isfinite().all() else found.append(name)
            )
        )
        for name, part in watched
    ]
    with torch.no_grad():
        model(tokens[:1])
    for handle in handles:
        handle.remove()
    raise InputError(
        f"the model's logits are not finite, from {found[0] if found else 'the head'} on; its weights are "
        "broken or too large for this dtype: train or fetch it again, or use --dtype fp32"
    )


def attend(q, k, v, visible, enable_gqa: bool, dtype) -> torch.Tensor:
    """F.scaled_dot_product_attention of q (B,H,T,D), k and v (B,G,S,D), causal where `visible` is None.

    A CPU trains in bf16 (autocast) with attention in `dtype`, that of the weights: the backward pass of attention in
    bf16 takes more than twice as long as that in fp32.
    """
    options = dict(attn_mask=visible, is_causal=visible is None, enable_gqa=enable_gqa)
    if q.dtype == dtype or q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), **options).to(
            q.dtype
        )


class Linear(nn.Linear):
    """x @ weight.T; while rows are decoded on a CPU in fp32, as (weight @ x.T).T, which is faster for few rows.

    The two orders call different BLAS routines. A single row is duplicated where a layer has more outputs than inputs:
    there two rows are faster than one.
    """

    def forward(self, x):
        B = len(x)
        least = 1 if self.out_features > self.in_features else 2
        if (
            x.dim() != 3
            or x.shape[1] > 1
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or not least <= B <= 128
        ):
            return F.linear(x, self.weight)
        x = x[:, 0] if B > 1 else x[:, 0].repeat(2, 1)  # (B,C)
        return (self.weight @ x.T).T[:B, None]  # (B,1,V)
