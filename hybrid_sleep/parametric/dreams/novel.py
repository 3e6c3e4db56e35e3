"""How much of a text is copied, and which texts are nearly the same: n-grams of words."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

Gram = tuple[str, ...]

NGRAM = 4


def ngrams(text: str, n: int = NGRAM) -> frozenset[Gram]:
    """The n-grams of the words of `text` in lower case; of a shorter text the whole is one."""
    words = re.findall(r"\w+", text.casefold())
    if not words:
        return frozenset()
    n = min(n, len(words))
    return frozenset(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def overlap(text: str, source: str, n: int = NGRAM) -> float:
    """The share of the n-grams of `text` that `source` has, 0..1."""
    own = ngrams(text, n)
    if not own:
        return 0.0
    return len(own & ngrams(source, len(next(iter(own))))) / len(own)


class Seen:
    """Texts seen so far, to find near-duplicates by Jaccard similarity of their n-grams.

    It is exact, unlike MinHash: a sleep has thousands of dreams at most, and only those that share
    an n-gram are compared.
    """

    def __init__(self, n: int = NGRAM):
        self.n = n
        self._sizes: list[tuple[str, int]] = []
        self._with: dict[Gram, list[int]] = defaultdict(list)

    def add(self, name: str, text: str) -> None:
        """Remember `text` as `name`."""
        grams = ngrams(text, self.n)
        for gram in grams:
            self._with[gram].append(len(self._sizes))
        self._sizes.append((name, len(grams)))

    def nearest(self, text: str) -> tuple[float, str]:
        """The largest similarity, 0..1, to a text seen, and its name; the first of several."""
        grams = ngrams(text, self.n)
        common = Counter(i for gram in grams for i in self._with.get(gram, ()))
        best, name = 0.0, ""
        for i in sorted(common):
            other, size = self._sizes[i]
            similarity = common[i] / (len(grams) + size - common[i])
            if similarity > best:
                best, name = similarity, other
        return best, name
