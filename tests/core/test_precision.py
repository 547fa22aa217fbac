"""Why weights are not simply held in bf16: what rounding leaves of small updates."""

import pytest
import torch

from nanosdd.split_adamw import SplitAdamW

STEPS, SIZE = 120, 101


def train(weights: torch.Tensor, gradients: torch.Tensor, lr: float, scheme: str) -> torch.Tensor:
    """Weights (n,) fp32 after an AdamW step for each gradient (steps,n), as a scheme holds them."""
    dtype = torch.float32 if scheme in ("fp32", "nearest") else torch.bfloat16
    parameter = torch.nn.Parameter(weights.to(dtype, copy=True))
    make = SplitAdamW if scheme == "split" else torch.optim.AdamW
    optimizer = make([parameter], lr=lr, weight_decay=0.0)
    for gradient in gradients:
        parameter.grad = gradient.to(dtype)
        optimizer.step()
        if scheme == "nearest":
            parameter.data = parameter.data.bfloat16().float()
    return optimizer.master(parameter) if scheme == "split" else parameter.detach().float()


def update(lr: float, scheme: str) -> torch.Tensor:
    """The whole update of weights as large as a Llama's under a constant gradient with noise."""
    generator = torch.Generator().manual_seed(5)
    weights = (0.02 * torch.randn(SIZE**2, generator=generator)).bfloat16().float()
    constant = torch.randn(SIZE**2, generator=generator)
    gradients = 3e-5 * (constant + torch.randn(STEPS, SIZE**2, generator=generator))
    return train(weights, gradients, lr, scheme) - weights


def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), two.double(), dim=0))


def test_at_the_papers_lr_rounding_loses_the_update_and_split_weights_keep_it():
    intended = update(5e-7, "fp32")
    for scheme in ("nearest", "bf16"):
        rounded = update(5e-7, scheme)
        assert cosine(rounded, intended) < 0.3
        assert (rounded != 0).float().mean() < 0.05 and (intended != 0).all()
    assert cosine(update(5e-7, "split"), intended) > 0.999


def test_a_large_lr_survives_in_every_scheme():
    intended = update(1e-2, "fp32")
    for scheme in ("nearest", "bf16", "split"):
        assert cosine(update(1e-2, scheme), intended) > 0.99


@pytest.mark.parametrize(
    "scheme, moved", [("fp32", 50e-4), ("nearest", 0.0), ("bf16", 0.0), ("split", 50e-4)]
)
def test_fifty_steps_below_half_the_distance_of_bf16_by_hand(scheme, moved):
    """From 1 the next bf16 number below is 1 - 1/256: steps of 1e-4 never arrive there."""
    end = train(torch.tensor([1.0, -1.0]), torch.tensor([0.3, -0.3]).expand(50, 2), 1e-4, scheme)
    assert end.tolist() == pytest.approx(
        [1 - moved, moved - 1], abs=1e-4
    )  # split: the second moment is rounded
