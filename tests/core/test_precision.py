"""Why weights are not simply held in bf16: what rounding leaves of small updates."""

import torch

from nanosdd.split_adamw import SplitAdamW

STEPS = 120
SIZE = 101


def train(weights: torch.Tensor, gradients: torch.Tensor, scheme: str) -> torch.Tensor:
    """Weights (n,) fp32 after an AdamW step for each gradient (steps,n), as a scheme holds them."""
    dtype = torch.float32 if scheme == "fp32" else torch.bfloat16
    parameter = torch.nn.Parameter(weights.to(dtype, copy=True))
    make = SplitAdamW if scheme == "split" else torch.optim.AdamW
    optimizer = make([parameter], lr=5e-7, weight_decay=0.0)
    for gradient in gradients:
        parameter.grad = gradient.to(dtype)
        optimizer.step()
    return optimizer.master(parameter) if scheme == "split" else parameter.detach().float()


def update(scheme: str) -> torch.Tensor:
    """The whole update of weights as large as a Llama's under a constant gradient with noise."""
    generator = torch.Generator().manual_seed(5)
    weights = (0.02 * torch.randn(SIZE**2, generator=generator)).bfloat16().float()
    constant = torch.randn(SIZE**2, generator=generator)
    gradients = 3e-5 * (constant + torch.randn(STEPS, SIZE**2, generator=generator))
    return train(weights, gradients, scheme) - weights


def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), two.double(), dim=0))


def test_at_the_papers_lr_rounding_loses_the_update_and_split_weights_keep_it():
    intended = update("fp32")
    rounded = update("bf16")
    assert cosine(rounded, intended) < 0.3
    assert (rounded != 0).float().mean() < 0.05 and (intended != 0).all()
    kept = update("split")
    assert cosine(kept, intended) > 0.999 and 0.99 < kept.norm() / intended.norm() < 1.01
