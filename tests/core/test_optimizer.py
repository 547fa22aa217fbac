"""SplitAdamW: its steps are those of fp32 AdamW. How a weight is split: assignment 5's tests."""

import pytest
import torch
from small import small_model

from nanosdd.device import Compute
from nanosdd.optimizer import clip_gradient, make_optimizer
from nanosdd.split_adamw import SplitAdamW, split


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


# ---- against torch.optim.AdamW in fp32 ----


def pair(values: torch.Tensor, **settings):
    """The same bf16 weights twice: fp32 parameter, torch's AdamW, bf16 parameter, ours.

    torch's plain loop, whose operations ours follows; the fused kernel differs in the last bits.
    """
    one = torch.nn.Parameter(values.bfloat16().float())
    two = torch.nn.Parameter(values.bfloat16())
    torch_adamw = torch.optim.AdamW([one], foreach=False, fused=False, **settings)
    return one, torch_adamw, two, SplitAdamW([two], **settings)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("lr", [5e-7, 1e-2])
def test_the_first_step_is_that_of_fp32_bit_by_bit(lr, weight_decay):
    settings = dict(lr=lr, weight_decay=weight_decay, eps=1e-6)
    one, torch_adamw, two, ours = pair(torch.randn(31, 17) * 0.02, **settings)
    assert torch.equal(ours.master(two), two.float())  # before the first step
    two.grad = (torch.randn_like(one) * 1e-4).bfloat16()
    one.grad = two.grad.float()
    torch_adamw.step()
    ours.step()
    assert torch.equal(bits(ours.master(two)), bits(one.detach()))
    assert torch.equal(two, split(one.detach())[0])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_eight_steps_bit_by_bit_where_bf16_holds_the_moments(weight_decay):
    """With betas of 1/2 and a gradient of +-2**k the moments are (1 - 2**-t) g and g**2: 8 bits."""
    settings = dict(lr=1.0, betas=(0.5, 0.5), weight_decay=weight_decay, eps=1e-12)
    one, torch_adamw, two, ours = pair(torch.randn(400), **settings)
    one.grad = 2.0 ** torch.randint(-20, 3, (400,)) * torch.randn(400).sign()
    two.grad = one.grad.bfloat16()
    for step in range(8):
        for optimizer in (torch_adamw, ours):
            optimizer.param_groups[0]["lr"] = 3e-4 * (step + 1)  # as train.py sets it
            optimizer.step()
        assert torch.equal(bits(ours.master(two)), bits(one.detach()))
    assert not torch.equal(ours.master(two), two.float())  # the low half holds something


def test_the_second_moment_decays_as_in_fp32():
    """1,000 constant gradients, then 2,000 zeros, at beta2 = 0.999: fp32 goes to 0.135 of where it
    was; rounded to nearest, bf16 would stay there. 5,000 weights in expectation within 1%, and one
    weight within 20% (rms)."""
    p = torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    ours = SplitAdamW([p], lr=1e-6)
    exact = 0.0
    for step in range(3000):
        p.grad = torch.full_like(p, 1e-3 if step < 1000 else 0.0)
        ours.step()
        exact = exact * 0.999 + 0.001 * p.grad[0].item() ** 2
        if step in (999, 2999):
            square = ours.state[p]["exp_avg_sq"].float()
            assert square.mean() == pytest.approx(exact, rel=1e-2)
    assert (square / exact - 1).square().mean().sqrt() < 0.2


# ---- clipping ----


@pytest.mark.parametrize("size", [1e-3, 30.0])  # below and above the limit
def test_clipping_is_that_of_torch(size):
    settings = dict(lr=1e-3, betas=(0.0, 0.0), eps=1.0)  # such a step shows a gradient's size
    one, torch_adamw, two, ours = pair(torch.randn(7, 30), weight_decay=0.0, **settings)
    two.grad = (size * torch.randn_like(one)).bfloat16()
    one.grad = two.grad.float()
    kept = two.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_([one], 1.0)
    assert clip_gradient(ours, 1.0) == pytest.approx(expected.item(), rel=1e-6)
    for _ in range(2):  # clipping holds for one step
        torch_adamw.step()
        ours.step()
        assert torch.equal(two.grad, kept)  # no gradient was rounded a second time
        torch.testing.assert_close(ours.master(two), one.detach(), rtol=1e-6, atol=1e-9)
        one.grad = two.grad.float()


def test_without_a_gradient_there_is_no_step():
    idle = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ours = SplitAdamW([idle], lr=1.0, weight_decay=0.5)
    assert clip_gradient(ours, 1.0) == 0
    ours.step()
    assert (idle == 1).all() and idle not in ours.state


def test_more_than_a_slice():
    p = torch.nn.Parameter(torch.zeros(5_000_000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.01)
    norm = p.grad[0].item() * 5_000_000**0.5
    ours = SplitAdamW([p], lr=1e-3)
    assert clip_gradient(ours, 1e9) == pytest.approx(norm, rel=1e-6)
    ours.step()
    assert ours.master(p).unique().tolist() == pytest.approx([-1e-3], rel=1e-5)
    held = [value for value in ours.state[p].values() if value.shape == p.shape]
    assert sum(value.nbytes for value in (p, *held)) == 8 * p.numel()


# ---- an optimizer like any other ----


@pytest.mark.parametrize(
    "dtype, kind", [(torch.float32, torch.optim.AdamW), (torch.bfloat16, SplitAdamW)]
)
def test_make_optimizer_trains_what_requires_gradients(dtype, kind):
    model = small_model().to(dtype)
    model.lm_head.requires_grad_(False)
    ours = make_optimizer(
        model, Compute(checkpoint_activations=True), betas=(0.8, 0.9), weight_decay=0.3
    )
    assert type(ours) is kind and model.training and model.checkpoint_activations
    (group,) = ours.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.model.parameters()}
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.0, (0.8, 0.9), 0.3)
