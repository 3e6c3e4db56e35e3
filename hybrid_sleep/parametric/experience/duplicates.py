"""Near-duplicates: MinHash finds candidates, an exact comparison decides.

Broder, "On the resemblance and containment of documents" (1997): the share of equal minima of two
sets under random permutations estimates |A & B| / |A | B|; the sets are those of 5 characters in a
row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hybrid_sleep.parametric.experience.experience import Experience
from hybrid_sleep.parametric.experience.packages import needed

PERMUTATIONS, SHINGLE = 128, 5
# The one of datasketch 2; its signatures must be told by which they were made.
SCHEME = "affine32"

_TELLING = re.compile(r"\d[\d.,:]*|\b[^\W\d_a-z]\w*")


def signature(experience: Experience) -> bytes:
    """The minima of an experience, 128 unsigned integers of 32 bits."""
    with needed("datasketch"):
        from datasketch import MinHash

    made = MinHash(PERMUTATIONS, scheme=SCHEME)
    made.update_batch([shingle.encode() for shingle in sorted(_shingles(experience))])
    return made.hashvalues.astype("<u4").tobytes()


def alike(one: Experience, other: Experience, threshold: float) -> bool:
    """Whether both say the same: of a kind, as good as the same words, the same names and numbers.

    A long text in which only a name or a number changed is news, not a duplicate; of corrections,
    which a person took the pains to write, only the very same is one.
    """
    a, b = _words(one), _words(other)
    if one.kind != other.kind or (one.kind == "correction" and a.casefold() != b.casefold()):
        return False
    if _TELLING.findall(a) != _TELLING.findall(b):
        return False
    first, second = _shingles(one), _shingles(other)
    return len(first & second) >= threshold * len(first | second)


class Index:
    """Experiences, by id, to be found by their like."""

    def __init__(self, threshold: float, read: Callable[[int], Experience]):
        with needed("datasketch"):
            from datasketch import MinHash, MinHashLSH

        self._threshold, self._read = threshold, read
        # Rather one candidate too many than a duplicate not seen: they are compared anyway.
        self._lsh: Any = MinHashLSH(threshold, PERMUTATIONS, weights=(0.1, 0.9))
        self._blank: Any = MinHash(PERMUTATIONS, scheme=SCHEME)

    def add(self, number: int, made: bytes) -> None:
        """Let the experience `number` of signature `made` be found."""
        self._lsh.insert(number, self._hash(made))

    def remove(self, number: int) -> None:
        """Let it be found no more."""
        if number in self._lsh:
            self._lsh.remove(number)

    def __contains__(self, number: int) -> bool:
        return number in self._lsh

    def find(self, experience: Experience, made: bytes) -> int | None:
        """The first that is like `experience`; None if there is none."""
        for number in sorted(self._lsh.query(self._hash(made))):
            if alike(experience, self._read(number), self._threshold):
                return number
        return None

    def _hash(self, made: bytes) -> Any:
        copy = self._blank.copy()
        copy.hashvalues = np.frombuffer(made, "<u4").astype(np.uint32)
        return copy


def _words(experience: Experience) -> str:
    return " ".join(f"{experience.prompt} {experience.text}".split())


def _shingles(experience: Experience) -> set[str]:
    words = _words(experience).casefold()
    return {words[i : i + SHINGLE] for i in _starts(words)}


def _starts(words: str) -> Iterator[int]:
    return iter(range(max(1, len(words) - SHINGLE + 1)))
