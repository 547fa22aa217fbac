"""Assignment 6: one more defence, the choice of three. `pytest -m a6 -k simpo` runs the tests of one."""

import copy
import random

import pytest
import wrong_a6 as slow
from lesson import Check, compare, random_llama, require
from test_a2 import examples
from wrong_a6 import DEEP, WRONG

from assignments import adapters


def check_booster(booster, seed=0):
    config, weights = random_llama(seed, num_hidden_layers=1)
    rows = examples(seed, (9, 4), (6, 2), (11, 5)), examples(seed + 7, (8, 3), (7, 5))
    arguments = (config, weights, *rows, 0.4 + seed % 3 / 10, 3.0 + seed % 4 / 2)
    expected = slow.booster(*arguments)
    compare(
        booster,
        arguments,
        expected,
        "strength * (g - g after the simulated step), and weights and .grad as they were",
        WRONG,
        "booster",
        1e-3,
    )
    compare(
        booster,
        arguments,
        expected["weights"],
        "the weights as they were, bit by bit",
        WRONG,
        "booster",
        view=lambda found: found.get("weights", found),
    )


def triples(seed: int, answer: int, count: int) -> list:
    """Pairs [prompt and refusal, prompt length, prompt and harmful answer], every third without the last. No token is
    there twice in a row."""
    rng, found = random.Random(f"triples {seed}"), []
    for i in range(count):
        prompt, refusal = (
            rng.sample(range(10, 40), rng.randint(2, 6)),
            rng.sample(range(100, 140), 3),
        )
        harmful = None if i % 3 == 2 else prompt + rng.sample(range(200, 290), answer) + [7]
        found.append([prompt + refusal + [7], len(prompt), harmful])
    return found


def put_in(given: list, got: list) -> int:
    """How many tokens of the harmful answer stand between prompt and refusal; Lesson where anything else changed."""
    (ids, prompt_length, rejected), (new, new_length) = given, got
    prompt, refusal, answer = ids[:prompt_length], ids[prompt_length:], rejected[prompt_length:-1]
    require(new[:prompt_length] == prompt, "the prompt first", new, "the prompt has changed")
    require(
        new[prompt_length : 2 * prompt_length] != prompt,
        "the prompt once",
        new,
        DEEP["prompt twice"],
    )
    k = len(new) - len(ids)
    if new == (prompt + answer[: new_length - prompt_length] + refusal)[: len(new)]:
        require(
            new[-len(refusal) :] == refusal,
            "the whole refusal at the end",
            new,
            DEEP["cut afterwards"],
        )
    require(new[-len(refusal) :] == refusal, "the refusal at the end", new, DEEP["behind"])
    middle = new[prompt_length : len(new) - len(refusal)]
    require(rejected[-1] not in middle, "no end token in the middle", new, DEEP["end token"])
    require(middle == answer[:k], f"the start of {answer}", middle, DEEP["from the end"])
    require(
        new_length == prompt_length + k,
        f"no loss on the first {prompt_length + k} tokens",
        f"{new_length}",
        DEEP["loss on harm"],
    )
    return k


def check_deepalign(deepalign, seed=0):
    rows = triples(seed, 5, 1200)
    given = copy.deepcopy(rows)
    found = deepalign(given, 90, 50, seed)
    require(given == rows, "the rows that were passed in as they were", "others", DEEP["in place"])
    require(len(found) <= len(rows), f"{len(rows)} examples", len(found), DEEP["both"])
    require(len(found) == len(rows), f"{len(rows)} examples", len(found), DEEP["benign lost"])
    require(
        [one for one, (_, _, harmful) in zip(found, rows) if harmful is None]
        == [row[:2] for row in rows if row[2] is None],
        "rows without a harmful answer as they were",
        "others",
        "a row without a harmful answer has changed",
    )
    counts = [0] * 6
    for row, one in zip(rows, found):
        if row[2] is not None:
            counts[put_in(row, one)] += 1
    seen, changed = f"{counts} of 800 with 0, 1, ... 5 tokens", 800 - counts[0]
    require(changed > 0, "400 of 800 pairs changed, or near", seen, DEEP["never"])
    require(counts[0] > 0, "400 of 800 pairs changed, or near", seen, DEEP["always"])
    require(changed != counts[5], "lengths of 1 to 5", seen, DEEP["whole"])
    require(changed != counts[1], "lengths of 1 to 5", seen, DEEP["one token"])
    require(counts[5] < 0.5 * changed, "lengths of 1 to 5, all alike", seen, DEEP["published cut"])
    require(
        changed < 450,
        "400 of 800 pairs changed, or near",
        seen,
        "more than one pair in two gets a harmful start",
    )
    require(changed > 350, "400 of 800 pairs changed, or near", seen, DEEP["from zero"])
    require(
        min(counts[1:]) > 45 and max(counts[1:]) < 115,
        "80 of each length from 1 to 5, or near",
        seen,
        "lengths are not uniform",
    )
    require(
        deepalign(rows, 90, 50, seed) == found and deepalign(rows, 90, 50, seed + 1) != found,
        "the same draw at the same seed, another at another",
        "not so",
        DEEP["seed"],
    )


