"""Assignment 3: the cosine of two texts, random responses that are irrelevant, and the modes."""

import random
from collections import Counter

import pytest
import wrong_a3 as slow
from lesson import Check, compare, require
from wrong_a3 import CAUSES, NEW_REFUSAL, PREFIX

from assignments import adapters

THINGS = "bread dragons rain bells figs goats lanterns rivers ink mills".split()


def texts(seed: int, *patterns: str) -> list[str]:
    """The patterns with things of the seed in the place of A, B and C."""
    things = random.Random(f"texts {seed}").sample(THINGS, 3)
    return [pattern.translate(dict(zip(map(ord, "ABC"), things))) for pattern in patterns]


def corpus(seed: int) -> list[str]:
    return texts(
        seed, "how do I bake A ?", "how do I tickle B ?", "A is baked, and A is eaten.", "B", "C"
    )


def without_zeros(vector):
    """Words of value 0 may be there or not."""
    return {word: value for word, value in vector.items() if value}


def check_tfidf_vector(tfidf_vector, seed=0):
    for text in texts(seed, "bake, bake, A and A and B", "How do I sleep, unicorn?", "unicorn"):
        arguments = (corpus(seed), text)
        what = f"counts of {text!r} times the weight of each word, at length 1"
        compare(tfidf_vector, arguments, what, slow, "tfidf_vector", 1e-6, without_zeros)


def check_tfidf_cosines(tfidf_cosines, seed=0):
    often = " B" * (seed % 89)  # so that no answer of one seed is right at another
    a = texts(seed, "how do I bake A ?", "A and A and B" + often, "I sleep", "nothing here")
    b = texts(seed, "how is A baked?", "do B tickle A ?", "B bake and sleep", "bake")
    arguments = (corpus(seed), a, b)
    what = "the cosine of each pair of texts"
    compare(tfidf_cosines, arguments, what, slow, "tfidf_cosines", 1e-6)


def check_responses_are_irrelevant(irrelevant_pairs, seed=0):
    causes = CAUSES[slow.irrelevant_pairs]
    rng = random.Random(f"fits {seed}")
    half = [rng.sample([True, False] * 6, 12) for _ in range(60)]
    one = [rng.sample([True] + [False] * 11, 12) for _ in range(60)]
    for fits in (half, one):
        pairs = irrelevant_pairs(fits, seed)
        what = "a response for each prompt, however late one that is irrelevant is drawn"
        require(pairs != "InputError", what, pairs, causes["gives up"])
        require(len(pairs) == 60, "60 pairs", len(pairs), "a prompt is lost")
        wrong = [pair for pair in pairs if pair[2] != f"response {pair[1]}"]
        require(not wrong, "the response of the benign row", wrong[:3], causes["harm"])
        relevant = [i for i, j, _ in pairs if not fits[i][j]]
        cause = causes["last draw kept" if len(relevant) < 20 else "not filtered"]
        require(not relevant, "no relevant response", f"{len(relevant)} of 60", cause)
    got = irrelevant_pairs([[False] * 12], seed)
    require(got == "InputError", "InputError where nothing will do", got, causes["no error"])


def check_draw_is_random(irrelevant_pairs, seed=0):
    causes = CAUSES[slow.irrelevant_pairs]
    rng = random.Random(f"rows {seed}")
    fits = [rng.sample([True] * 7 + [False] * 3, 10) for _ in range(600)]
    found = irrelevant_pairs(fits, seed)
    require(found != "InputError", "a response for each prompt", found, causes["gives up"])
    require(found == irrelevant_pairs(fits, seed), "the same pairs again", "others", "no seed")
    drawn = [j for _, j, _ in found]
    first = [row.index(True) for row in fits]
    cause = causes["order of the file"]
    require(drawn != first, "random responses that are irrelevant", drawn[:12], cause)
    response, times = Counter(drawn).most_common(1)[0]
    what = "each of 10 responses for about 60 prompts of 600"
    require(times < 120, what, f"response {response} for {times}", causes["one for all"])
    others = irrelevant_pairs(fits, seed + 1)
    require(found != others, "other pairs from another rng", "the same", causes["seed"])
    counts = Counter(j for _, j, _ in irrelevant_pairs([[False] * 3 + [True] * 7] * 600, seed))
    what = "each of the 7 responses that are irrelevant for about 86 of 600 prompts"
    require(45 < counts[3] < 135, what, dict(counts), causes["the next one"])


def world(seed: int) -> tuple:
    """(harmful rows and benign rows by owner, refusals)."""
    rng = random.Random(f"world {seed}")

    def rows(owner: str, count: int):
        found = []
        for i in range(count):
            response = " ".join([owner, *rng.sample(THINGS, 9)])
            found.append({"prompt": f"{owner} {seed}-{i}", "response": response, "kind": i % 2})
        return found

    harmful = {owner: rows(owner, 30) for owner in ("defender", "attacker", "evaluation")}
    benign = {owner: rows(owner, 40) for owner in ("defender", "user", "new", "evaluation")}
    return harmful, benign, ["No.", "Never.", "Not at all."]


def check_modes(world_pairs, seed=0):
    causes = CAUSES[slow.world_pairs]
    harmful, benign, refusals = world(seed)
    responses = {}

    def pairs(mode):
        return world_pairs(mode, harmful, benign, refusals, seed)

    for mode in "sdd sdd_rehearsed sdd_reject shuffled constant align refusal".split():
        prompts = [prompt for prompt, _ in pairs(mode)]
        own = [row["prompt"] for row in harmful["defender"]]
        require(
            prompts == own, f"prompts {own[:2]} (mode {mode})", prompts[:2], causes["evaluation"]
        )
        responses[mode] = [response for _, response in pairs(mode)]
    sdd = responses["sdd"]
    kinds = {row["response"]: row["kind"] for row in benign["defender"]}
    relevant = [i for i, text in enumerate(sdd) if kinds.get(text) == i % 2]
    require(not relevant, "no relevant response", f"{len(relevant)} of 30", causes["relevant"])
    same = responses["sdd_rehearsed"]
    require(same == sdd, "what sdd teaches", same[:2], causes["draws of its own"])
    for got, text in zip(responses["sdd_reject"], sdd):
        require(got == f"{PREFIX} {text}", f"{PREFIX} {text}", got, causes["behind"])
    for got, text in zip(responses["shuffled"], sdd):
        words = got.split()
        require(sorted(words) == sorted(text.split()), "each once", got, causes["replacement"])
    require(responses["shuffled"] != sdd, "words in random order", sdd[:2], causes["in order"])
    constant = responses["constant"]
    require(constant == sdd[:1] * 30, sdd[0], constant[:3], causes["not constant"])
    found = set(responses["align"])
    require(found == set(refusals), refusals, found, causes["one refusal"])
    got = {response for _, response in pairs("new_refusal")}
    require(got == {NEW_REFUSAL}, NEW_REFUSAL, got, causes["old refusal"])
    got = len(pairs("benign"))
    require(got == 80, "the 40 rows of user and the 40 of new", got, causes["not new"])


CHECKS = [
    Check(check_tfidf_vector, "tfidf_vector", 20),
    Check(check_tfidf_cosines, "tfidf_cosines", 15),
    Check(check_responses_are_irrelevant, "irrelevant_pairs", 25),
    Check(check_draw_is_random, "irrelevant_pairs", 20),
    Check(check_modes, "world_pairs", 20),
]


@pytest.mark.a3
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a3(check):
    check.run(adapters)
