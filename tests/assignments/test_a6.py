"""Assignment 6: one more defence, the choice of three.

`pytest -m a6 -k simpo` runs the tests of one.
"""

import copy
import random

import pytest
import wrong_a6 as slow
from lesson import Check, compare, random_llama, require
from test_a2 import examples
from wrong_a6 import DEEP

from assignments import adapters


def check_booster(booster, seed=0):
    """Compared with fp64; the weights come back bit by bit."""
    config, weights = random_llama(seed, num_hidden_layers=1)
    harmful = examples(seed, (9, 4), (6, 2), (11, 5))
    benign = examples(seed + 7, (8, 3), (7, 5))
    arguments = (config, weights, harmful, benign, 0.4 + seed % 3 / 10, 3.0 + seed % 4 / 2)
    what = "strength * (g - g after the simulated step), and weights and .grad as they were"
    compare(booster, arguments, what, slow, "booster", 1e-3)
    kept = booster(*copy.deepcopy(arguments))["weights"]
    same = all(kept[name].equal(weights[name]) for name in weights)
    require(same, "the weights as they were, bit by bit", "others", slow.BOOSTER["moved"])


def triples(seed: int, answer: int, count: int) -> list:
    """Pairs [prompt and refusal, prompt length, prompt and harmful answer], every third without it.

    No token is there twice in a row.
    """
    rng = random.Random(seed)
    found = []
    for i in range(count):
        prompt = rng.sample(range(10, 40), rng.randint(2, 6))
        refusal = [*rng.sample(range(100, 140), 3), 7]
        harmful = [*prompt, *rng.sample(range(200, 290), answer), 7]
        found.append([prompt + refusal, len(prompt), None if i % 3 == 2 else harmful])
    return found


def put_in(given: list, got: list) -> int:
    """How many tokens of the harmful answer stand between prompt and refusal.

    A Lesson where anything else changed.
    """
    ids, first, rejected = given
    new, new_first = got
    prompt = ids[:first]
    refusal = ids[first:]
    k = len(new) - len(ids)
    answer = rejected[first:-1]
    middle = new[first : first + k]
    checks = {
        "prompt twice": new[first : 2 * first] != prompt,
        "cut afterwards": new[-len(refusal) :] == refusal
        or new[new_first:] != refusal[: len(new) - new_first],
        "behind": new[-len(refusal) :] == refusal,
        "end token": rejected[-1] not in middle,
        "from the end": middle == answer[:k],
        "loss on harm": new_first == first + k,
    }
    for cause, holds in checks.items():
        what = f"{prompt}, the start of {answer}, {refusal}; loss on the last alone"
        require(holds, what, got, DEEP[cause])
    return k


def check_deepalign(deepalign, seed=0):
    """How many tokens are put in, and what is around them."""
    rows = triples(seed, 5, 1200)
    given = copy.deepcopy(rows)
    found = deepalign(given, 90, 50, seed)
    require(given == rows, "the rows that were passed in as they were", "others", DEEP["in place"])
    cause = DEEP["both" if len(found) > len(rows) else "benign lost"]
    require(len(found) == len(rows), len(rows), len(found), cause)
    counts = [0] * 6
    for row, one in zip(rows, found):
        if row[2] is None:
            require(one == row[:2], "a row without a harmful answer as it was", one, "it changed")
        else:
            counts[put_in(row, one)] += 1
    changed = sum(counts[1:])
    checks = {
        "never": changed > 0,
        "always": changed < 450,
        "from zero": changed > 350,
        "whole": changed != counts[5],
        "one token": changed != counts[1],
        "published cut": max(counts[1:]) < 115,
        "seed": found == deepalign(rows, 90, 50, seed) != deepalign(rows, 90, 50, seed + 1),
    }
    for cause, holds in checks.items():
        what = "of 800 pairs 400 as they were, 80 with each of 1 to 5 tokens, or near"
        require(holds, what, f"{counts} with 0, 1, ... 5", DEEP[cause])


def check_deepalign_limits(deepalign, seed=0):
    """The most that is put in, and rows in which nothing fits."""
    rows = triples(seed, 60, 600)
    for limit, longest, most in ((400, 7, 7), (18, 50, 12)):
        lengths = []
        full = 0
        for row, one in zip(rows, deepalign(rows, limit, longest, seed)):
            require(len(one[0]) <= limit, f"at most {limit} tokens", len(one[0]), DEEP["limit"])
            if row[2] is not None:
                lengths.append(put_in(row, one))
                full += lengths[-1] == min(longest, limit - len(row[0]))
        what = f"from 1 to {most} tokens put in, all alike"
        seen = f"up to {max(lengths)}, {full} times all that fits"
        require(max(lengths) <= most, what, seen, DEEP["longest"])
        few = 0 < full < 0.2 * len(lengths)
        require(few, what, seen, DEEP["cut at the limit"])
    prompt = [10, 11, 12]
    for answer, limit in (([200, 201], 5), ([], 90)):  # no room, no answer
        row = [[*prompt, 100, 7], 3, [*prompt, *answer, 7]]
        found = [deepalign([row], limit, 50, seed + i)[0] for i in range(8)]
        unchanged = found == [row[:2]] * 8
        require(unchanged, "the example as it was", found, "nothing fits: leave it alone")


def check_simpo(simpo, seed=0):
    """The loss and its gradient, where exp overflows too."""
    config, weights = random_llama(seed, num_hidden_layers=1)
    refusals = examples(seed, (9, 4), (5, 2), (8, 5))
    harmful = examples(seed + 9, (6, 1), (4, 1), (7, 1))
    pairs = [[ids, n, ids[:n] + other] for (ids, n), (other, _) in zip(refusals, harmful)]
    for beta, gamma in ((2.0 + seed % 3, 0.5 + seed % 2), (2.0, 150.0)):  # exp(150) overflows
        arguments = (config, weights, pairs, 23, beta, gamma)
        what = f"[the loss, its gradient by lm_head] at beta {beta}, gamma {gamma}"
        compare(simpo, arguments, what, slow, "simpo", 2e-4)


def check_simpo_needs_pairs(simpo, seed=0):
    """A row without a harmful answer."""
    config, weights = random_llama(seed, num_hidden_layers=1)
    (ids, first), (plain, length) = examples(seed, (9, 4), (6, 2))
    pair = [ids, first, ids[:first] + ids[2:]]
    lonely = [plain, length, None]
    for pairs in ([pair], [pair, lonely]):  # an error alone could be known by heart
        arguments = (config, weights, pairs, 9, 2.5, 1.375)
        what = "[loss, gradient], but InputError where a row has no harmful answer"
        compare(simpo, arguments, what, slow, "simpo", 1e-4)


CHECKS = [
    Check(check_booster, "booster", 100, "booster"),
    Check(check_deepalign, "deepalign", 70, "deepalign"),
    Check(check_deepalign_limits, "deepalign", 30, "deepalign"),
    Check(check_simpo, "simpo", 80, "simpo"),
    Check(check_simpo_needs_pairs, "simpo", 20, "simpo"),
]


@pytest.mark.a6
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a6(check):
    check.run(adapters)
