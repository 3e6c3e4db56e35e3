"""Run a range of blocks over one block of tokens: one pass of the model or part of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from hybrid_sleep.layers.context import Context
from hybrid_sleep.sleep.checkpointing import recompute
from hybrid_sleep.sleep.state import LayerState

# Which rows sleep when is decided in every call, from counters that are never the same: traced, it
# would be compiled again each time.
NOT_COMPILED = (
    "windows and sleeps are run by Python, which decides from what the cache holds; compile the "
    "blocks, which is where the time goes: for block in model.model.layers: block.compile()"
)


def run_blocks(
    blocks: Sequence[nn.Module],
    indices: Sequence[int],
    h: torch.Tensor,
    states: Mapping[int, LayerState],
    context: Context,
    *,
    last_writer: int | None = None,
    group: int | None = None,
) -> tuple[torch.Tensor | None, dict[int, LayerState]]:
    """Apply `blocks[i] for i in indices` to `h: [B, T, D]`.

    states: what each block starts from (missing: nothing); a new dict comes back, this one stays.
    last_writer: stop at this block and only let it update its state; h comes back as None.
    group: recompute in the backward, so many blocks at a time. States are arguments and results of
        what is recomputed, so nothing is lost on the way.
    """
    after: dict[int, LayerState] = {}
    if group is not None and torch.is_grad_enabled():
        for first in range(0, len(indices), group):
            part = indices[first : first + group]
            run = partial(run_blocks, blocks, part, last_writer=last_writer)
            h, new = recompute(run, h, {i: states[i] for i in part if i in states}, context)
            after |= new
            if h is None:
                break
        return h, after
    for i in indices:
        h, after[i] = blocks[i](h, states.get(i), context, i == last_writer)
        if i == last_writer:
            break
    return h, after
