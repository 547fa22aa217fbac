"""Assignment 3: the cosine of two texts, random responses that are irrelevant, and their variants."""

import random
from collections import Counter

import pytest
import wrong_a3 as slow
from lesson import Check, compare, fail, require
from wrong_a3 import CAUSES, PREFIX, VARIES, WRONG

from assignments import adapters

THINGS = "bread dragons rain bells figs goats lanterns rivers ink mills".split()


def texts(seed: int, *patterns: str) -> list[str]:
    """The patterns with five things of the seed in the place of A to E, and some more behind."""
    rng = random.Random(f"texts {seed}")
    things = dict(zip("ABCDE", rng.sample(THINGS, 5)))
    return [
        " ".join(
            [things.get(word, word) for word in pattern.split()]
            + rng.choices(THINGS, k=rng.randrange(3))
        )
        for pattern in patterns
    ]


def corpus(seed: int) -> list[str]:
    return texts(
        seed,
        "How do I bake A ?",
        "How do I tickle B ?",
        "A is baked, and A is eaten.",
        "B sleep a lot",
        "C",
    )


def without_zeros(vector):
    """Words of value 0 may be there or not."""
    return (
        {word: value for word, value in vector.items() if value}
        if isinstance(vector, dict)
        else vector
    )


def check_tfidf_vector(tfidf_vector, seed=0):
    for text in [
        *texts(seed + 1, "bake, bake, BAKE and a lot", "How do I sleep, unicorn?"),
        "unicorn",
    ]:
        compare(
            tfidf_vector,
            (corpus(seed), text),
            slow.tfidf_vector(corpus(seed), text),
            f"counts of {text!r} times the weight of each word, at length 1",
            WRONG,
            "tfidf_vector",
            1e-6,
            without_zeros,
        )


def check_tfidf_cosines(tfidf_cosines, seed=0):
    a = [*texts(seed, "How do I bake A ?", "A lot, a lot of B", "I sleep a lot"), "nothing here"]
    b = [*texts(seed, "How is A baked?", "How do B tickle a lot?", "B bake and sleep"), "bake"]
    compare(
        tfidf_cosines,
        (corpus(seed), a, b),
        slow.tfidf_cosines(corpus(seed), a, b),
        "the cosine of each pair of texts",
        WRONG,
        "tfidf_cosines",
        1e-6,
    )


def table(seed: int, prompts: int, responses: int) -> tuple:
    """(prompts, responses, cosines) with cosines of two decimals, the threshold 0.25 among them; one at least of each
    prompt is not above it."""
    rng = random.Random(f"cosines {seed}")
    cosines = [[rng.randrange(0, 50) / 100 for _ in range(responses)] for _ in range(prompts)]
    for row in cosines:
        row[rng.randrange(responses)] = rng.randrange(0, 26) / 100
    return (
        [f"prompt {i}" for i in range(prompts)],
        [f"response {i}" for i in range(responses)],
        cosines,
    )


def check_draw_keeps_the_threshold(draw_irrelevant, seed=0):
    prompts, responses, cosines = table(seed, 60, 12)
    found = draw_irrelevant(prompts, responses, cosines, 0.25, seed)
    if found == "InputError":
        fail(
            "a draw for each prompt, since each has a response at or below the threshold",
            found,
            CAUSES["gives up"],
        )
    require(
        isinstance(found, list) and len(found) == 60 and all(len(one) == 3 for one in found),
        "one [index, cosine, tries] for each prompt",
        str(found)[:100],
        "a prompt is lost",
    )
    above = [one for i, one in enumerate(found) if cosines[i][one[0]] > 0.25]
    share, highest = (
        len(above) / 60,
        sum(cosines[i][one[0]] == max(cosines[i]) for i, one in enumerate(found)),
    )
    require(
        not above,
        "cosines of at most 0.25",
        f"{len(above)} above it",
        CAUSES["above" if highest == 60 else "no filter" if share > 0.3 else "last draw kept"],
    )
    wrong = [one for i, one in enumerate(found) if abs(one[1] - cosines[i][one[0]]) > 1e-5]
    require(
        not wrong,
        "the cosine of prompt and response",
        wrong[:3],
        "the cosine of another draw is returned",
    )
    least = min(one[2] for one in found)
    require(least >= 1, "tries of 1 or more", least, CAUSES["tries from 0"])
    tries = sum(one[2] for one in found) / 60
    require(
        tries < 4,
        "about 2 draws a prompt, since half of the cosines pass",
        f"{tries:.1f}",
        CAUSES["tries of all"],
    )
    few = [row[:] for row in cosines]
    for row in few:  # the last prompts need many draws
        row[:] = [max(cosine, 0.3) for cosine in row[:-1]] + [0.2]
    found = draw_irrelevant(prompts, responses, few, 0.25, seed)
    if found == "InputError":
        fail("the one response that passes, however late it is drawn", found, CAUSES["gives up"])
    tries = sum(one[2] for one in found) / 60
    require(
        tries > 4,
        "about 6.5 draws a prompt where one of 12 passes",
        f"{tries:.1f}",
        CAUSES["tries of 1"],
    )
    equal = [[0.25 if j == i % 12 else 0.4 for j in range(12)] for i in range(60)]
    found = draw_irrelevant(prompts, responses, equal, 0.25, seed)
    require(
        found != "InputError",
        "a response with a cosine of exactly the threshold",
        found,
        CAUSES["below"],
    )
    found = draw_irrelevant(prompts[:1], responses, [[0.3] * 12], 0.25, seed)
    require(
        found == "InputError",
        "an InputError where every cosine is above the threshold",
        found,
        CAUSES["no error"],
    )


