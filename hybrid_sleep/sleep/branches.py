"""One text, slept on at several depths: rows in groups, which share what they have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrid_sleep.sleep.algorithm import coda, looped_pass
from hybrid_sleep.sleep.backbone import Backbone
from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.sleep.carry import after_pass_one, after_passes, writer_of
from hybrid_sleep.sleep.checkpointing import Truncation
from hybrid_sleep.sleep.execution import dropout_of
from hybrid_sleep.sleep.options import Depths, Passes
from hybrid_sleep.sleep.state import LayerState


def rows_by_depth(
    rows: torch.Tensor, batch: int, passes: Depths
) -> list[tuple[torch.Tensor, Passes]]:
    """`rows` (of `batch`, ascending) by the depth that they sleep at: pairs of some and their N.

    passes: one depth for all, or a tuple of K, one for each of K groups of equally many rows.
    """
    if not isinstance(passes, tuple):
        return [(rows, passes)]
    depth = torch.tensor(passes)[rows // (batch // len(passes))]
    return [(rows[depth == N], N) for N in sorted(set(depth.tolist()))]


def branch(backbone: Backbone, cache: SleepCache, depths: Sequence[int]) -> SleepCache:
    """The cache of B rows after sleeps of each of K `depths`: K groups of B rows, one below other.

    Passes 1..max(depths) run once: what a shallower sleep leaves is what a deeper one finds on its
    way. For training, where nothing is reported; `cache` stays as it is.
    """
    end, blocks = backbone.options.loop[1], len(backbone.blocks)
    window = cache.window(torch.arange(len(cache.counts)))
    writer = writer_of(backbone, window)
    deepest, slept = max(depths), {}
    carry = after_pass_one(backbone, window, watch=False, cut=False)
    for N in range(1, deepest + 1):
        after: dict[int, LayerState] = {}
        if N > 1 and writer is not None:
            last = writer if N == deepest and writer < end else None
            looped = backbone.options.looped_blocks(N, blocks)
            carry = looped_pass(backbone, carry, looped=looped, last=last, measure=False)
            done = coda(backbone, carry, last=writer) if N in depths and writer >= end else carry
            after = after_passes(done.S, done.left)
        if N in depths:
            slept[N] = cache.copy()
            slept[N].cross_boundary(window, after)
    return SleepCache.join([slept[N] for N in depths])


def shares_first_window(
    backbone: Backbone,
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    cache: SleepCache,
    depths: tuple[int, ...],
    supervised: torch.Tensor | None,
) -> bool:
    """Whether groups of rows, one for each of `depths`, can share their first window and its sleep.

    In training, from the start of a text, where all have the same tokens in that window, none is
    supervised or a pad, more follow, and nothing but depth tells the groups apart: no dropout, no
    gradients cut at some pass or boundary, no window that is computed again.
    """
    window, groups = backbone.options.window, len(depths)
    if (
        not torch.is_grad_enabled()
        or groups == 1
        or tokens.shape[1] <= window
        or real is not None
        or bool(cache.positions.any())
        or backbone.truncation != Truncation()
        or backbone.checkpointing.window
        or _drops_out(backbone)
    ):
        return False
    if supervised is not None and bool(supervised[:, :window].any()):
        return False
    first = tokens[:, :window].unflatten(0, (groups, -1))
    return bool((first == first[:1]).all())


def _drops_out(backbone: Backbone) -> bool:
    modules = (module for block in backbone.blocks for module in block.modules())
    return any(module.training and dropout_of(module) for module in modules)
