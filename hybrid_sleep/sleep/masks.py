"""Attention masks and positions in slots, for rows whose windows begin and end apart."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionMask(NamedTuple):
    """Which slots each query attends to.

    gather: `[B, C]` index into the old slots followed by the new ones, None for plain appending.
    mask: bool `[B or 1, 1, T, C]`, True where attended; None where `causal` alone says it.
    causal: with no mask, whether query i attends to slots 0..i only (True) or to all of them.
    place: `[B]`, the slot that a row's one new token is written to, in place; None to append it.
    """

    gather: torch.Tensor | None
    mask: torch.Tensor | None
    causal: bool
    place: torch.Tensor | None = None


def is_uniform(lengths: torch.Tensor) -> bool:
    """Whether all rows are equally long; lengths: `[B]` on the CPU."""
    return bool((lengths == lengths[0]).all())


def append_index(past: torch.Tensor, new: torch.Tensor, width: int) -> torch.Tensor | None:
    """Index `[B, max(past + new)]` that keeps each row's slots gapless after appending.

    Row b holds `past[b]` valid slots out of `width` and `new[b]` valid ones out of `new.max()`
    appended behind them. None where plain appending leaves no gap.
    """
    if is_uniform(past) and is_uniform(new) and int(past[0]) == width:
        return None
    slot = torch.arange(int((past + new).max()))
    index = torch.where(slot < past[:, None], slot, width + slot - past[:, None])
    return index.clamp_(max=width + int(new.max()) - 1)


def build_mask(
    past: torch.Tensor,
    new: torch.Tensor,
    width: int,
    *,
    reach: int | None = None,
    bidirectional: bool = False,
    device: torch.device | str = "cpu",
) -> AttentionMask:
    """The attention mask of rows that each append new tokens to their own slots.

    past, new: `[B]` integers on the CPU, a row's filled slots and its new tokens.
    width: slots that the layers hold now (at least `past.max()`).
    reach: a query attends to at most the `reach` last slots up to its own; None for all.
    bidirectional: new tokens attend to each other both ways; older slots as before.
    """
    tokens, slots = int(new.max()), int((past + new).max())
    uniform = is_uniform(past) and is_uniform(new)
    gather = append_index(past, new, width)
    gather = None if gather is None else gather.to(device)
    if uniform:
        # Without a mask fused attention kernels can be used, which take none or only slowly.
        old = int(past[0])
        in_reach = reach is None or slots <= reach
        if in_reach and (tokens == 1 or bidirectional):
            return AttentionMask(gather, None, causal=False)
        if in_reach and old == 0:
            return AttentionMask(gather, None, causal=True)
        past, new = past[:1], new[:1]
    slot = torch.arange(slots)
    # A pad attends where its row's last token does: a query without any slot would be NaN.
    step = torch.minimum(torch.arange(tokens), (new[:, None] - 1).clamp(min=0))
    place = (past[:, None] + step)[..., None]
    last = (past + new - 1).clamp(min=0)[:, None, None] if bidirectional else place
    attended = slot <= last
    if reach is not None:
        attended = attended & (slot > place - reach)
    return AttentionMask(gather, attended[:, None].to(device), causal=False)


def decoding_mask(
    place: torch.Tensor, width: int, *, reach: int | None = None
) -> AttentionMask:
    """The mask of one token a row that is written to slot `place: [B]` of `width`, and sees it.

    reach: as in `build_mask`.
    """
    slot = torch.arange(width, device=place.device)
    attended = slot <= place[:, None]
    if reach is not None:
        attended = attended & (slot > place[:, None] - reach)
    return AttentionMask(None, attended[:, None, None], causal=False, place=place)