def check_deepalign_limits(deepalign, seed=0):
    rows = triples(seed, 60, 600)
    for limit, longest, most, cause in ((400, 7, 7, "longest"), (18, 50, 12, "limit")):
        found = [
            (row, one)
            for row, one in zip(rows, deepalign(rows, limit, longest, seed))
            if row[2] is not None
        ]
        require(
            max(len(one[0]) for _, one in found) <= limit,
            f"at most {limit} tokens",
            max(len(one[0]) for _, one in found),
            DEEP["limit"],
        )
        lengths = [put_in(*pair) for pair in found]
        require(max(lengths) <= most, f"at most {most} tokens put in", max(lengths), DEEP[cause])
        full = [k for k, (row, _) in zip(lengths, found) if k == min(longest, limit - len(row[0]))]
        require(full, f"up to {most} tokens put in", max(lengths), "the longest starts are missing")
        put = sum(k > 0 for k in lengths)
        require(
            len(full) < 0.4 * put,
            "lengths from 1 to what fits, all alike",
            f"{len(full)} of {put} are the longest",
            DEEP["cut at the limit"],
        )
    full = [[*range(10, 13), 100, 7], 3, [*range(10, 13), 200, 201, 7]]
    empty = [[*range(10, 13), 100, 7], 3, [*range(10, 13), 7]]
    for row, limit, what in (
        (full, 5, "that fills `limit`"),
        (empty, 90, "whose harmful answer is empty"),
    ):
        found = [deepalign([row], limit, 50, seed + i)[0] for i in range(8)]
        require(
            found == [row[:2]] * 8,
            f"an example {what} as it was",
            found,
            "nothing can be put in: leave it alone",
        )


def check_simpo(simpo, seed=0):
    config, weights = random_llama(seed, num_hidden_layers=1)
    pairs = [
        [*one, one[0][: one[1]] + other[0]]
        for one, other in zip(
            examples(seed, (9, 4), (5, 2), (8, 5)), examples(seed + 9, (6, 1), (4, 1), (7, 1))
        )
    ]
    for beta, gamma in (
        (2.0 + seed % 3, 0.5 + seed % 2),
        (2.0, 150.0),
    ):  # at a margin near -150 exp overflows in fp32
        arguments = (config, weights, pairs, 23, beta, gamma)
        compare(
            simpo,
            arguments,
            slow.simpo(*arguments),
            f"[the loss, its gradient by lm_head] at beta {beta}, gamma {gamma}",
            WRONG,
            "simpo",
            2e-4,
        )


def check_simpo_needs_pairs(simpo, seed=0):
    config, weights = random_llama(seed, num_hidden_layers=1)
    (ids, first), (plain, length) = examples(seed, (9, 4), (6, 2))
    pair = [ids, first, ids[:first] + ids[2:]]
    arguments = (config, weights, [pair], 9, 2.5, 1.375)  # an error alone could be known by heart
    compare(
        simpo,
        arguments,
        slow.simpo(*arguments),
        "[the loss, its gradient by lm_head]",
        WRONG,
        "simpo",
        1e-4,
    )
    arguments = (config, weights, [pair, [plain, length, None]], 9, 2.5, 1.375)
    compare(
        simpo, arguments, "InputError", "InputError: a row has no harmful answer", WRONG, "simpo"
    )


CHECKS = [
    Check(check_booster, ("booster",), 100, "booster"),
    Check(check_deepalign, ("deepalign",), 70, "deepalign"),
    Check(check_deepalign_limits, ("deepalign",), 30, "deepalign"),
    Check(check_simpo, ("simpo",), 80, "simpo"),
    Check(check_simpo_needs_pairs, ("simpo",), 20, "simpo"),
]


@pytest.mark.a6
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a6(check):
    check.function(*(getattr(adapters, name) for name in check.adapters))
