"""Similarity of two texts by the words they share, for use without the weights of a sentence encoder."""

import math
import re
from collections import Counter


class Tfidf:
    """Cosines of word counts in which rare words of the corpus count more (tf-idf). Words are compared, not meaning."""

    def __init__(self, corpus: list[str]):
        found = Counter(word for text in corpus for word in set(self.words(text)))
        self.weight = {word: 1 + math.log((1 + len(corpus)) / (1 + n)) for word, n in found.items()}

    def words(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())

    def vector(self, text: str) -> dict[str, float]:
        counts = {
            word: n * self.weight.get(word, 0.0) for word, n in Counter(self.words(text)).items()
        }
        length = math.sqrt(sum(value * value for value in counts.values())) or 1.0
        return {word: value / length for word, value in counts.items()}

    def cosines(self, a: list[str], b: list[str]) -> list[float]:
        """The cosine of each text of `a` with the text of `b` at its place; 0 if either has no word of the corpus."""
        pairs = ((self.vector(x), self.vector(y)) for x, y in zip(a, b))
        return [sum(value * y.get(word, 0.0) for word, value in x.items()) for x, y in pairs]
