"""The loss of what stands behind a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.measure import right_padded
from hybrid_sleep.parametric.sites import frozen

T = TypeVar("T")


def row_losses(model: Any, rows: Sequence[tuple[Sequence[int], int]]) -> Tensor:
    """Mean NLL `[R]`, in nats a token, of each row's ids from its start on, with gradient.

    rows: (ids, start); the first token of a row is never predicted. fp32 at least. Raises
    ValueError, before the model runs, for a row with nothing to predict.
    """
    losses, counted = _losses(model, rows)
    return torch.where(counted, losses, 0.0).sum(1) / counted.sum(1)


def mean_losses(
    model: nn.Module, rows: Sequence[tuple[Sequence[int], int]], at_once: int = 16
) -> list[float]:
    """`row_losses` of any number of rows, `at_once` of similar length together."""
    return _together(model, rows, at_once, lambda part: row_losses(model, part).tolist())


def token_losses(
    model: nn.Module, rows: Sequence[tuple[Sequence[int], int]], at_once: int = 16
) -> list[list[float]]:
    """The NLLs, by row, that `mean_losses` are means of."""

    def each(part: list[tuple[Sequence[int], int]]) -> list[list[float]]:
        return [own[counted].tolist() for own, counted in zip(*_losses(model, part), strict=True)]

    return _together(model, rows, at_once, each)


@torch.no_grad()
def _together(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], int]],
    at_once: int,
    work: Callable[[list[tuple[Sequence[int], int]]], list[T]],
) -> list[T]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    found: dict[int, T] = {}
    with frozen(model):
        for first in range(0, len(order), at_once):
            part = order[first : first + at_once]
            found.update(zip(part, work([rows[i] for i in part]), strict=True))
    return [found[i] for i in range(len(rows))]


def _losses(model: Any, rows: Sequence[tuple[Sequence[int], int]]) -> tuple[Tensor, Tensor]:
    """NLL `[R, T]`, and which of them count."""
    starts = [max(1, start) for _, start in rows]
    for (row, _), start in zip(rows, starts, strict=True):
        if len(row) <= start:
            raise ValueError(
                f"rows must have a token to predict behind their start, got {len(row)} tokens with "
                f"the start at {start}"
            )
    device = next(model.parameters()).device
    ids, mask = right_padded([list(row) for row, _ in rows], device)
    first, width = min(starts) - 1, ids.shape[1]
    logits = model(
        input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=width - first
    ).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = ids[:, first + 1 :]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    places = torch.arange(first + 1, width, device=device)
    behind = places >= torch.tensor(starts, device=device)[:, None]
    return losses, behind & mask[:, first + 1 :].bool()
