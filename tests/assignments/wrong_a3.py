"""Classic mistakes of assignment 3, and right solutions written differently. Spoilers: read it after your own try."""

import math
import random
import re
from collections import Counter
from functools import partial

from lesson import Wrong

PREFIX = (
    "I refuse to answer your question for responsible and ethical reasons. I provided an irrational answer to "
    "your question."
)


# ---- tf-idf ----


def tfidf_vector(corpus, text, flaw=""):
    """{word: share} of a text, of unit length; a word's weight is 1 + log((1 + texts) / (1 + texts that hold it))."""
    words = re.findall(r"\w+", text if flaw == "case" else text.casefold())
    holds = Counter(word for one in corpus for word in set(re.findall(r"\w+", one.casefold())))
    weight = {word: 1 + math.log((1 + len(corpus)) / (1 + n)) for word, n in holds.items()}
    unknown = 1.0 if flaw == "unknown words" else 0.0
    counts = Counter(words) if flaw != "set" else Counter(set(words))
    scaled = {
        word: n * (1.0 if flaw == "no weight" else weight.get(word, unknown))
        for word, n in counts.items()
    }
    length = math.sqrt(sum(value * value for value in scaled.values()))
    if flaw == "sum":
        length = sum(scaled.values())
    if flaw == "not unit":
        length = 1.0
    if flaw == "square":
        length = length * length
    return {word: value / (length or 1.0) for word, value in scaled.items()}


def tfidf_vector_by_word(corpus, text):
    texts, found = [re.findall(r"\w+", one.casefold()) for one in corpus], {}
    words = re.findall(r"\w+", text.casefold())
    for word in words:
        n = sum(word in one for one in texts)
        found[word] = words.count(word) * (1 + math.log((1 + len(texts)) / (1 + n))) if n else 0.0
    norm = math.hypot(*found.values()) if any(found.values()) else 1.0
    return {word: value / norm for word, value in found.items() if value}


def tfidf_cosines(corpus, a, b, flaw=""):
    """The cosine of each text of a with the text of b at its place."""
    found = []
    for x, y in zip(a, b):
        x, y = tfidf_vector(corpus, x), tfidf_vector(corpus, y)
        shared = set(x) & set(y)
        value = sum(x[word] * y[word] for word in shared)
        if flaw == "distance":
            value = 1 - value
        if flaw == "overlap":
            value = len(shared) / max(1, len(set(x) | set(y)))
        if flaw == "sum of shares":
            value = sum(x[word] + y[word] for word in shared) / 2
        found.append(value)
    if flaw == "first of a":
        return tfidf_cosines(corpus, [a[0]] * len(b), b)
    return found


def tfidf_cosines_from_counts(corpus, a, b):
    """Without unit vectors: the inner product over both lengths."""

    def inner(x, y):
        return sum(value * y.get(word, 0.0) for word, value in x.items())

    def raw(text):
        return tfidf_vector(corpus, text, "not unit")

    pairs = [(raw(x), raw(y)) for x, y in zip(a, b)]
    return [inner(x, y) / (math.sqrt(inner(x, x) * inner(y, y)) or 1.0) for x, y in pairs]


# ---- resampling ----


def draw_irrelevant(prompts, responses, cosines, threshold, seed, flaw=""):
    """[[index of a response, cosine, tries], ...] of each prompt; cosines: a row for each prompt."""
    rng = random.Random({"seed": 0, "shared rng": f"{seed} {len(prompts)}"}.get(flaw, seed))
    found = []
    shared = rng.randrange(len(responses))
    for row in cosines:
        if flaw == "absolute":
            row = [abs(cosine) for cosine in row]
        order = rng.sample(range(len(responses)), len(responses))
        if flaw == "no random order":
            order = sorted(order)
        if flaw == "least alike":
            order = sorted(order, key=lambda i: row[i])
        if flaw == "one for all":
            order = [shared, *order]
        if flaw in ("last draw kept", "gives up"):
            order = order[:3]
        if flaw == "the next one":
            order = [(order[0] + j) % len(row) for j in range(len(row))]
        tries = 0
        for i in order:
            tries += 1
            if (
                row[i] < threshold
                or (row[i] == threshold and flaw != "below")
                or flaw == "no filter"
                or (flaw == "last draw kept" and tries == 3)
            ):
                break
        else:
            if flaw != "no error":
                return "InputError"
        if flaw == "above":
            i = max(range(len(row)), key=lambda j: row[j])
        tries = {"tries from 0": tries - 1, "tries of all": len(responses), "tries of 1": 1}.get(
            flaw, tries
        )
        found.append([i, row[i], tries])
    return found


def draw_irrelevant_among_the_allowed(prompts, responses, cosines, threshold, seed):
    """The accepted response is uniform among those allowed; how often it was refused before follows by itself."""
    found = []
    for i, row in enumerate(cosines):
        rng = random.Random(f"{seed}-{i}")
        if min(row) > threshold:
            return "InputError"
        tries, seen = 0, []
        while not seen or row[seen[-1]] > threshold:
            one = rng.choice([j for j in range(len(row)) if j not in seen])
            seen.append(one)
            tries += 1
        found.append([seen[-1], row[seen[-1]], tries])
    return found


