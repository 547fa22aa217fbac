"""The same numbers on a GPU as on the CPU; without a GPU, the CPU stands in for it, uncompiled."""

import random

import pytest
import torch
from small import small_model

from data.chat import Example
from nanosdd.device import Compute, resolve_compute
from nanosdd.optimizer import make_optimizer
from train import train_step

PROMPTS = [[4, 9, 1], [70, 3, 3, 8, 15, 2, 60], [5], [33, 2, 81, 7]]


@pytest.fixture
def device():
    """The Compute that the commands choose by themselves: on a GPU bf16 and compiled."""
    return resolve_compute("auto", "auto", None)


def batches():
    rng = random.Random(5)
    drawn = []
    for rows in (6, 1, 4, 7):
        lengths = [rng.randint(3, 40) for _ in range(rows)]
        drawn.append([Example([rng.randrange(89) for _ in range(n)], 2) for n in lengths])
    return drawn


def steps(compute: Compute):
    """Losses and gradient norms of four steps, and the change of all weights."""
    model = small_model()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = make_optimizer(model.to(compute.device), compute)
    done = [train_step(model, optimizer, batch, 1e-3, compute) for batch in batches()]
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach().cpu()
    return [step["loss"] for step in done], [step["grad_norm"] for step in done], after - before


def test_logits_in_fp32(device):
    tokens = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    model = small_model()
    with torch.no_grad():
        expected = model(tokens)
        found = model.to(device.device)(tokens.to(device.device)).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_training_as_the_commands_do_it(device):
    """bf16 has 8 bits: losses agree to a hundredth, and most weights move the same way."""
    losses, norms, change = steps(Compute())
    found_losses, found_norms, found_change = steps(device)
    assert found_losses == pytest.approx(losses, rel=2e-2)
    assert found_norms == pytest.approx(norms, rel=0.1)
    assert torch.cosine_similarity(change, found_change, dim=0) > 0.9


@pytest.mark.slow
def test_split_weights_on_the_device(device):
    compute = Compute(device.device, "bf16", device.compile, weights="bf16")
    model = small_model().to(compute.device, torch.bfloat16)
    optimizer = make_optimizer(model, compute)
    losses = [train_step(model, optimizer, batches()[0], 3e-3, compute)["loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1


def test_answers_on_the_device(device):
    expected = small_model().generate(PROMPTS, 12, {7})
    model = small_model().to(device.device)
    for compiled in {False, device.compile}:
        assert model.generate(PROMPTS, 12, {7}, compiled=compiled) == expected
