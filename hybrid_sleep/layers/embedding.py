"""Compound tokens: ids of several digits, with a vector for each digit.

Hsiao et al., "Compound Word Transformer" (arXiv 2101.02402), concatenate the vectors of a compound
token's fields and project them. A sum is that with the projection multiplied out: `concat(e_1, ...,
e_k) W` is the sum of `e_i W_i`, over the blocks of rows W_i of W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


class CompoundEmbedding(nn.Module):
    """Ids as numbers of mixed radix: the sum of one vector for each digit.

    fields: how many values each digit has, the last digit running fastest: with `(f1, f2, f3)` the
    id is `(d1 * f2 + d2) * f3 + d3`. `weight: [sum(fields), D]` holds the vectors of the first
    digit, then those of the second, and so on; it is not initialised here.

    It is no `nn.Embedding`: what takes a row of the weight for a token (adapters of such layers,
    resizing) would be wrong about it.
    """

    def __init__(self, fields: Sequence[int], hidden_size: int):
        super().__init__()
        self.fields = tuple(fields)
        self.weight = nn.Parameter(torch.empty(sum(fields), hidden_size))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[..., D]` of integer ids `[...]`; IndexError for one out of range."""
        first, *others = self.weight.split(self.fields)
        parts = []
        for vectors in reversed(others):
            parts.append(nn.functional.embedding(ids % len(vectors), vectors))
            ids = ids // len(vectors)
        # No remainder of the first digit: an id out of range must not wrap around into another.
        return sum(parts, nn.functional.embedding(ids, first))

    def table(self) -> torch.Tensor:
        """Embeddings `[prod(fields), D]` of all ids."""
        return self(torch.arange(math.prod(self.fields), device=self.weight.device))

    def extra_repr(self) -> str:
        return f"fields={self.fields}, hidden_size={self.weight.shape[1]}"
