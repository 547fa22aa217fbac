"""LoRA (Hu et al. 2021): train a low-rank update of every linear layer in the blocks, then add it.

    trainable = add_lora(model, rank=8, alpha=16, seed=0)
    ...                                                    # train; all other parameters are frozen
    merge_lora(model)                                      # a plain Llama again

Shape letters: R rank, I in_features, O out_features.
"""

import torch
import torch.nn as nn


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable update: x W^T + x A^T B^T * alpha / rank."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        # Drawn on the CPU, so that a seed means the same on every device.
        bound = base.in_features**-0.5
        A = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(base.weight))  # (R,I)
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))  # (O,R)

    def forward(self, x):
        update = x @ self.A.T @ self.B.T  # without the (O,I) product B A
        return self.base(x) + update * self.scale

    def merged(self) -> torch.Tensor:
        """W + B A * scale (O,I): summed in fp32, returned in the base weight's dtype."""
        W = self.base.weight
        update = self.B.float() @ self.A.float() * self.scale
        return (W.float() + update).to(W.dtype).detach()


def lora_layers(model) -> dict[str, LoRALinear]:
    """The LoRA layers of a model by name; empty without LoRA."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def add_lora(model, rank: int, alpha: float, seed: int) -> list[nn.Parameter]:
    """Wrap q, k, v, o, gate, up and down of every block, in place; returns all A and B.

    A (R,I) starts uniform in +-1/sqrt(I), B (O,R) at 0, so the model still computes exactly the
    same; all other parameters are frozen.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # not the global one
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                setattr(part, name, LoRALinear(layer, rank, alpha, generator))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge_lora(model):
    """Add every update to its weight, in place, and unfreeze all."""
    for name, layer in lora_layers(model).items():
        layer.base.weight.data = layer.merged()
        model.set_submodule(name, layer.base)
    model.requires_grad_(True)
