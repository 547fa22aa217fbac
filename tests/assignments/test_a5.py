"""Assignment 5: bf16 weights, the update that vanishes, and split weights that keep it."""

import pytest
import torch
import wrong_a5 as slow
from lesson import Check, compare, generator, require
from wrong_a5 import ROUNDS, WRONG

from assignments import adapters


def numbers(seed: int, n: int = 4000) -> torch.Tensor:
    """fp32 numbers of many sizes, and some that are hard: ties, the edges of a binade, signed zeros."""
    x = torch.randn(n, generator=generator(seed, "numbers"))
    x = x * 2.0 ** torch.randint(-30, 30, (n,), generator=generator(seed, "sizes"))
    ties = ((x[:200].view(torch.int32) >> 16 << 16) + 2**15).view(torch.float32)
    return torch.cat([x, ties, -ties, torch.tensor([0.0, -0.0, 1.0, 1.9999999, 1.5e-45, 3.0e38])])


def check_split(split, seed=0):
    x = numbers(seed)
    compare(split, (x,), slow.split(x), "[the nearest bf16, ties away from zero, and the 16 bits between the two]",
            WRONG, "split")


def check_join(join, seed=0):
    x = numbers(seed)
    compare(join, tuple(slow.split(x)), x, "the fp32 number that was split, bit by bit", WRONG, "join")


def check_round_stochastically(round_stochastically, seed=0):
    x = numbers(seed, 200)[:200]
    below = torch.minimum(slow.round_stochastically(x, 0, "cut").float().abs(), x.abs())
    above = ((below.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    draws = torch.stack([round_stochastically(x, 500 * seed + i).float().abs() for i in range(300)])
    require(((draws == below) | (draws == above) | (x.abs() == below)).all(), "one of the two neighbours of a number",
            "another number", ROUNDS["twice"])
    again = round_stochastically(x, 500 * seed).float().abs()
    require(torch.equal(draws[0], again), "the same from the same generator", "another draw", ROUNDS["seed"])
    ups = (draws == above).float()  # (300, 200)
    share, true = ups.mean(0), (x.abs() - below) / (above - below)
    if ups.std(0).max() == 0:
        require(False, "either neighbour, at random", "always the same one", ROUNDS[
            "cut" if ups.sum() == 0 else "nearest"])
    require((share - true).abs().mean() < 0.06, "the upper neighbour as often as the number is near to it",
            f"off by {(share - true).abs().mean():.2f} on average", ROUNDS["coin"])
    require(ups.mean(1).std() < 0.1, "a draw of its own for each element", "all rise or fall together",
            ROUNDS["one draw"])


def check_adamw(adamw, seed=0):
    draw = generator(seed, "adamw")
    values = torch.randn(300, generator=draw).bfloat16()
    power = 2.0 ** torch.randint(-8, 2, (300,), generator=draw) * torch.randn(300, generator=draw).sign()
    for decay in (0.1, 0.0):  # with betas of 1/2 and powers of two bf16 holds both moments exactly
        arguments = (values, [power.bfloat16()] * 5, 3e-3, [0.5, 0.5], 1e-3, decay)
        compare(adamw, arguments, slow.adamw(*arguments), "the fp32 master after 5 steps of AdamW, weight decay "
                f"{decay}", WRONG, "adamw", 3e-6)


def check_drift(drift, seed=0):
    draw = generator(seed, "drift")
    values, grad = (0.02 * torch.randn(3000, generator=draw)).bfloat16(), torch.ones(3000).bfloat16()
    steps = 70 + int(torch.randint(80, (), generator=draw))
    arguments = (values, grad, 5e-7, steps)
    compare(drift, arguments, slow.drift(*arguments), f"[{steps} steps of lr 5e-7, the share of bf16 weights that "
            "show it]", WRONG, "drift", 5e-3)


CHECKS = [Check(check_split, ("split",), 20), Check(check_join, ("join",), 15),
          Check(check_round_stochastically, ("round_stochastically",), 20), Check(check_adamw, ("adamw",), 30),
          Check(check_drift, ("drift",), 15)]


@pytest.mark.a5
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a5(check):
    check.function(*(getattr(adapters, name) for name in check.adapters))
