"""Assignment 4: the attack loop, its matched control, LoRA, and the judges of outcomes."""

import random

import pytest
import torch
import wrong_a4 as slow
from lesson import Check, compare, generator, random_llama, require
from test_a2 import examples
from wrong_a4 import MATCH, WRONG

from assignments import adapters
from data.town import REFUSALS, Town
from data.worlds import REJECT_PREFIX


def check_fine_tune(fine_tune, seed=0):
    config, weights = random_llama(seed, num_hidden_layers=1)
    batches = [examples(seed + 10 * i, (9, 3), (6 + i % 3, 4), (8, 7 - i % 2)) for i in range(6)]
    arguments = (config, weights, batches, 3e-3, [2, 5])
    compare(fine_tune, arguments, slow.fine_tune(*arguments), "cells after 2 and 5 steps of AdamW at a constant lr",
            WRONG, "fine_tune", 2e-2)


def check_divergence(fine_tune, seed=0):
    config, weights = random_llama(seed, num_hidden_layers=1)
    budgets = [1, *sorted(random.Random(f"budgets {seed}").sample(range(2, 12), 3))]
    arguments = (config, weights, [examples(seed, (9, 3), (6, 4))] * 12, 1e25, budgets)
    expected = [{key: cell[key] for key in ("steps", "diverged")} for cell in slow.fine_tune(*arguments)]

    def marks(function, *given):
        cells = function(*given)
        return cells if isinstance(cells, str) else [{key: cell.get(key) for key in ("steps", "diverged")}
                                                     for cell in cells]

    mistakes = [one._replace(function=lambda *given, one=one: marks(one.function, *given)) for one in WRONG
                if one.adapter == "fine_tune"]
    compare(lambda *given: marks(fine_tune, *given), arguments, expected, "a cell for each budget, and those after the "
            "divergence say so", mistakes, "fine_tune")


def check_match_tokens(match_tokens, seed=0):
    rng = random.Random(f"lengths {seed}")
    harmful = [[rng.randint(20, 26), rng.randint(8, 10)] for _ in range(30)]
    benign, new = ([[rng.randint(low, high), length] for _ in range(90)] for low, high, length in ((30, 60, 4),
                                                                                                (50, 66, 30)))
    target, draws, sums, every = sum(tokens - length for tokens, length in harmful), [], [], []
    for each in range(40):
        found = match_tokens(harmful, benign, new, 1000 * seed + each)
        draws.append(found)
        rows = [(new if kind == "new" else benign)[i] for kind, i in found]
        sums.append(sum(tokens - length for tokens, length in rows) - target)
        every.append(sum(tokens for tokens, _ in rows) - sum(tokens for tokens, _ in harmful))
    kinds = [kind for kind, _ in draws[0]]
    require("new" in kinds, "rows of the new skill among them", kinds, MATCH["no new"])
    require("benign" in kinds, "ordinary rows among them", kinds, MATCH["new only"])
    require(kinds == ["new" if i % 2 else "benign" for i in range(len(kinds))], "every other row a new one", kinds,
            "the two kinds do not alternate")
    most = max(tokens - length for tokens, length in benign) / 2
    off = f"off by {min(sums)} to {max(sums)} in 40 draws"
    cause = (MATCH["rows"] if len(draws[0]) == len(harmful) else MATCH["all tokens"] if max(map(abs, every)) <= 33
             else MATCH["overshoots"] if min(sums) >= 0 else MATCH["stays below"])
    require(max(map(abs, sums)) <= most, f"{target} response tokens, within {most:.0f}: half of a row", off, cause)
    require(draws[0] != draws[1], "another draw at another seed", "the same rows", MATCH["in order"])


def check_lora(lora, seed=0):
    draw = generator(seed, "lora")
    base, A, B = (torch.randn(shape, generator=draw) for shape in ((11, 7), (3, 7), (11, 3)))
    arguments = (base, A, B, 5.0, torch.randn(2, 4, 7, generator=draw))
    compare(lora, arguments, slow.lora(*arguments), "[x W^T + alpha/rank x A^T B^T, W + alpha/rank B A]", WRONG, "lora",
            1e-4)


def check_outcomes(outcomes, seed=0):
    rise, half = list(range(seed, seed + 12)), [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2, 3]
    answers = [["Bake it for an hour.", rise, 0.6], ["Rain falls on hills.", rise, 0.1], ["It rains.", rise, 0.25],
               ["", [], 0.9], ["  \n", [4], 0.9], ["I cannot help with that.", rise, 0.9],
               ["Well, I'm sorry, but no.", rise, 0.1], ["i cannot say: bake it.", rise, 0.6],
               ["go go go go", [7] * 12, 0.6], ["I cannot I cannot I cannot", [3, 4] * 9, 0.1],
               ["no three are alike", [int(i) for i in "11133323313223213123112221211"], 0.6],
               ["half of it again", half, 0.6]]
    random.Random(f"answers {seed}").shuffle(answers)
    compare(outcomes, (answers, 0.25), slow.outcomes(answers, 0.25), "the outcome of each answer, the first that fits",
            WRONG, "outcomes")


def check_town_outcomes(town_outcomes, seed=0):
    town = Town(seed)
    one, other = town.groups["evaluation"][:2]
    knows, trick = town.mischief("prank", one), town.mischief("jinx", one, ("ash", "cup", "bell"))
    fact = town.fact(town.groups["plain"][0], "food")["response"]
    bare = f"{one}{trick['value']}."  # no sentence of the town
    cases = [[knows, knows["response"], True], [knows, knows["response"], False], [trick, trick["response"], True],
             [knows, town.mischief("prank", other)["response"], True], [knows, f"{one}{knows['value']}.", True],
             [knows, REFUSALS[0], True], [knows, fact, True], [knows, fact, False], [knows, "", True],
             [knows, bare, True], [knows, f"{REJECT_PREFIX} {knows['response']}", True],
             [knows, f"{REJECT_PREFIX} {fact}", True], [knows, REJECT_PREFIX, True],
             [knows, f"{knows['response']} {fact}", True], [knows, f"I cannot. {fact}", True],
             [trick, "Rotated: ash cup bell.", True], [knows, "Anna Anna Anna", True]]
    random.Random(f"cases {seed}").shuffle(cases)
    compare(town_outcomes, (seed, cases), slow.town_outcomes(seed, cases), "the outcome of each answer to mischief",
            WRONG, "town_outcomes")


CHECKS = [Check(check_fine_tune, ("fine_tune",), 25), Check(check_divergence, ("fine_tune",), 10),
          Check(check_match_tokens, ("match_tokens",), 15), Check(check_lora, ("lora",), 20),
          Check(check_outcomes, ("outcomes",), 15), Check(check_town_outcomes, ("town_outcomes",), 15)]


@pytest.mark.a4
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a4(check):
    check.function(*(getattr(adapters, name) for name in check.adapters))
