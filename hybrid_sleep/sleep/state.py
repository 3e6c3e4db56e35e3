"""What the tokens of one call know about each other: lengths, positions, who may see whom."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionMemory(NamedTuple):
    """Keys and values of one attention layer, `[B, H_kv, C, head_dim]` each.

    Row b's tokens fill slots 0, 1, ... in order; what lies behind its length is stale.
    """

    k: torch.Tensor
    v: torch.Tensor


class FastWeights(NamedTuple):
    """State of one state-space layer.

    S: `[B, H, K, V]`, fp32 (fp64 in an fp64 model), what survives a boundary.
    q_tail, kv_tail: `[B, W - 1, channels]`, last inputs of the short convolutions; None is zeros.
    """

    S: torch.Tensor | None
    q_tail: torch.Tensor | None = None
    kv_tail: torch.Tensor | None = None


Memory = AttentionMemory | FastWeights


class Sight(NamedTuple):
    """Which slots each query sees.

    gather: `[B, C]` index into the old slots followed by the new ones, None for plain appending.
    mask: bool `[B or 1, 1, T, C]`, True where seen; None where `causal` alone says it.
    causal: with no mask, whether query i sees slots 0..i only (True) or all of them.
    """

    gather: torch.Tensor | None
    mask: torch.Tensor | None
    causal: bool


class Context(NamedTuple):
    """Shared by all layers in one pass over one block of tokens.

    A tuple, so that the hooks of a device map take its tensors along from device to device.

    cos, sin: `[B or 1, T, head_dim]`.
    sight: see `Sight`.
    mask: bool `[B, T]`, False on the pads behind a row's last token; None without pads.
    keep_tails: whether convolution tails outlive this pass.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    sight: Sight
    mask: torch.Tensor | None
    keep_tails: bool


def is_uniform(lengths: torch.Tensor) -> bool:
    """Whether all rows are equally long; lengths: `[B]` on the CPU."""
    return bool((lengths == lengths[0]).all())


def packing(past: torch.Tensor, new: torch.Tensor, width: int) -> torch.Tensor | None:
    """Index `[B, max(past + new)]` that keeps each row's slots gapless after appending.

    Row b holds `past[b]` valid slots out of `width` and `new[b]` valid ones out of `new.max()`
    appended behind them. None where plain appending leaves no gap.
    """
    if is_uniform(past) and is_uniform(new) and int(past[0]) == width:
        return None
    slot = torch.arange(int((past + new).max()))
    index = torch.where(slot < past[:, None], slot, width + slot - past[:, None])
    return index.clamp_(max=width + int(new.max()) - 1)


def see(
    past: torch.Tensor,
    new: torch.Tensor,
    width: int,
    *,
    reach: int | None = None,
    bidirectional: bool = False,
    device: torch.device | str = "cpu",
) -> Sight:
    """Work out who sees whom when each row appends new tokens to its own slots.

    past, new: `[B]` integers on the CPU, a row's filled slots and its new tokens.
    width: slots that the memory holds now (at least `past.max()`).
    reach: a query sees at most the `reach` last slots up to its own; None for all.
    bidirectional: new tokens see each other both ways; older slots are seen as before.
    """
    tokens, slots = int(new.max()), int((past + new).max())
    uniform = is_uniform(past) and is_uniform(new)
    gather = packing(past, new, width)
    gather = None if gather is None else gather.to(device)
    if uniform:
        old = int(past[0])
        in_reach = reach is None or slots <= reach
        if in_reach and (tokens == 1 or bidirectional):
            return Sight(gather, None, causal=False)
        if in_reach and old == 0:
            return Sight(gather, None, causal=True)
        past, new = past[:1], new[:1]
    slot = torch.arange(slots)
    # A pad looks where its row's last token looks, so that no query sees nothing.
    step = torch.minimum(torch.arange(tokens), (new[:, None] - 1).clamp(min=0))
    place = (past[:, None] + step)[..., None]
    last = (past + new - 1).clamp(min=0)[:, None, None] if bidirectional else place
    seen = slot <= last
    if reach is not None:
        seen = seen & (slot > place - reach)
    return Sight(gather, seen[:, None].to(device), causal=False)
