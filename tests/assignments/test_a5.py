"""Assignment 5: bf16 weights, the update that vanishes, and split weights that keep it."""

import pytest
import torch
import wrong_a5 as slow
from lesson import Check, compare, generator, require
from wrong_a5 import CAUSES

from assignments import adapters


def numbers(seed: int) -> torch.Tensor:
    """fp32 numbers of many sizes, and hard ones: ties, the edges of a binade, signed zeros."""
    draw = generator(seed, "numbers")
    x = torch.randn(4000, generator=draw) * 2.0 ** torch.randint(-30, 30, (4000,), generator=draw)
    ties = ((x[:200].view(torch.int32) >> 16 << 16) + 2**15).view(torch.float32)
    return torch.cat([x, ties, -ties, torch.tensor([0.0, -0.0, 1.0, 1.9999999, 1.5e-45, 3.0e38])])


def check_split(split, seed=0):
    x = numbers(seed)
    what = "[the nearest bf16, ties away from zero; the 16 bits between the two]"
    compare(split, (x,), what, slow, "split")


def check_join(join, seed=0):
    x = numbers(seed)
    what = "the fp32 number that was split"
    compare(join, tuple(slow.split(x)), what, slow, "join")


def check_round_stochastically(round_stochastically, seed=0):
    causes = CAUSES[slow.round_stochastically]
    x = numbers(seed)[:200]

    def draw(i):
        return round_stochastically(x, 500 * seed + i).float()

    below = slow.round_stochastically(x, 0, "cut").float()
    above = (below.view(torch.int32) + 2**16).view(torch.float32)
    draws = torch.stack([draw(i) for i in range(300)])
    neighbours = (draws == below) | (draws == above)
    what = "one of the two neighbours of a number"
    require(neighbours.all(), what, "another number", causes["twice"])
    again = torch.equal(draws[0], draw(0))
    require(again, "the same from the same generator", "another draw", causes["seed"])
    ups = (draws == above).float()  # (300, 200)
    share = ups.mean(0)
    true = (x - below) / (above - below)
    cause = "coin"
    if (share + true - 1).abs().mean() < 0.06:
        cause = "reversed"
    if share[true < 0.45].max() == 0:
        cause = "few bits"
    if ups.std(0).max() == 0:
        cause = "nearest" if ups.any() else "cut"
    off = (share - true).abs().mean()
    what = "the upper neighbour as often as the number is near to it"
    require(off < 0.06, what, f"off by {off:.2f} on average", causes[cause])
    what = "a draw of its own for each element"
    require(ups.mean(1).std() < 0.1, what, "all rise or fall together", causes["one draw"])


def masters(found):
    return found[0]


def check_adamw(adamw, seed=0):
    draw = generator(seed, "adamw")
    values = torch.randn(300, generator=draw).bfloat16()
    sign = torch.randn(300, generator=draw).sign()
    power = 2.0 ** torch.randint(-8, 2, (300,), generator=draw) * sign
    quarter = float(power.double().norm()) / 4  # a gradient scaled by 1/4 stays exact
    # With betas of 1/2 and powers of two bf16 holds both moments exactly.
    for what, decay, max_norm in (("weight decay", 0.1, None), ("clipped gradients", 0.0, quarter)):
        grads = [power.bfloat16()] * 5
        arguments = (values, grads, 3e-3, [0.5, 0.5], 1e-3, decay, max_norm)
        what = f"[fp32 master, bf16 weights] after 5 steps of AdamW, {what}"
        compare(adamw, arguments, what, slow, "adamw", 3e-6, view=masters)


def check_movement(adamw, seed=0):
    """How far weights move, which shows a second moment that cannot fall, and lost updates."""
    draw = generator(seed, "movement")
    values = (0.02 * torch.randn(3000, generator=draw)).bfloat16()
    one = torch.ones(3000).bfloat16()
    falling = [one] * 50 + [one / 10] * 350
    constant = [one] * (70 + int(torch.randint(80, (), generator=draw)))
    for grads, lr, betas, atol in (
        (falling, 1e-3, [0.9, 0.999], 2.0),
        (constant, 5e-7, [0.5, 0.5], 5e-3),
    ):
        arguments = (values, grads, lr, betas, 1e-12, 0.0)

        def moved(found, lr=lr):
            master, weights = found
            steps = (master - values.float()).abs().mean() / lr
            return [float(steps), float((weights != values).float().mean())]

        what = f"[movement / lr, share of bf16 weights that show it] after {len(grads)} steps"
        compare(adamw, arguments, what, slow, "adamw", atol, moved)


CHECKS = [
    Check(check_split, "split", 20),
    Check(check_join, "join", 15),
    Check(check_round_stochastically, "round_stochastically", 20),
    Check(check_adamw, "adamw", 25),
    Check(check_movement, "adamw", 20),
]


@pytest.mark.a5
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a5(check):
    check.run(adapters)
