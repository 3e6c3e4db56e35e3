"""Random draws for tasks, all from raw Philox words, and which split a draw belongs to.

The raw words of a bit generator are the same in every version of numpy; what its methods make of
them (a permutation, a choice) is not. So a task stays the same, token for token, and with it every
published number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from hybrid_sleep.eval.tasks.base import SPLITS

T = TypeVar("T")

TEST_SHARE = 16  # one context, or problem, in this many belongs to the test split
WORDS_AT_ONCE = 1 << 18
CARDS_AT_ONCE = 1 << 20
STREAM_WORDS = 256
U64 = np.uint64
THRESHOLD = U64(2**64 // TEST_SHARE)


def draw(
    split: str,
    seed: int,
    count: int | None,
    words: int,
    read: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    threshold: np.uint64 = THRESHOLD,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Examples of a split, `count` in all (None: endlessly), the same however they are sliced.

    Each is made of `words` raw words. `read(block [n, words])` returns arrays of n rows, first a
    64-bit hash of each context; the others are yielded, without the rows of the other split. Test
    contexts are those with a hash below `threshold`.
    """
    stream = np.random.Philox(np.random.SeedSequence([SPLITS.index(split), seed]))
    share = 1 / TEST_SHARE if split == "test" else 1 - 1 / TEST_SHARE
    left = count
    while left is None or left > 0:
        wanted = 256 if left is None else left
        drawn = min(int(wanted / share * 1.05) + 8, max(WORDS_AT_ONCE // words, 1))
        hashes, *arrays = read(stream.random_raw(drawn * words).reshape(drawn, words))
        kept = np.flatnonzero((hashes < threshold) == (split == "test"))[:left]
        if left is not None:
            left -= len(kept)
        if len(kept):
            yield tuple(array[kept] for array in arrays)


def distinct(words: np.ndarray, options: int) -> np.ndarray:
    """As many different integers of 0..options-1 a row as it has words [n, k], in random order."""
    drawn = np.empty(words.shape, dtype=np.int64)
    at_once = max(CARDS_AT_ONCE // options, 1)
    for start in range(0, len(words), at_once):
        part = words[start : start + at_once]
        rows = np.arange(len(part))
        deck = np.tile(np.arange(options), (len(part), 1))
        for place in range(words.shape[1]):
            other = place + (part[:, place] % U64(options - place)).astype(np.int64)
            deck[rows, other], deck[:, place] = deck[:, place].copy(), deck[rows, other]
        drawn[start : start + at_once] = deck[:, : words.shape[1]]
    return drawn


def mix(words: np.ndarray) -> np.ndarray:
    """Stafford's Mix13 finaliser of each word, after an odd constant is added."""
    mixed = words + U64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> U64(27))) * U64(0x94D049BB133111EB)
    return mixed ^ (mixed >> U64(31))


def in_test(content: str) -> bool:
    """Whether what `content` says belongs to the test split: by its hash alone."""
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % TEST_SHARE == 0


class Stream:
    """Choices that depend on `entropy` (integers >= 0) alone."""

    def __init__(self, *entropy: int):
        self._philox = np.random.Philox(np.random.SeedSequence(entropy))
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """An integer of 0..n-1."""
        if not self._words:
            self._words = self._philox.random_raw(STREAM_WORDS).tolist()
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