# ---- variants of a response ----


def vary_response(mode, response, seed, flaw=""):
    """sdd, sdd_reject and shuffled."""
    rng, words = random.Random(0 if flaw == "seed" else seed), response.split()
    if mode == "sdd" or (mode in ("sdd_rehearsed", "constant") and flaw != "one mode"):
        return PREFIX + " " + response if flaw == "always" else response
    if mode == "sdd_reject":
        return {
            "behind": f"{response} {PREFIX}",
            "no space": PREFIX + response,
            "alone": PREFIX,
        }.get(flaw, f"{PREFIX} {response}")
    if mode == "shuffled":
        if flaw == "letters":
            return "".join(rng.sample(response, len(response)))
        if flaw == "replacement":
            return " ".join(rng.choices(words, k=len(words)))
        if flaw == "reversed":
            return " ".join(words[::-1])
        rng.shuffle(words)
        return " ".join(words)
    return response if flaw == "no error" else "InputError"


def vary_response_by_keys(mode, response, seed):
    made = dict.fromkeys(("sdd", "sdd_rehearsed", "constant"), [response]) | {
        "sdd_reject": [PREFIX, response]
    }
    made = made.get(mode)
    if mode == "shuffled":
        rng = random.Random(f"keys {seed}")
        made = sorted(response.split(), key=lambda word: rng.random())
    return "InputError" if made is None else " ".join(made)


CAUSES = {  # of draw_irrelevant and vary_response, which are random: the tests check properties
    "no filter": "the cosine is not looked at: every draw is kept",
    "above": "the most alike response is taken; SDD wants irrelevant ones",
    "below": "a cosine equal to the threshold is refused: at most means <=",
    "last draw kept": "the last draw is kept after some tries, though it is too close",
    "no error": "where no response will do there has to be an InputError",
    "least alike": "the least alike response is taken, not a random one that passes: the same few answers come again",
    "no random order": "responses are tried in the order of the file, not at random",
    "one for all": "one draw serves all prompts",
    "seed": "the seed is not used",
    "tries from 0": "tries counts the responses drawn, the accepted one among them: 1 at least",
    "gives up": "the draw ends too early: it goes on until a response passes or all have been tried",
    "absolute": "the size of the cosine is compared, not the cosine: one below 0 passes too",
    "the next one": "after a response that fails the next one in the file is tried: that is not uniform",
    "shared rng": "a prompt's draws depend on the other prompts: give each a random generator of its own",
    "tries of 1": "tries does not count the responses that were refused",
    "tries of all": "tries is not the number of responses that were drawn",
}
VARIES = {
    "one mode": "sdd_rehearsed and constant leave the response as it is, too",
    "always": "mode sdd leaves the response as it is",
    "behind": "the sentence of refusal stands before the response",
    "no space": "a space belongs between the sentence of refusal and the response",
    "alone": "sdd_reject keeps the response behind the refusal",
    "letters": "words are shuffled, not letters",
    "replacement": "words are drawn with replacement: each has to come once",
    "reversed": "the order is not random",
    "seed": "the rng that is passed in is not used",
    "no error": "an unknown mode has to be an InputError",
}
WRONG = [
    Wrong("tfidf_vector", partial(tfidf_vector, flaw=flaw), message)
    for flaw, message in {
        "case": "case is not folded",
        "unknown words": "words that the corpus lacks count; they have weight 0",
        "set": "words are counted once, however often they stand there",
        "no weight": "counts are not weighted",
        "sum": "divided by the sum, not by the length sqrt(sum of squares)",
        "not unit": "the vector has no unit length",
        "square": "divided by the sum of squares: the root is missing",
    }.items()
]
WRONG += [
    Wrong("tfidf_cosines", partial(tfidf_cosines, flaw=flaw), message)
    for flaw, message in {
        "distance": "1 - cosine: that is a distance",
        "overlap": "shared words over all words: that is Jaccard's index",
        "sum of shares": "weights of shared words are added, not multiplied",
        "first of a": "every text of b is compared with the first of a; pairs are at equal places",
    }.items()
]
WRONG += [
    Wrong("draw_irrelevant", partial(draw_irrelevant, flaw=flaw), cause)
    for flaw, cause in CAUSES.items()
]
WRONG += [
    Wrong("vary_response", partial(vary_response, flaw=flaw), cause)
    for flaw, cause in VARIES.items()
]

RIGHT = [
    ("tfidf_vector", tfidf_vector),
    ("tfidf_vector", tfidf_vector_by_word),
    ("tfidf_cosines", tfidf_cosines),
    ("tfidf_cosines", tfidf_cosines_from_counts),
    ("draw_irrelevant", draw_irrelevant),
    ("draw_irrelevant", draw_irrelevant_among_the_allowed),
    ("vary_response", vary_response),
    ("vary_response", vary_response_by_keys),
]
