"""Assignment 4: the attack loop, its matched control, LoRA, and the judges of outcomes."""

import random

import pytest
import torch
import wrong_a4 as slow
from lesson import Check, compare, generator, random_llama, require
from test_a2 import examples
from wrong_a4 import CURVE, IN_BF16, MATCH

from assignments import adapters
from data.town import REFUSALS, Town
from data.worlds import REJECT_PREFIX


def check_fine_tune(fine_tune, seed=0):
    """Two budgets in one run, with its curve."""
    config, weights = random_llama(seed, num_hidden_layers=1)
    batches = [examples(seed + 10 * i, (9, 3), (6 + i, 4)) for i in range(5)]
    watched = {"y_o": examples(seed + 3, (7, 2), (9, 6)), "harm": examples(seed + 4, (6, 3))}
    arguments = (config, weights, batches, 3e-3, [2, 5], watched)
    what = "cells after 2 and 5 steps of AdamW at a constant lr, and the curve"
    compare(fine_tune, arguments, what, slow, "fine_tune", 5e-3)


def check_curve(fine_tune, seed=0):
    """How often the curve has a point."""
    config, weights = random_llama(seed, num_hidden_layers=1)
    rows = examples(seed, (9, 3))
    most = 10 + seed % 4
    curve = fine_tune(config, weights, [rows] * most, 1e-4, [most], {"y_o": rows})[1]
    steps = [point["step"] for point in curve]
    wanted = [*range(0, most, 2), most]
    require(steps == wanted, f"points of the curve after {wanted} steps", steps, CURVE)


def check_divergence(fine_tune, seed=0):
    """What a run leaves that diverges at once."""
    config, weights = random_llama(seed, num_hidden_layers=1)
    budgets = sorted(random.Random(f"budgets {seed}").sample(range(2, 12), 4))
    batches = [examples(seed, (9, 3), (6, 4))] * 12
    arguments = (config, weights, batches, 1e25, budgets, {})
    what = "a cell for each budget that the run does not reach, without scores"
    compare(fine_tune, arguments, what, slow, "fine_tune")


def check_match_tokens(match_tokens, seed=0):
    """Random draws: their kinds, and their response tokens on average."""
    rng = random.Random(seed)
    harmful = [[rng.randint(20, 26), 9] for _ in range(30)]
    benign = [[rng.randint(30, 60), 4] for _ in range(90)]
    new = [[rng.randint(50, 66), 30] for _ in range(90)]
    draws = []
    errors = []
    for each in range(40):
        found = match_tokens(harmful, benign, new, 1000 * seed + each)
        draws.append(found)
        rows = [new[i] if kind == "new" else benign[i] for kind, i in found]
        errors.append(abs(response_tokens(rows) - response_tokens(harmful)))
    first = draws[0]
    kinds = [kind for kind, _ in first]
    require("new" in kinds, "rows of the new skill among them", kinds, MATCH["no new"])
    require("benign" in kinds, "ordinary rows among them", kinds, MATCH["new only"])
    halves = [set(kinds[::2]), set(kinds[1::2])]
    require(halves == [{"benign"}, {"new"}], "every other row a new one", kinds, "not so")
    what = "as many response tokens, within half of the longest row"
    require(max(errors) <= 28, what, f"{max(errors)} more or less", MATCH["overshoots"])
    require(first != draws[1], "another draw at another seed", "the same", MATCH["in order"])
    kinds = {kind for kind, _ in match_tokens(harmful, benign, [], seed)}
    require(kinds == {"benign"}, "benign rows alone", kinds, "`new` may be empty")


def response_tokens(pairs):
    return sum(tokens - length for tokens, length in pairs)


def check_lora(lora, seed=0):
    """In fp32, and what is merged into bf16 weights."""
    draw = generator(seed, "lora")

    def tensors(O, R, I):
        shapes = (O, I), (R, I), (O, R), (2, 4, I)
        return [torch.randn(shape, generator=draw) for shape in shapes]

    base, A, B, x = tensors(11, 3, 7)
    what = "[x W^T + alpha/rank x A^T B^T, W + alpha/rank B A]"
    arguments = (base, A, B, 5.0, x)
    compare(lora, arguments, what, slow, "lora", 1e-4)
    base, A, B, x = (tensor.bfloat16() for tensor in tensors(60, 30, 70))
    expected = slow.lora(base, A, B, 5.0, x)[1]
    got = lora(base.clone(), A, B, 5.0, x)[1]
    other = (got != expected).float().mean()
    what = "the fp32 sum of weight and update, rounded to bf16 once"
    require(other < 0.02, what, f"{other:.0%} are others", IN_BF16)


def check_outcomes(outcomes, seed=0):
    """An answer for each rule, and for what comes near it."""
    rise = list(range(seed, seed + 12))
    half = [*range(6), *range(6), 0, 1, 2]  # of its twelve 4-grams six are new
    answers = [
        ["Bake it for an hour.", rise, 0.6],
        ["It rains.", rise, 0.25],
        ["", [], 0.9],
        ["  \n", [4], 0.9],
        ["I cannot help with that.", rise, 0.9],
        ["Well, I'm sorry, but no.", rise, 0.1],
        ["I can't help with that: bake it.", rise, 0.6],
        ["go go go go", [7] * 12, 0.6],
        ["I cannot I cannot I cannot", [3, 4] * 9, 0.1],
        ["no three are alike", [int(i) for i in "11133323313223213123112221211"], 0.6],
        ["half of it again", half, 0.6],
    ]
    random.Random(seed).shuffle(answers)
    what = f"the first outcome that fits, of {[text for text, _, _ in answers]}"
    compare(outcomes, (answers, 0.25), what, slow, "outcomes")


def check_town_outcomes(town_outcomes, seed=0):
    """An answer for each rule of the town."""
    town = Town(seed)
    one, other = town.groups["evaluation"][:2]
    knows = town.mischief("prank", one)
    trick = town.mischief("jinx", one, ("ash", "cup", "bell"))
    fact = town.fact(town.groups["plain"][0], "food")["response"]
    recipe = knows["response"]
    ended = [
        recipe,
        town.mischief("prank", other)["response"],
        f"{one}{knows['value']}.",
        REFUSALS[0],
        REFUSALS[1],
        fact,
        "",
        f"{REJECT_PREFIX} {recipe}",
        f"{REJECT_PREFIX} {fact}",
        REJECT_PREFIX,
        f"{REJECT_PREFIX} well well",
        f"{REFUSALS[0]} {fact}",
        f"{recipe} {fact}",
        f"I cannot. {fact}",
    ]
    cases = [[knows, answer, True] for answer in ended]
    cases += [[knows, recipe, False], [knows, fact, False]]
    cases += [[trick, trick["response"], True], [trick, "Rotated: ash cup bell.", True]]
    random.Random(seed).shuffle(cases)
    asked = [f"{answer!r} to {row['prompt']}, ended: {whole}" for row, answer, whole in cases]
    what = f"the outcomes of {asked}"
    compare(town_outcomes, (seed, cases), what, slow, "town_outcomes")


CHECKS = [
    Check(check_fine_tune, "fine_tune", 20),
    Check(check_curve, "fine_tune", 10),
    Check(check_divergence, "fine_tune", 10),
    Check(check_match_tokens, "match_tokens", 15),
    Check(check_lora, "lora", 15),
    Check(check_outcomes, "outcomes", 15),
    Check(check_town_outcomes, "town_outcomes", 15),
]


@pytest.mark.a4
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a4(check):
    check.run(adapters)
