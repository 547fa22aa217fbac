"""Similarity of two texts by the words they share, for use without a sentence encoder's weights."""

import math
from collections import Counter

import regex  # comes with tiktoken; its letters keep the vowel signs that belong to them


def words_of(text):
    return regex.findall(r"[\w\p{S}#]+", text.casefold())  # C++, C#, emoji


class Tfidf:
    """Cosines of word counts in which rare words count more (tf-idf): words, not their meaning.

    corpus: the texts whose words are counted to know which are rare.
    """

    def __init__(self, corpus: list):
        texts_with = Counter()  # the number of texts with each word
        for text in corpus:
            texts_with.update(set(words_of(text)))
        self.weight = {
            word: 1 + math.log((1 + len(corpus)) / (1 + count))
            for word, count in texts_with.items()
        }

    def vector(self, text: str) -> dict:
        """The weighted count (float) of each word of a text, at length 1."""
        values = {
            word: count * self.weight.get(word, 0)
            for word, count in Counter(words_of(text)).items()
        }
        length = math.hypot(*values.values()) or 1
        return {word: value / length for word, value in values.items()}

    def cosines(self, a: list, b: list) -> list:
        """The cosine of each text of `a` with the text of `b` at its place."""
        found = []
        for x, y in zip(a, b):
            other = self.vector(y)
            found.append(sum(value * other.get(word, 0) for word, value in self.vector(x).items()))
        return found
