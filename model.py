"""Llama, written out: layers on packed rows, and greedy decoding.

Module names are those of Hugging Face checkpoints: a state dict key is a tensor's name in the file.
Shape letters: B rows, T tokens of a row, N tokens of all packed rows (one row after the other,
without padding), S places in view, C hidden_size, H heads, G key-value heads, D head_dim,
V vocabulary.
"""

import functools
import itertools
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as checkpoint_block

from nanosdd import checkpoint
from nanosdd.attention import KVCache, PackedRows
from nanosdd.errors import InputError
from nanosdd.llama_config import LlamaConfig

Linear = partial(nn.Linear, bias=False)  # Llama has no bias anywhere


def rope_frequencies(config: LlamaConfig, device=None) -> torch.Tensor:
    """Radians that each pair of a head's dimensions turns per position: (D/2,) fp32.

    Llama 3.1's scaling (`rope_type: llama3`) slows the pairs whose wavelength is long against the
    original context by `factor`, leaves the short ones, and blends in between. The power comes
    before the reciprocal, as in transformers: at position 100,000 the last bit can be seen.
    """
    D = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    slowed = freq / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / freq)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed, 1: left as it is
    return (1 - keep) * slowed + keep * freq


def rope_tables(config: LlamaConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every angle: positions (...) -> two of (...,1,D/2) fp32; 1: for all heads."""
    frequencies = rope_frequencies(config, positions.device)  # (D/2,)
    angles = positions[..., None, None].float() * frequencies  # (...,1,D/2)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn dimension i with i + D/2 (half-split, as in Hugging Face): (...,H,D) -> the same."""
    a, b = x.chunk(2, dim=-1)  # (...,H,D/2) each
    cos = cos.to(x.dtype)  # as in the published code: the product is in x's dtype
    sin = sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---- layers ----


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then times the weight: in that order, as it was trained."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        h = x.float()  # squares of bf16 numbers would lose most of their digits
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Attention(nn.Module):
    """Self-attention with grouped queries: each of G key-value heads serves H/G query heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C = config.hidden_size
        H = config.num_attention_heads
        G = config.num_key_value_heads
        D = config.head_dim
        self.head_dim = D
        # Heads lie side by side in the columns of one matrix.
        self.q_proj = Linear(C, H * D)
        self.k_proj = Linear(C, G * D)
        self.v_proj = Linear(C, G * D)
        self.o_proj = Linear(H * D, C)

    def forward(self, x, cos, sin, attend):
        # x (N,C); cos, sin (N,1,D/2); attend: a function of q, k, v
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N,H,D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N,G,D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        y = attend(q, k, v)  # (N,H,D)
        return self.o_proj(y.flatten(1))  # (N,C)


class MLP(nn.Module):
    """SwiGLU: a gated feed-forward layer."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C = config.hidden_size
        I = config.intermediate_size
        self.gate_proj = Linear(C, I)
        self.up_proj = Linear(C, I)
        self.down_proj = Linear(I, C)

    def forward(self, x):
        gate = F.silu(self.gate_proj(x))  # (N,I)
        return self.down_proj(gate * self.up_proj(x))  # (N,C)


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normalised input and added to it."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- the model ----


class Llama(nn.Module):
    """A Llama for causal language modelling; `model(tokens)` returns next-token logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(layers),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        # Matrices start random, the weights of norms at 1.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.initializer_range)
        self.checkpoint_activations = False  # recompute layers in the backward pass
        self.tie_weights()

    def tie_weights(self):
        """Where the configuration ties them, the head is the embedding: one parameter, twice."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token logits: tokens (B,T) int64 -> (B,T,V) in the compute dtype."""
        B, T = tokens.shape
        positions = torch.arange(T, device=tokens.device).repeat(B)
        x = self.hidden(tokens.flatten(), positions, [T] * B)  # (B*T,C)
        return self.lm_head(x).view(B, T, -1)

    def hidden(self, tokens, positions, lengths: list[int]) -> torch.Tensor:
        """Final hidden states, the input of the head, of packed rows: (N,), (N,) -> (N,C).

        Rows lie one after the other; positions count from 0 in each, lengths are theirs.
        """
        attention = [PackedRows(lengths)] * len(self.model.layers)
        return self.run_layers(tokens, positions, attention)

    def run_layers(self, tokens, positions, attention: list) -> torch.Tensor:
        """Tokens (N,) at positions (N,) -> (N,C). attention: of each layer, q, k, v -> y."""
        cos, sin = rope_tables(self.config, positions)  # the same for every layer
        x = self.model.embed_tokens(tokens)  # (N,C)
        for block, attend in zip(self.model.layers, attention):
            if self.checkpoint_activations and self.training:
                x = checkpoint_block(block, x, cos, sin, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend)
        return self.model.norm(x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens: int, stop_tokens=(), compiled=False) -> list:
        """Greedy answers: prompts list[list[int]] -> the new ids of each, without the stop token.

        Prompts may differ in length. Each gets the tokens that it gets alone (in fp32, ties within
        rounding aside): rows keep their own positions, stop on their own and are then dropped. A
        row also stops where the context ends. compiled: steps of fixed shapes through
        torch.compile. InputError for an empty prompt or one that fills the context.
        """
        answers = [[] for _ in prompts]
        context = self.config.max_position_embeddings
        for prompt in prompts:
            if not 0 < len(prompt) < context:
                raise InputError(
                    f"a prompt has {len(prompt)} tokens; it needs 1 to {context - 1} to leave room "
                    f"for an answer in this model's context of {context}: shorten it"
                )
        if not prompts or max_new_tokens < 1:
            return answers
        # All prompts are read at once, packed; then each row gets one token a step.
        new, cache = self.read_prompts(prompts, max_new_tokens)  # (B,)
        step = compiled_next_tokens if compiled else next_tokens
        if compiled:
            cache.longest = cache.size - 1  # attention covers the whole cache: no shape changes
        rows = list(range(len(prompts)))  # the answer that each row of the batch belongs to
        unfinished = set(rows)
        for left in reversed(range(max_new_tokens)):
            for row, token in zip(rows, new.tolist()):
                if row in unfinished and token not in stop_tokens:
                    answers[row].append(token)
                if token in stop_tokens or len(prompts[row]) + len(answers[row]) == context:
                    unfinished.discard(row)
            if not unfinished or not left:
                return answers
            # Finished rows only cost time. Compiled steps keep their shape a little longer.
            if len(unfinished) <= (len(rows) // 2 if compiled else len(rows) - 1):
                kept = cache.keep([i for i, row in enumerate(rows) if row in unfinished])
                rows = [rows[i] for i in kept]
                new = new[kept]
            new = step(self, new, cache)
            cache.longest = min(cache.longest + 1, cache.size - 1)

    def read_prompts(self, prompts, max_new_tokens: int) -> tuple[torch.Tensor, KVCache]:
        """(the first new token of each prompt (B,), a cache with the prompts in it)."""
        weight = self.lm_head.weight
        device = weight.device
        dtype = weight.dtype  # that in which products with a weight are computed
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        lengths = [len(prompt) for prompt in prompts]
        # No answer can be longer than the context.
        size = min(max(lengths) + max_new_tokens, self.config.max_position_embeddings)
        cache = KVCache(self.config, lengths, size, device, dtype)
        tokens = torch.tensor(list(itertools.chain(*prompts)), device=device)  # (N,)
        positions = torch.cat([torch.arange(T, device=device) for T in lengths])  # (N,)
        layers = range(self.config.num_hidden_layers)
        rows = PackedRows(lengths)
        attention = [partial(cache.read_prompts, layer, rows) for layer in layers]
        x = self.run_layers(tokens, positions, attention)  # (N,C)
        # Only the last token of a prompt says what comes next.
        logits = self.lm_head(x[cache.lengths.cumsum(0) - 1])  # (B,V)
        if not logits.isfinite().all():  # argmax would answer all the same
            raise InputError(
                "the model's logits are not finite; its weights are broken or too large for this "
                "dtype: train or fetch it again, or use --dtype fp32"
            )
        return argmax(logits), cache

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, spread=None) -> "Llama":
        """Load a Hugging Face folder (`config.json` and safetensors), with weights in `dtype`.

        spread: a function (model) that distributes parameters over processes before reading.
        """
        config = LlamaConfig.from_dict(checkpoint.read_config(folder))
        with torch.device("meta"):  # shapes only: the tensors come straight from the file
            model = cls(config)
        if spread:
            spread(model)
        checkpoint.read_weights(model, folder, device, dtype)
        model.tie_weights()
        return model

    def save_pretrained(self, folder, dtype=None):
        """Write `config.json` and safetensors in `dtype` (default: the weights' own)."""
        checkpoint.write_model(folder, self.config.to_dict(), self.state_dict(), dtype)


# ---- one decoding step ----


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The largest of each row, the first of equal ones: (B,V) -> (B,) int64."""
    return logits.float().argmax(dim=-1)  # in bf16 it takes five times as long on a CPU


def next_tokens(model: Llama, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """The next token of every row after these: (B,) -> (B,) int64. Rows grow by one token."""
    places = torch.arange(cache.longest + 1, device=tokens.device)
    visible = places <= cache.lengths[:, None]  # (B,S): every place up to the new token's own
    layers = range(model.config.num_hidden_layers)
    attention = [partial(cache.read_token, layer, visible) for layer in layers]
    x = model.run_layers(tokens, cache.lengths, attention)  # (B,C)
    cache.lengths.add_(1).clamp_(max=cache.size - 1)  # finished rows may still be in the batch
    return argmax(model.lm_head(x))


@functools.cache
def compile_once():
    return torch.compile(next_tokens, dynamic=True, fullgraph=True, mode="reduce-overhead")


def compiled_next_tokens(model: Llama, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """`next_tokens` through torch.compile, on CUDA as one graph, for a fixed cache.longest."""
    for tensor in [cache.lengths, *cache.keys, *cache.values]:
        torch._dynamo.mark_static_address(tensor)  # a CUDA graph must know where it stays
    torch.compiler.cudagraph_mark_step_begin()
    return compile_once()(model, tokens, cache).clone()  # the next run overwrites its output
