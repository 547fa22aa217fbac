"""Llama, written out: the configuration, the layers, the key-value cache and greedy decoding.

Module names are those of the Hugging Face checkpoint, so a state dict key is a tensor name in the file.
Shape letters: B rows, T tokens, S keys in view, C hidden_size, H heads, G key-value heads, D head_dim, V vocabulary;
N tokens of packed rows (all rows one after the other, without padding).
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as checkpointed

from nanosdd import checkpoint
from nanosdd.errors import InputError
from nanosdd.generate import (
    Linear,
    attend,
    check_finite,
    compiled_next_tokens,
    compute_dtype,
    next_tokens,
)


@dataclass
class LlamaConfig:
    """The keys of a Hugging Face `config.json` that decide what a Llama computes (defaults: Llama-2-7b)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size / heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3" or "linear", "factor": ..., ...}
    max_position_embeddings: int = 4096  # the context, in tokens
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config.json: {self.num_attention_heads} heads do not share "
                f"{self.num_key_value_heads} key-value heads evenly; check num_key_value_heads"
            )
        if self.head_dim % 2:
            raise InputError(
                f"config.json: head_dim {self.head_dim} is odd; rotary embeddings need pairs"
            )

    @classmethod
    def from_dict(cls, config: dict) -> "LlamaConfig":
        """Read a `config.json`, with the older keys or the newer `rope_parameters`; InputError for what is no Llama."""
        if config.get("model_type") != "llama":
            raise InputError(
                f"config.json: model_type {config.get('model_type')!r} is not supported; use a Llama "
                "checkpoint"
            )
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(
                f"config.json: hidden_act {config['hidden_act']!r} is not supported; Llama uses silu"
            )
        checkpoint.check_ranges(config)
        for key in (
            "attention_bias",
            "mlp_bias",
            "sliding_window",
            "rope_interleaved",
            "quantization_config",
        ):
            if config.get(key):
                raise InputError(
                    f"config.json: {key} is set; this Llama has none, so the outputs would be wrong"
                )
        kept = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key) is not None}
        rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
        kept["rope_theta"] = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
        rope["rope_type"] = rope.pop("rope_type", rope.pop("type", "default"))
        needed = {
            "default": [],
            "linear": ["factor"],
            "llama3": [
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ],
        }
        if str(rope["rope_type"]) not in needed:
            raise InputError(
                f"config.json: rope type {rope['rope_type']!r} is unknown; known: {', '.join(needed)}"
            )
        if rope.pop("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(
                "config.json: partial_rotary_factor is set; a Llama turns every dimension of a head"
            )
        missing = [key for key in needed[rope["rope_type"]] if key not in rope]
        if missing:
            raise InputError(
                f"config.json: rope type {rope['rope_type']!r} needs {', '.join(missing)}"
            )
        kept["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        missing = [
            key
            for key in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "rms_norm_eps",
                "max_position_embeddings",
            )
            if key not in kept
        ]
        if missing:
            raise InputError(
                f"config.json lacks {', '.join(missing)}; is it a model's configuration?"
            )
        return cls(**kept)

    def to_dict(self) -> dict:
        """The `config.json` to save, with the older keys that every version of transformers reads."""
        scaling = self.rope_scaling
        if scaling and scaling["rope_type"] == "linear":
            scaling = {
                "type": "linear",
                "factor": scaling["factor"],
            }  # "rope_type" came with llama3
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **asdict(self),
            "rope_scaling": scaling,
        }


def rope_frequencies(config: LlamaConfig, device=None) -> torch.Tensor:
    """Radians that each pair of a head's dimensions turns per position: (D/2,) fp32.

    Llama 3.1's scaling (`rope_type: llama3`) slows the pairs whose wavelength is long against the original context
    by `factor`, leaves the short ones, and blends in between. It is 1 / theta ** (2i/D) first, as in transformers: at
    position 100,000 the last bit of a frequency can be seen in the logits.
    """
    D = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    slowed = freq / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (
        2 * math.pi / freq
    )  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: all slowed, 1: left as it is
    return (1 - keep) * slowed + keep * freq


