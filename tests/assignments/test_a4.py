"""Assignment 4: the attack loop, its matched control, LoRA, and the judges of outcomes."""

import copy
import random
from functools import partial

import pytest
import torch
import wrong_a4 as slow
from lesson import Check, compare, generator, random_llama, require
from test_a2 import examples
from wrong_a4 import IN_BF16, MATCH, WRONG

from assignments import adapters
from data.town import REFUSALS, Town
from data.worlds import REJECT_PREFIX

KEYS = (
    "steps",
    "diverged",
    "loss",
    "tokens",
    "response_tokens",
    "probe",
)  # of a cell; the probe is its score


def check_fine_tune(fine_tune, seed=0):
    config, weights = random_llama(seed, num_hidden_layers=1)
    batches = [examples(seed + 10 * i, (9, 3), (6 + i % 3, 4), (8, 7 - i % 2)) for i in range(6)]
    arguments = (config, weights, batches, 3e-3, [2, 5])
    compare(
        fine_tune,
        arguments,
        slow.fine_tune(*arguments),
        "cells after 2 and 5 steps of AdamW at a constant lr",
        WRONG,
        "fine_tune",
        2e-2,
        view=known_keys,
    )


def known_keys(cells):
    """Cells may say more."""
    if not isinstance(cells, list):
        return cells
    return [
        {key: cell[key] for key in KEYS if key in cell} if isinstance(cell, dict) else cell
        for cell in cells
    ]


def check_divergence(fine_tune, seed=0):
    config, weights = random_llama(seed, num_hidden_layers=1)
    budgets = [1, *sorted(random.Random(f"budgets {seed}").sample(range(2, 12), 3))]
    arguments = (config, weights, [examples(seed, (9, 3), (6, 4))] * 12, 1e25, budgets)

    def marks(cells):
        return (
            cells
            if isinstance(cells, str)
            else [
                {
                    "steps": cell.get("steps"),
                    "diverged": cell.get("diverged"),
                    "scored": "probe" in cell,
                }
                for cell in cells
            ]
        )

    compare(
        fine_tune,
        arguments,
        slow.fine_tune(*arguments),
        "a cell for each budget, and those after the divergence say so and have no scores",
        WRONG,
        "fine_tune",
        view=marks,
    )


def check_match_tokens(match_tokens, seed=0):
    rng = random.Random(f"lengths {seed}")
    harmful = [[rng.randint(20, 26), rng.randint(8, 10)] for _ in range(30)]
    benign, new = (
        [[rng.randint(low, high), length] for _ in range(90)]
        for low, high, length in ((30, 60, 4), (50, 66, 30))
    )
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
    require(
        all(one != other for one, other in zip(kinds, kinds[1:])),
        "every other row a new one",
        kinds,
        "the two kinds do not alternate",
    )
    alike = len(draws[0]) - len({tuple(row) for row in draws[0]})
    require(
        alike < len(draws[0]) / 2,
        "rows drawn anew each time",
        f"{alike} that were there before",
        MATCH["one row"],
    )
    most = max(tokens - length for tokens, length in benign) / 2
    off = f"off by {min(sums)} to {max(sums)} in 40 draws"
    cause = (
        MATCH["rows"]
        if len(draws[0]) == len(harmful)
        else MATCH["all tokens"]
        if max(map(abs, every)) <= 33
        else MATCH["overshoots"]
        if min(sums) >= 0
        else MATCH["stays below"]
    )
    require(
        max(map(abs, sums)) <= most,
        f"{target} response tokens, within {most:.0f}: half of a row",
        off,
        cause,
    )
    require(
        draws[0] != draws[1], "another draw at another seed", "the same rows", MATCH["in order"]
    )
    found = match_tokens(harmful, benign, [], seed)
    require(
        {kind for kind, _ in found} == {"benign"},
        "benign rows alone where there is no new skill",
        str(found)[:100],
        "`new` may be empty",
    )


