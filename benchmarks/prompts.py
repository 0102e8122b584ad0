"""Texts to ask with: words that every model of `benchmarks.models` has as one token each.

A text begins with a space, as each of its words does, so that n words are n tokens wherever it stands.
"""

from __future__ import annotations

import random

from benchmarks.models import make_words

WORDS = make_words(240)
"""What the smallest vocabulary has."""


class Writer:
    """Writes texts that are as good as unrelated from their first words on; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def text(self, num_words: int) -> str:
        """A text of that many words."""
        return "".join(f" {word}" for word in self._random.choices(WORDS, k=num_words))

    def between(self, least: int, most: int) -> int:
        """A number of the range, both ends included."""
        return self._random.randint(least, most)