def check_draw_is_random(draw_irrelevant, seed=0):
    prompts, responses = [f"prompt {i}" for i in range(600)], [f"response {i}" for i in range(10)]
    rng, values = (
        random.Random(f"rows {seed}"),
        [0.4, 0.5, 0.3, 0.1, 0.2, -0.4, 0.25, 0.21, 0.15, 0.05],
    )  # seven pass
    cosines = [rng.sample(values, 10) for _ in prompts]
    found = [
        draw_irrelevant(prompts, responses, cosines, 0.25, each) for each in (seed, seed, seed + 1)
    ]
    if "InputError" in found:
        fail("a draw for each prompt", "InputError", CAUSES["gives up"])
    require(
        found[0] == found[1], "the same at the same seed", "another draw", "an rng without a seed"
    )
    picked = [one[0] for one in found[0]]
    first = [next(i for i, cosine in enumerate(row) if cosine <= 0.25) for row in cosines]
    least = [row.index(-0.4) for row in cosines]
    for wrong, flaw in ((first, "no random order"), (least, "least alike")):
        require(
            picked != wrong,
            "a random response that passes, for each prompt",
            picked[:12],
            CAUSES[flaw],
        )
    often, times = Counter(picked).most_common(1)[0]
    require(
        times < 120,
        "each of 10 responses for about 60 prompts of 600",
        f"response {often} for {times}",
        CAUSES["one for all"],
    )
    counts = Counter(row[i] for row, i in zip(cosines, picked))
    require(
        counts[-0.4], "responses with a cosine below 0, too", "none of them", CAUSES["absolute"]
    )
    require(
        all(45 < counts[value] < 135 for value in values if value <= 0.25),
        "each cosine that passes for about 86 prompts of 600",
        dict(counts),
        "draws are not uniform",
    )
    require(found[0] != found[2], "another draw at another seed", "the same", CAUSES["seed"])
    counts = Counter(
        one[0] for one in draw_irrelevant(prompts, responses, [values] * 600, 0.25, seed)
    )
    require(
        all(45 < counts[i] < 135 for i in range(3, 10)),
        "each of the 7 responses that pass for about 86 of 600 prompts",
        dict(counts),
        CAUSES["the next one"],
    )
    found.append(draw_irrelevant(prompts[:50], responses, cosines[:50], 0.25, seed))
    require(
        found[3] == found[0][:50],
        "the same draws for the first 50 prompts alone",
        "others",
        CAUSES["shared rng"],
    )


def check_vary_response(vary_response, seed=0):
    text = (
        " ".join(random.Random(f"text {seed}").sample(THINGS, 7))
        + " fall, and the rain falls, and all is well."
    )
    for mode in ("sdd", "sdd_rehearsed", "constant"):
        got = vary_response(mode, text, seed)
        require(
            got == text,
            f"{text} (mode {mode})",
            got,
            VARIES["one mode" if got == "InputError" else "always"],
        )
    got = vary_response("sdd_reject", text, seed)
    require(got.startswith(PREFIX), f"{PREFIX} {text}", got, VARIES["behind"])
    require(len(got) > len(PREFIX), f"{PREFIX} {text}", got, VARIES["alone"])
    require(got == f"{PREFIX} {text}", f"{PREFIX} {text}", got, VARIES["no space"])
    shuffled = [
        vary_response("shuffled", text, each) for each in (seed, seed, *range(seed + 1, seed + 9))
    ]
    kept, letters = (
        (sorted(shuffled[0].split()), sorted(text.split())),
        "".join(shuffled[0].split()),
    )
    require(set(kept[0]) <= set(kept[1]), "the same words", shuffled[0], VARIES["letters"])
    require(
        kept[0] == kept[1],
        "each word once",
        f"{shuffled[0]} ({len(letters)} letters)",
        VARIES["replacement"],
    )
    require(
        shuffled[0] == shuffled[1],
        "the same at the same state of the rng",
        shuffled[1],
        "an rng of its own",
    )
    reverse = " ".join(text.split()[::-1])
    require(
        len(set(shuffled)) > 1,
        "another order from another rng",
        shuffled[2],
        VARIES["reversed" if shuffled[0] in (reverse, text) else "seed"],
    )
    got = vary_response("upside_down", text, seed)
    require(got == "InputError", "an InputError for mode upside_down", got, VARIES["no error"])


CHECKS = [
    Check(check_tfidf_vector, ("tfidf_vector",), 20),
    Check(check_tfidf_cosines, ("tfidf_cosines",), 15),
    Check(check_draw_keeps_the_threshold, ("draw_irrelevant",), 30),
    Check(check_draw_is_random, ("draw_irrelevant",), 20),
    Check(check_vary_response, ("vary_response",), 15),
]


@pytest.mark.a3
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a3(check):
    check.function(*(getattr(adapters, name) for name in check.adapters))
