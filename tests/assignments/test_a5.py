"""Assignment 5: bf16 weights, the update that vanishes, and split weights that keep it."""

import copy

import pytest
import torch
import wrong_a5 as slow
from lesson import Check, compare, generator, require
from wrong_a5 import MOMENTS, ROUNDS, WRONG

from assignments import adapters


def numbers(seed: int, n: int = 4000) -> torch.Tensor:
    """fp32 numbers of many sizes, and some that are hard: ties, the edges of a binade, signed zeros."""
    x = torch.randn(n, generator=generator(seed, "numbers"))
    x = x * 2.0 ** torch.randint(-30, 30, (n,), generator=generator(seed, "sizes"))
    ties = ((x[:200].view(torch.int32) >> 16 << 16) + 2**15).view(torch.float32)
    return torch.cat([x, ties, -ties, torch.tensor([0.0, -0.0, 1.0, 1.9999999, 1.5e-45, 3.0e38])])


def check_split(split, seed=0):
    x = numbers(seed)
    compare(
        split,
        (x,),
        slow.split(x),
        "[the nearest bf16, ties away from zero, its bits read as an integer here, and "
        "the 16 bits between the two]",
        WRONG,
        "split",
        view=lambda found: [as_bits(part) for part in found],
    )


def as_bits(tensor):
    """The bits of a float tensor as integers, for a message that can be read."""
    sizes = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
    return tensor.view(sizes[tensor.dtype]) if getattr(tensor, "dtype", None) in sizes else tensor


def check_join(join, seed=0):
    x = numbers(seed)
    compare(
        join,
        tuple(slow.split(x)),
        x,
        "the bits of the fp32 number that was split, read as an integer here",
        WRONG,
        "join",
        view=as_bits,
    )


def check_round_stochastically(round_stochastically, seed=0):
    x = numbers(seed, 200)[:200]
    below = torch.minimum(slow.round_stochastically(x, 0, "cut").float().abs(), x.abs())
    above = ((below.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    draws = torch.stack([round_stochastically(x, 500 * seed + i).float().abs() for i in range(300)])
    require(
        ((draws == below) | (draws == above) | (x.abs() == below)).all(),
        "one of the two neighbours of a number",
        "another number",
        ROUNDS["twice"],
    )
    again = round_stochastically(x, 500 * seed).float().abs()
    require(
        torch.equal(draws[0], again),
        "the same from the same generator",
        "another draw",
        ROUNDS["seed"],
    )
    ups = (draws == above).float()  # (300, 200)
    share, true = ups.mean(0), (x.abs() - below) / (above - below)
    if ups.std(0).max() == 0:
        require(
            False,
            "either neighbour, at random",
            "always the same one",
            ROUNDS["cut" if ups.sum() == 0 else "nearest"],
        )
    off = (share - true).abs().mean()
    cause = (
        "reversed"
        if (share + true - 1).abs().mean() < 0.06
        else "few bits"
        if share[true < 0.45].max() == 0
        else "coin"
    )
    require(
        off < 0.06,
        "the upper neighbour as often as the number is near to it",
        f"off by {off:.2f} on average",
        ROUNDS[cause],
    )
    require(
        ups.mean(1).std() < 0.1,
        "a draw of its own for each element",
        "all rise or fall together",
        ROUNDS["one draw"],
    )


def check_adamw(adamw, seed=0):
    draw = generator(seed, "adamw")
    values = torch.randn(300, generator=draw).bfloat16()
    power = (
        2.0 ** torch.randint(-8, 2, (300,), generator=draw)
        * torch.randn(300, generator=draw).sign()
    )
    for decay in (0.1, 0.0):  # with betas of 1/2 and powers of two bf16 holds both moments exactly
        arguments = (values, [power.bfloat16()] * 5, 3e-3, [0.5, 0.5], 1e-3, decay)
        compare(
            adamw,
            arguments,
            slow.adamw(*arguments),
            f"the fp32 master after 5 steps of AdamW, weight decay {decay}",
            WRONG,
            "adamw",
            3e-6,
        )
    quarter = float(power.double().norm()) / 4  # a gradient scaled by 1/4 stays exact
    arguments = (values, [power.bfloat16()] * 5, 3e-3, [0.5, 0.5], 1e-3, 0.0, quarter)
    compare(
        adamw,
        arguments,
        slow.adamw(*arguments),
        "the fp32 master after 5 steps with clipped gradients",
        WRONG,
        "adamw",
        3e-6,
    )


def check_second_moment(adamw, seed=0):
    """Gradients of 1 and then of 0.1: a second moment that cannot fall makes all later steps too short."""
    draw = generator(seed, "second moment")
    values = torch.randn(60, generator=draw).bfloat16()
    grads = [torch.full((60,), 1.0 if step < 50 else 0.1).bfloat16() for step in range(400)]
    arguments = (values, grads, 1e-3, [0.9, 0.999], 1e-8, 0.0)

    def moved(master):
        return (
            float((master - values.float()).abs().mean())
            if isinstance(master, torch.Tensor)
            else master
        )

    wanted, got = moved(slow.adamw(*arguments)), moved(adamw(*copy.deepcopy(arguments)))
    require(
        abs(got / wanted - 1) < 0.02,
        f"weights that move {wanted:.4f} on average in 400 steps",
        f"{got:.4f}",
        MOMENTS if 0.5 < got / wanted < 0.98 else "moments or their storage; see what adamw says",
    )


def check_drift(drift, seed=0):
    draw = generator(seed, "drift")
    values, grad = (
        (0.02 * torch.randn(3000, generator=draw)).bfloat16(),
        torch.ones(3000).bfloat16(),
    )
    steps = 70 + int(torch.randint(80, (), generator=draw))
    arguments = (values, grad, 5e-7, steps)
    compare(
        drift,
        arguments,
        slow.drift(*arguments),
        f"[{steps} steps of lr 5e-7, the share of bf16 weights that show it]",
        WRONG,
        "drift",
        5e-3,
    )


CHECKS = [
    Check(check_split, ("split",), 20),
    Check(check_join, ("join",), 15),
    Check(check_round_stochastically, ("round_stochastically",), 20),
    Check(check_adamw, ("adamw",), 25),
    Check(check_second_moment, ("adamw",), 10),
    Check(check_drift, ("drift",), 10),
]


@pytest.mark.a5
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a5(check):
    check.function(*(getattr(adapters, name) for name in check.adapters))
