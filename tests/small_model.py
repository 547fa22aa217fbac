"""A Llama small enough for tests."""

import torch
from lesson import SMALL

from model import Llama, LlamaConfig

LLAMA3_SCALING = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def small_config(**changes) -> LlamaConfig:
    """A Llama of 2 layers, 6 query heads on 2 key-value heads, in which no two sizes are equal."""
    return LlamaConfig(**SMALL | {"initializer_range": 0.15, "rope_theta": 1e4} | changes)


def small_model(seed=7, **changes) -> Llama:
    """A random Llama in fp32, ready to evaluate."""
    torch.manual_seed(seed)
    model = Llama(small_config(**changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # weights of 1 would hide a norm that forgets them
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def token_ids(*shape, seed: int) -> torch.Tensor:
    """Random token ids, the same for the same seed."""
    return torch.randint(0, 89, shape, generator=torch.Generator().manual_seed(seed))
