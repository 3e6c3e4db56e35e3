"""Token sequences of different lengths as one batch, and which of them share a beginning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def pad(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `[B, T]` of rows of different lengths; a pad is token 0, masked."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids, mask


def group_by_prefix(inputs: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """The inputs that are no prefix of another -> indices of all their prefixes, and of themselves.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    last: tuple[int, ...] = ()
    # Sorted, an input stands right before one that it is a prefix of, if there is any.
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        tokens = tuple(inputs[i])
        if last[: len(tokens)] != tokens:
            last = tokens
        groups.setdefault(last, []).append(i)
    return groups


def sort_by_prefix(prefixes: Mapping[tuple[int, ...], tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Rows, the longest first, but those with the same prefix next to each other."""
    longest: dict[tuple[int, ...], int] = {}
    for row, prefix in prefixes.items():
        longest[prefix] = max(longest.get(prefix, 0), len(row))
    return sorted(prefixes, key=lambda row: (-longest[prefixes[row]], prefixes[row], -len(row)))
