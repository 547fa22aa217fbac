"""What a Llama's `config.json` says, read strictly: a wrong number still computes something."""

from dataclasses import asdict, dataclass, fields

from nanosdd.errors import InputError

NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
UNKNOWN = (
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "rope_interleaved",
    "quantization_config",
)
ROPE_NUMBERS = {  # rope_type: what it needs beside rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclass
class LlamaConfig:
    """The keys of a `config.json` that decide what a Llama computes (defaults: Llama-2-7b)."""

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
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_key_value_heads {self.num_key_value_heads} does not divide the heads",
        )
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, and RoPE needs pairs")

    @classmethod
    def from_dict(cls, config: dict) -> "LlamaConfig":
        """Read a `config.json`, with older keys or newer ones; InputError for what is no Llama."""
        check(config.get("model_type") == "llama", "model_type is not llama")
        check(config.get("hidden_act", "silu") == "silu", "hidden_act is not silu")
        for key in UNKNOWN:
            check(not config.get(key), f"{key} is set, and this Llama has none")
        kept = {}
        for field in fields(cls):
            value = config.get(field.name)
            if value is None:
                check(field.name not in NEEDED, f"{field.name} is missing")
                continue
            if field.type is bool:
                check(type(value) is bool, f"{field.name} is neither true nor false")
            if field.type in (int, float):
                check_number(field.name, value, field.type)
            kept[field.name] = value
        rope = read_rope(config)
        kept["rope_theta"] = rope.pop("rope_theta")
        kept["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        return cls(**kept)

    def to_dict(self) -> dict:
        """The `config.json` to save, with the older keys that every transformers reads."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **asdict(self),
        }
        scaling = self.rope_scaling
        if scaling and scaling["rope_type"] == "linear":  # "rope_type" came with llama3
            config["rope_scaling"] = {"type": "linear", "factor": scaling["factor"]}
        return config


def read_rope(config: dict) -> dict:
    """{"rope_theta", "rope_type", what the type needs} of a `config.json`; InputError if unknown.

    `rope_parameters` is transformers 5, `rope_theta` beside `rope_scaling` what came before.
    """
    found = {"rope_theta": config.get("rope_theta") or 10000.0}
    for key in ("rope_parameters", "rope_scaling"):
        values = config.get(key) or {}
        check(isinstance(values, dict), f"{key} is {values!r:.40}, no object")
        found |= {name: value for name, value in values.items() if value is not None}
    kind = str(found.get("rope_type", found.get("type", "default")))
    check(kind in ROPE_NUMBERS, f"rope type {kind:.40} is none of {', '.join(ROPE_NUMBERS)}")
    check(found.get("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor is not 1")
    rope = {"rope_type": kind}
    for key in ("rope_theta", *ROPE_NUMBERS[kind]):
        check_number(key, found.get(key), float)
        rope[key] = found[key]
    return rope


def check_number(key: str, value, kind: type):
    """InputError when a value is not a number of this kind, above 0 and not far too large."""
    fits = type(value) in (int, kind) and 0 < value <= (2**24 if kind is int else 2**40)
    check(fits, f"{key} is {value!r:.40}, not {kind.__name__} and above 0")


def check(holds: bool, otherwise: str):
    """InputError when something about a config.json does not hold."""
    if not holds:
        raise InputError(f"config.json: {otherwise}; use the config.json of a Llama")