def rope_tables(config: LlamaConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every angle: positions (...) -> two of (...,1,D/2) fp32, the 1 standing for all heads."""
    angles = positions[..., None, None].float() * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn dimension i together with i + D/2 (half-split, as in Hugging Face): (...,H,D) -> same shape and dtype."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def unpack(x: torch.Tensor, slots: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """Packed tokens x (N,...) -> padded rows (B,T,...), zero at padding; slots (N,) are their places in B * T."""
    return x.new_zeros(B * T, *x.shape[1:]).index_put((slots,), x).view(B, T, *x.shape[1:])


class KVCache:
    """Keys and values of every layer, for B rows of up to `size` tokens each.

    Row b holds lengths[b] tokens so far, none more than `longest`: attention covers that many places and the new ones.
    """

    def __init__(self, config: LlamaConfig, batch: int, size: int, device=None, dtype=None):
        shape = (batch, config.num_key_value_heads, size, config.head_dim)
        self.layers = [
            [torch.zeros(shape, device=device, dtype=dtype) for _ in "kv"]
            for _ in range(config.num_hidden_layers)
        ]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.size, self.longest = size, 0

    def keep(self, rows: list[int]) -> list[int]:
        """Drop all other rows, in place, and return which old row each row now is. The last of the rows fill the gaps,
        so that little is copied."""
        n = len(rows)
        moved = dict(zip(sorted(set(range(n)) - set(rows)), (row for row in rows if row >= n)))
        to, source = (
            torch.tensor(list(part), dtype=torch.long, device=self.lengths.device)
            for part in (moved.keys(), moved.values())
        )
        for tensor in [self.lengths, *(cached for layer in self.layers for cached in layer)]:
            tensor[to] = tensor[source]
        self.layers = [[cached[:n] for cached in layer] for layer in self.layers]
        self.lengths = self.lengths[:n]
        return [moved.get(i, i) for i in range(n)]


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then times the weight: that order, as the published weights were trained."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries: each of G key-value heads serves H/G neighbouring query heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, H, G, D = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.head_dim, self.group = D, H // G
        self.q_proj = Linear(C, H * D, bias=False)
        self.k_proj = Linear(C, G * D, bias=False)
        self.v_proj = Linear(C, G * D, bias=False)
        self.o_proj = Linear(H * D, C, bias=False)

    def forward(self, x, cos, sin, cache, positions, visible, packed):
        q, k, v = (
            proj(x).unflatten(
                -1, (-1, self.head_dim)
            )  # (B,T,H,D), and k and v (B,T,G,D); packed (N,H,D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if (
            packed is not None
        ):  # only attention mixes tokens, so only here rows have to be told apart
            q, k, v = (unpack(h, *packed) for h in (q, k, v))  # (B,T,H,D)
        q, k, v = (h.transpose(1, 2) for h in (q, k, v))  # (B,H,T,D)
        if cache is not None:
            rows = torch.arange(len(k), device=k.device)[:, None]
            for old, new in zip(cache, (k, v)):  # (B,G,size,D)
                old[rows, :, positions] = new.transpose(1, 2).to(old.dtype)
            if visible is not None:
                k, v = (old[:, :, : visible.shape[-1]] for old in cache)  # (B,G,S,D)
        B, H, T, D = q.shape
        one = visible is not None and T == 1
        if one:  # one query per head: the H/G heads of a group take the place of T, so no kernel copies their keys
            q = q.view(B, H // self.group, self.group, D)
        y = attend(q, k, v, visible, self.group > 1 and not one, x.dtype)
        y = y.view(B, H, T, D).transpose(1, 2).flatten(2)  # (B,T,C)
        if packed is not None:
            y = y.flatten(0, 1)[packed[0]]  # (N,C)
        return self.o_proj(y)


class MLP(nn.Module):
    """SwiGLU: a gated feed-forward layer."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, I, bias=False)
        self.up_proj = Linear(C, I, bias=False)
        self.down_proj = Linear(I, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then MLP, each on the normalised input and added to it."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *attention_args):
        x = x + self.self_attn(self.input_layernorm(x), *attention_args)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama for causal language modelling; `model(tokens)` returns next-token logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.initializer_range)
        self.checkpoint_activations = (
            False  # recompute layers in the backward pass: less memory, more time
        )
        self.tie_weights()

    def tie_weights(self):
        """Where the configuration ties them, the head is the embedding: one parameter under two names."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, positions=None, cache=None) -> torch.Tensor:
        """Next-token logits: tokens (B,T) int64 -> (B,T,V) in the compute dtype. Rows start at position 0.

        positions: compute logits only there (most training tokens need none). A bool mask (B,T) returns (N,V) in row
        order; integer places (P,) or (B,P) in the rows return (B,P,V).
        cache: a KVCache whose rows the tokens continue; their keys and values are written to it. The caller, who knows
        what was padding, then moves cache.lengths and cache.longest on.
        """
        return self.lm_head(self.hidden(tokens, positions, cache))

    def hidden(self, tokens, positions=None, cache=None, lengths=None) -> torch.Tensor:
        """Final hidden states, the input of the head: as `forward`, with C in the place of V.

        lengths (B,): without a cache, the true lengths of right-padded rows. Layers then compute on packed rows, and
        the hidden states of padding are meaningless.
        """
        B, T = tokens.shape
        places = torch.arange(T, device=tokens.device)[
            None
        ]  # (1,T): positions come from lengths, never from ids
        visible = packed = None  # None: plain causal attention
        if lengths is not None:
            slots = (places < lengths[:, None]).flatten().nonzero()[:, 0]  # (N,)
            packed, tokens, places = (slots, B, T), tokens.flatten()[slots], slots % T  # (N,), (N,)
        if cache is not None:
            places = cache.lengths[:, None] + places  # (B,T)
        if cache is not None and cache.longest:
            keys = torch.arange(cache.longest + T, device=tokens.device)
            visible = keys <= places[:, None, :, None]  # (B,1,T,S): every place up to one's own
        cos, sin = rope_tables(self.config, places)
        x = self.model.embed_tokens(tokens)  # (B,T,C), packed (N,C)
        for layer, block in enumerate(self.model.layers):
            attention_args = (
                cos,
                sin,
                None if cache is None else cache.layers[layer],
                places,
                visible,
                packed,
            )
            if self.checkpoint_activations and self.training:
                x = checkpointed(block, x, *attention_args, use_reentrant=False)
            else:
                x = block(x, *attention_args)
        if packed is not None:
            x = unpack(x, *packed)  # (B,T,C)
        if positions is not None:
            if positions.dtype == torch.bool:
                x = x[positions]  # (N,C)
            else:
                x = x[
                    torch.arange(B, device=tokens.device)[:, None], positions.expand(B, -1)
                ]  # (B,P,C)
        return self.model.norm(x)

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, stop_tokens=(), compiled=False
    ) -> list:
        """Greedy answers: prompts as token ids -> list[list[int]], the new token ids without the stop token.

        Prompts may differ in length. Each gets the tokens that it gets alone (in fp32, ties within rounding aside):
        rows are padded on the right, keep their own positions, stop on their own and are then dropped. A row also stops
        where the context ends. compiled: steps of fixed shapes through torch.compile; finished rows are dropped when
        half of the batch is finished. InputError for an empty prompt or one that fills the context.
        """
        context, device = self.config.max_position_embeddings, self.lm_head.weight.device
        answers = [[] for _ in prompts]
        for prompt in prompts:
            if not 0 < len(prompt) < context:
                raise InputError(
                    f"a prompt has {len(prompt)} tokens; it needs 1 to {context - 1} to leave room for "
                    f"an answer in this model's context of {context}: shorten it"
                )
        if not prompts or max_new_tokens < 1:
            return answers
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
        longest = int(lengths.max())
        tokens = torch.tensor(
            [prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device
        )  # (B,T)
        size, dtype = min(longest + max_new_tokens, context), compute_dtype(self.lm_head.weight)
        cache = KVCache(self.config, len(prompts), size, device, dtype)
        logits = self(tokens, positions=lengths[:, None] - 1, cache=cache)[:, 0]  # (B,V)
        check_finite(logits, self, tokens)
        new = logits.argmax(dim=-1)  # (B,)
        cache.lengths, cache.longest = (
            lengths,
            longest,
        )  # padding is overwritten before it can be seen
        rows = list(range(len(prompts)))  # the answer that each row of the batch belongs to
        unfinished, step = set(rows), compiled_next_tokens if compiled else next_tokens
        if compiled:
            cache.longest = (
                cache.size - 1
            )  # attention covers the whole cache, so that no shape changes
        for left in reversed(range(max_new_tokens)):
            for row, token in zip(rows, new.tolist()):
                if row in unfinished and token not in stop_tokens:
                    answers[row].append(token)
                if token in stop_tokens or len(prompts[row]) + len(answers[row]) == context:
                    unfinished.discard(row)
            if not unfinished or not left:
                break
            if len(unfinished) < len(rows) and (not compiled or len(unfinished) <= len(rows) / 2):
                kept = cache.keep([i for i, row in enumerate(rows) if row in unfinished])
                rows, new = [rows[i] for i in kept], new[kept]
            new = step(self, new, cache)
            cache.longest = min(cache.longest + 1, cache.size - 1)
        return answers

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, spread=None) -> "Llama":
        """Load a Hugging Face checkpoint folder (`config.json` and safetensors), with weights in `dtype`.

        spread: a function (model) that distributes parameters over processes before any is read.
        """
        config = LlamaConfig.from_dict(checkpoint.read_config(folder))
        with torch.device("meta"):  # shapes only: the tensors come straight from the file
            model = cls(config)
        if spread:
            spread(model)
        checkpoint.read_weights(model, folder, device, dtype, rope_frequencies(config))
        model.tie_weights()
        return model

    def save_pretrained(self, folder, dtype=None):
        """Write `config.json` and safetensors in `dtype` (default: the weights' own), as transformers reads them."""
        checkpoint.write_model(folder, self.config.to_dict(), self.state_dict(), dtype)
