"""Finite groups as multiplication tables: elements are numbered, and 0 is the identity."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PERMUTATIONS = {"S3": 3, "S5": 5, "A5": 5}
CYCLES = {"Z2": 2, "Z60": 60}


@dataclass(frozen=True, eq=False)
class Group:
    """`table[a, b]` is the product a b; `words[a]` shows element a."""

    name: str
    words: tuple[str, ...]
    table: np.ndarray

    def __len__(self) -> int:
        return len(self.words)

    def prefix_products(self, elements: np.ndarray) -> np.ndarray:
        """Products of the first 1, 2... of `elements` [..., T], from left to right."""
        products = np.array(elements)
        for t in range(1, products.shape[-1]):
            products[..., t] = self.table[products[..., t - 1], products[..., t]]
        return products


@lru_cache(maxsize=8)
def group(name: str) -> Group:
    """S3, S5, A5, Z2 or Z60.

    Permutations are numbered in lexicographic order of their tuples (where 0, 1... go; of A5 the
    even ones), and a product a b applies a first: (a b)[i] = b[a[i]]. Z is addition.
    """
    if name in CYCLES:
        order = CYCLES[name]
        each = np.arange(order)
        return Group(name, tuple(map(str, each)), (each[:, None] + each) % order)
    tuples = [
        images
        for images in itertools.permutations(range(PERMUTATIONS[name]))
        if name[0] == "S" or _even(images)
    ]
    number = {images: index for index, images in enumerate(tuples)}
    table = [[number[tuple(b[i] for i in a)] for b in tuples] for a in tuples]
    return Group(name, tuple("".join(map(str, images)) for images in tuples), np.array(table))


def _even(images: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(images, 2)) % 2 == 0
