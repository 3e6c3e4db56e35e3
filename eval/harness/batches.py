"""Rows of different lengths as one batch, and where each of them stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def group_by_beginning(inputs: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """The inputs that begin no other one -> indices of all that they begin with, themselves too.

    Sorted, an input stands right before one that it begins, if there is any.
    """
    leaves: dict[tuple[int, ...], list[int]] = {}
    last: tuple[int, ...] = ()
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        tokens = tuple(inputs[i])
        if last[: len(tokens)] != tokens:
            last = tokens
        leaves.setdefault(last, []).append(i)
    return leaves


def side_by_side(heads: Mapping[tuple[int, ...], tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Rows, the longest first, but those that begin with the same head next to each other."""
    longest: dict[tuple[int, ...], int] = {}
    for row, head in heads.items():
        longest[head] = max(longest.get(head, 0), len(row))
    return sorted(heads, key=lambda row: (-longest[heads[row]], heads[row], -len(row)))


def stop_criteria(tokenizer: Any, stop: Sequence[str], context: torch.Tensor) -> Any:
    """lm-eval's stop sequences, but each row ends, and reads no more, as soon as its own came."""
    from lm_eval.models.utils_hf import MultiTokenEOSCriteria
    from transformers import StoppingCriteriaList

    class RowStops(MultiTokenEOSCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            super().__call__(input_ids, scores, **kwargs)
            return torch.tensor(self.done_tracker, device=input_ids.device)

    width = context.shape[1]
    return StoppingCriteriaList([RowStops(x, tokenizer, width, len(context)) for x in stop])
