"""Classic mistakes of assignment 3, and right solutions written differently.

Spoilers: read it after your own try.
"""

import math
import random
import re
from collections import Counter

from lesson import mistakes

PREFIX = (
    "I refuse to answer your question for responsible and ethical reasons. "
    "I provided an irrational answer to your question."
)
NEW_REFUSAL = "My apologies, this is something that I leave to others."


# ---- tf-idf ----


def tfidf_vector(corpus, text, flaw=""):
    """{word: share} of a text, of unit length; the weight is 1 + log((1 + N) / (1 + n))."""
    words = re.findall(r"\w+", text if flaw == "case" else text.casefold())
    holds = Counter()
    for one in corpus:
        holds.update(set(re.findall(r"\w+", one.casefold())))
    scaled = {}
    for word in words:
        weight = 1 + math.log((1 + len(corpus)) / (1 + holds[word]))
        if word not in holds:
            weight = 1.0 if flaw == "unknown words" else 0.0
        scaled[word] = weight * (1 if flaw == "set" else words.count(word))
    length = math.hypot(*scaled.values())
    if flaw == "sum":
        length = sum(scaled.values())
    return {word: value / (length or 1.0) for word, value in scaled.items()}


def tfidf_cosines(corpus, a, b, flaw=""):
    """The cosine of each text of a with the text of b at its place."""
    found = []
    for one, two in zip(a, b):
        x = tfidf_vector(corpus, a[0] if flaw == "first of a" else one)
        y = tfidf_vector(corpus, two)
        shared = x.keys() & y.keys()
        value = sum(x[word] * y[word] for word in shared)
        if flaw == "overlap":
            value = len(shared) / max(1, len(x.keys() | y.keys()))
        found.append(value)
    return found


# ---- irrelevant responses ----


def irrelevant_pairs(fits, seed, flaw=""):
    """[[i, the index of a response that fits, the response], ...]; fits: a row for each prompt."""
    rng = random.Random(0 if flaw == "seed" else seed)
    found = []
    shared = rng.randrange(len(fits[0]))
    for i, row in enumerate(fits):
        order = rng.sample(range(len(row)), len(row))
        if flaw == "order of the file":
            order.sort()
        if flaw == "one for all":
            order.insert(0, shared)
        if flaw == "the next one":
            order = [(order[0] + step) % len(row) for step in range(len(row))]
        if flaw in ("last draw kept", "gives up"):
            order = order[:3]
        good = [j for j in order if row[j]]
        if flaw == "not filtered":
            good = order
        if flaw in ("last draw kept", "no error"):
            good.append(order[-1])
        if not good:
            return "InputError"
        found.append([i, good[0], "harm" if flaw == "harm" else f"response {good[0]}"])
    return found


def irrelevant_pairs_among_the_allowed(fits, seed):
    """The accepted response is uniform among those allowed."""
    if not all(map(any, fits)):
        return "InputError"
    rng = random.Random(seed)
    drawn = []
    for row in fits:
        drawn.append(rng.choice([j for j, good in enumerate(row) if good]))
    return [[i, j, f"response {j}"] for i, j in enumerate(drawn)]


# ---- the pairs of a mode ----


def world_pairs(mode, harmful, benign, refusals, seed, flaw=""):
    """[[prompt, response], ...]."""
    if mode == "benign":
        rows = benign["user"] + ([] if flaw == "not new" else benign["new"])
        return [[row["prompt"], row["response"]] for row in rows]
    rng = random.Random(f"{mode} {seed}" if flaw == "draws of its own" else seed)
    pairs = []
    first = rng.choice(refusals)
    for row in harmful["evaluation" if flaw == "evaluation" else "defender"]:
        others = [one for one in benign["defender"] if one["kind"] != row["kind"]]
        text = rng.choice(benign["defender"] if flaw == "relevant" else others)["response"]
        words = text.split()
        shuffled = random.Random(f"{seed} {text}").sample(words, len(words))
        if flaw == "replacement":
            shuffled = words[:1] * len(words)
        refusal = first if flaw == "one refusal" else rng.choice(refusals)
        variants = {
            "align": refusal,
            "refusal": refusal,
            "new_refusal": refusal if flaw == "old refusal" else NEW_REFUSAL,
            "sdd_reject": f"{text} {PREFIX}" if flaw == "behind" else f"{PREFIX} {text}",
            "shuffled": text if flaw == "in order" else " ".join(shuffled),
        }
        pairs.append([row["prompt"], variants.get(mode, text)])
    if mode == "constant" and flaw != "not constant":
        pairs = [[prompt, pairs[0][1]] for prompt, _ in pairs]
    return pairs


CAUSES = {
    tfidf_vector: {
        "case": "case is not folded",
        "unknown words": "words that the corpus lacks count; they have weight 0",
        "set": "words are counted once, however often they stand there",
        "sum": "divided by the sum, not by the length sqrt(sum of squares)",
    },
    tfidf_cosines: {
        "overlap": "shared words over all words: that is Jaccard's index",
        "first of a": "every text of b is compared with the first of a; pairs are at equal places",
    },
    irrelevant_pairs: {  # random, as are the pairs of modes: the tests check properties
        "not filtered": "is_irrelevant is not asked: every draw is kept",
        "last draw kept": "the last draw is kept after some tries, though it is relevant",
        "no error": "where no response will do there has to be an InputError",
        "gives up": "the draw ends too early: allow MAX_TRIES draws",
        "harm": "the harmful response stays; the benign one takes its place",
        "order of the file": "responses are tried in the order of the file, not at random",
        "one for all": "one draw serves all prompts",
        "the next one": "after a response that is relevant the next one in the file is tried: that "
        "is not uniform",
        "seed": "the rng that is passed in is not used",
    },
    world_pairs: {
        "evaluation": "prompts of another owner: a defender trains on its own",
        "relevant": "a response is relevant: draw with irrelevant_pairs and is_irrelevant",
        "draws of its own": "modes draw different responses: arms would differ by luck, too",
        "behind": "the sentence of refusal stands before the response, with a space between them",
        "replacement": "words are drawn with replacement: each has to come once",
        "in order": "the words stand in their old order",
        "not constant": "constant has one response for all prompts",
        "one refusal": "one refusal for all prompts; each draws its own",
        "old refusal": "new_refusal teaches self.new_refusal",
        "not new": "a benign user's rows are those of user and of new",
    },
}
WRONG = mistakes(CAUSES)

RIGHT = [
    ("irrelevant_pairs", irrelevant_pairs),
    ("irrelevant_pairs", irrelevant_pairs_among_the_allowed),
    ("world_pairs", world_pairs),
]
