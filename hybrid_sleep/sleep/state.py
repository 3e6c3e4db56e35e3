"""LayerState: what one layer carries from token to token, told apart by how long it lasts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch


class LayerState(NamedTuple):
    """State of one layer for B rows. Any part may be missing; a layer may have all three.

    S: `[B, H, K, V]`, fast weights, fp32 (fp64 in an fp64 model); they alone outlive the window
        under hard eviction. None is zeros.
    tails: `[B, W - 1, channels]` each, last inputs of short convolutions, of which a layer may
        have several; None is zeros. Short-term: dropped, or kept whole under sliding eviction.
    slots: `[B, H, C, *]` each, one slot a token in dim 2, such as keys and values. Row b's tokens
        fill slots 0, 1, ... in order, and what lies behind its length is stale. Short-term.

    A state is never written in place: layers return a new one, so that gradients flow through it
    and a cache can go back to the old one.
    """

    S: torch.Tensor | None = None
    tails: tuple[torch.Tensor | None, ...] = ()
    slots: tuple[torch.Tensor, ...] = ()

    @property
    def carried(self) -> tuple[torch.Tensor, ...]:
        """Fast weights and tails, those that there are."""
        return tuple(x for x in (self.S, *self.tails) if x is not None)

    def put(self, rows: torch.Tensor, new: LayerState, total: int) -> LayerState:
        """This state of `total` rows with `rows` replaced by the rows of `new`, see `put_rows`."""
        slots = _put_all(rows, self.slots, new.slots, total)
        return LayerState(
            put_rows(rows, self.S, new.S, total),
            _put_all(rows, self.tails, new.tails, total),
            tuple(x for x in slots if x is not None),
        )


def take_rows(rows: torch.Tensor, x: torch.Tensor, total: int) -> torch.Tensor:
    """The given ascending rows of `x: [total, ...]`; `x` itself where that is all of them."""
    return x if len(rows) == total else x.index_select(0, rows.to(x.device))


def put_rows(
    rows: torch.Tensor, old: torch.Tensor | None, new: torch.Tensor | None, total: int
) -> torch.Tensor | None:
    """`old: [total, ...]` with `rows` replaced by `new` (None: zeros), out of place.

    New slots that are fewer than the old ones are padded to them.
    """
    if len(rows) == total:
        return new
    if old is None:
        if new is None:
            return None
        old = new.new_zeros(total, *new.shape[1:])
    index = rows.to(old.device)
    if new is None:
        return old.index_fill(0, index, 0)
    if new.ndim == 4 and new.shape[2] < old.shape[2]:
        new = pad_slots(new, old.shape[2])
    return old.index_copy(0, index, new)


def _put_all(
    rows: torch.Tensor,
    old: Iterable[torch.Tensor | None],
    new: Iterable[torch.Tensor | None],
    total: int,
) -> tuple[torch.Tensor | None, ...]:
    return tuple(put_rows(rows, a, b, total) for a, b in zip_longest(old, new))


def pad_slots(x: torch.Tensor, width: int) -> torch.Tensor:
    """`x: [B, H, C, *]` with empty slots behind its own, `[B, H, width, *]`."""
    return torch.nn.functional.pad(x, (0, 0, 0, width - x.shape[2]))


def take_slots(x_BHCK: torch.Tensor, index_BC: torch.Tensor) -> torch.Tensor:
    """Pick slots row by row: `out[b, :, j] = x[b, :, index[b, j]]`, `x: [B, H, C, K]`."""
    index = index_BC[:, None, :, None].expand(-1, x_BHCK.shape[1], -1, x_BHCK.shape[3])
    return x_BHCK.gather(2, index)


def join_states(states: Sequence[LayerState], sizes: Sequence[int]) -> LayerState:
    """States of `sizes` rows each as one; what one of them lacks is zeros in its rows."""
    width = max((x.shape[2] for state in states for x in state.slots), default=0)
    slots = zip_longest(*([pad_slots(x, width) for x in state.slots] for state in states))
    return LayerState(
        join_rows([state.S for state in states], sizes),
        tuple(join_rows(x, sizes) for x in zip_longest(*(state.tails for state in states))),
        tuple(x for x in (join_rows(part, sizes) for part in slots) if x is not None),
    )


def join_rows(
    parts: Sequence[torch.Tensor | None], sizes: Sequence[int]
) -> torch.Tensor | None:
    """Tensors of `sizes` rows one below the other; None is zeros, and the result where all are."""
    like = next((x for x in parts if x is not None), None)
    if like is None:
        return None
    filled = [
        like.new_zeros(size, *like.shape[1:]) if x is None else x
        for x, size in zip(parts, sizes, strict=True)
    ]
    return torch.cat(filled)
