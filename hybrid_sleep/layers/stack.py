"""Run a range of blocks over one block of tokens: one pass of the model or part of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hybrid_sleep.layers.context import Context, Memory

Granularity = Literal["block", "pass"]
GRANULARITIES = ("block", "pass")


def run_blocks(
    blocks: Sequence[nn.Module],
    indices: Sequence[int],
    h: torch.Tensor,
    memory: Mapping[int, Memory | None],
    context: Context,
    *,
    last_writer: int | None = None,
    granularity: Granularity | None = None,
) -> tuple[torch.Tensor | None, dict[int, Memory]]:
    """Apply `blocks[i] for i in indices` to `h: [B, T, D]`.

    memory: what each block starts from (missing: nothing); a new dict comes back, this one stays.
    last_writer: stop at this block and only let it write; h comes back as None.
    granularity: recompute in the backward what a `block` or this whole `pass` computed. The memory
        is an argument and a result of what is recomputed, so nothing is lost on the way.
    """
    if granularity is not None and not torch.is_grad_enabled():
        granularity = None
    if granularity == "pass":
        return checkpoint(
            run_blocks,
            blocks,
            indices,
            h,
            memory,
            context,
            last_writer=last_writer,
            use_reentrant=False,
        )
    after: dict[int, Memory] = {}
    for i in indices:
        arguments = (h, memory.get(i), context, i == last_writer)
        if granularity == "block":
            h, after[i] = checkpoint(blocks[i], *arguments, use_reentrant=False)
        else:
            h, after[i] = blocks[i](*arguments)
        if i == last_writer:
            break
    return h, after
