"""Random choices from raw Philox words, whose stream is the same in every version of numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
WORDS = 256  # drawn at once


class Stream:
    """Choices that depend on `entropy` (integers >= 0) alone."""

    def __init__(self, *entropy: int):
        self._philox = np.random.Philox(np.random.SeedSequence(entropy))
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """An integer of 0..n-1."""
        if not self._words:
            self._words = self._philox.random_raw(WORDS).tolist()
        return (self._words.pop() * n) >> 64

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[tuple[int, T]]) -> T:
        """The second of one of the pairs (weight, option), drawn by the first."""
        at = self.below(sum(weight for weight, _ in options))
        for weight, option in options:
            at -= weight
            if at < 0:
                return option
        raise AssertionError("unreachable: `at` is below the sum of the weights")

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 calls."""
        return self.below(100) < percent

    def shuffle(self, items: list) -> list:
        """`items`, shuffled in place."""
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def distinct(self, n: int, count: int) -> list[int]:
        """`count` different integers of 0..n-1."""
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            drawn[self.below(n)] = None
        return list(drawn)