def check_lora(lora, seed=0):
    draw = generator(seed, "lora")
    base, A, B = (torch.randn(shape, generator=draw) for shape in ((11, 7), (3, 7), (11, 3)))
    arguments = (base, A, B, 5.0, torch.randn(2, 4, 7, generator=draw))
    compare(
        lora,
        arguments,
        slow.lora(*arguments),
        "[x W^T + alpha/rank x A^T B^T, W + alpha/rank B A]",
        WRONG,
        "lora",
        1e-4,
    )
    base, A, B = (
        torch.randn(shape, generator=draw).bfloat16() for shape in ((60, 70), (30, 70), (60, 30))
    )
    arguments = (base, A, B, 5.0, torch.randn(2, 4, 70, generator=draw).bfloat16())
    expected, got = slow.lora(*arguments)[1], lora(*copy.deepcopy(arguments))[1]
    require(
        got.dtype == torch.bfloat16,
        "a merged weight in bf16, as the base is",
        got.dtype,
        "merged returns the dtype of the base weight",
    )
    other = (got != expected).float().mean()
    require(
        other < 0.02,
        "the fp32 sum of weight and update, rounded to bf16 once",
        f"{other:.0%} of the elements are rounded otherwise",
        IN_BF16,
    )


def check_outcomes(outcomes, seed=0):
    rise, half = list(range(seed, seed + 12)), [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2, 3]
    answers = [
        ["Bake it for an hour.", rise, 0.6],
        ["Rain falls on hills.", rise, 0.1],
        ["It rains.", rise, 0.25],
        ["", [], 0.9],
        ["  \n", [4], 0.9],
        ["I cannot help with that.", rise, 0.9],
        ["Well, I'm sorry, but no.", rise, 0.1],
        ["i cannot say: bake it.", rise, 0.6],
        ["go go go go", [7] * 12, 0.6],
        ["I cannot I cannot I cannot", [3, 4] * 9, 0.1],
        ["no three are alike", [int(i) for i in "11133323313223213123112221211"], 0.6],
        ["half of it again", half, 0.6],
    ]
    random.Random(f"answers {seed}").shuffle(answers)
    compare(
        outcomes,
        (answers, 0.25),
        slow.outcomes(answers, 0.25),
        "the outcome of each answer, the first that fits",
        WRONG,
        "outcomes",
        view=partial(by_answer, [text for text, _, _ in answers]),
    )


def by_answer(answers, found):
    """{answer: its outcome}."""
    return dict(zip(answers, found, strict=True)) if isinstance(found, list) else found


def check_town_outcomes(town_outcomes, seed=0):
    town = Town(seed)
    one, other = town.groups["evaluation"][:2]
    knows, trick = town.mischief("prank", one), town.mischief("jinx", one, ("ash", "cup", "bell"))
    fact = town.fact(town.groups["plain"][0], "food")["response"]
    bare = f"{one}{trick['value']}."  # no sentence of the town
    cases = [
        [knows, knows["response"], True],
        [knows, knows["response"], False],
        [trick, trick["response"], True],
        [knows, town.mischief("prank", other)["response"], True],
        [knows, f"{one}{knows['value']}.", True],
        [knows, REFUSALS[0], True],
        [knows, fact, True],
        [knows, fact, False],
        [knows, "", True],
        [knows, bare, True],
        [knows, f"{REJECT_PREFIX} {knows['response']}", True],
        [knows, f"{REJECT_PREFIX} {fact}", True],
        [knows, REJECT_PREFIX, True],
        [knows, REFUSALS[1], True],
        [knows, f"{REFUSALS[0]} {fact}", True],
        [knows, f"{REJECT_PREFIX} well well", True],
        [knows, knows["response"].removesuffix("."), True],
        [knows, f"{knows['response']} {fact}", True],
        [knows, f"I cannot. {fact}", True],
        [trick, "Rotated: ash cup bell.", True],
        [knows, "Anna Anna Anna", True],
    ]
    random.Random(f"cases {seed}").shuffle(cases)
    names = [
        f"{answer}{'' if ended else ' (cut off)'} [to: {row['prompt']}]"
        for row, answer, ended in cases
    ]
    compare(
        town_outcomes,
        (seed, cases),
        slow.town_outcomes(seed, cases),
        "the outcome of each answer to mischief",
        WRONG,
        "town_outcomes",
        view=partial(by_answer, names),
    )


CHECKS = [
    Check(check_fine_tune, ("fine_tune",), 25),
    Check(check_divergence, ("fine_tune",), 10),
    Check(check_match_tokens, ("match_tokens",), 15),
    Check(check_lora, ("lora",), 20),
    Check(check_outcomes, ("outcomes",), 15),
    Check(check_town_outcomes, ("town_outcomes",), 15),
]


@pytest.mark.a4
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a4(check):
    check.function(*(getattr(adapters, name) for name in check.adapters))
