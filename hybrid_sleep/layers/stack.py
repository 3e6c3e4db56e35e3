"""Run a range of blocks over one block of tokens: one pass of the model or part of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hybrid_sleep.sleep.state import Context, Memory
from hybrid_sleep.sleep.trees import map_tensors

# Which rows sleep when is decided in every call, from counters that are never the same: traced, it
# would be compiled again each time.
NOT_COMPILED = (
    "windows and sleeps are run by Python, which decides from what the memory holds; compile the "
    "blocks, which is where the time goes: for block in model.model.layers: block.compile()"
)

Depth = int | Literal["block", "pass"]
Granularity = Depth | Literal["window"] | tuple[Literal["window"], Depth]


@dataclass(frozen=True)
class Checkpointing:
    """What the backward computes again instead of keeping it.

    group: consecutive blocks of a pass that are computed again together; None for none.
    window: whether reading a window, with the sleep behind it, is computed again as one.
    """

    group: int | None = None
    window: bool = False


def parse_granularity(granularity: Granularity | None, layers: int) -> Checkpointing:
    """Read `None`, `"block"` (1), k >= 1 blocks, `"pass"` (all `layers`), `"window"`, or
    `("window", one of the others)`; ValueError naming `granularity` for anything else."""
    if granularity is None:
        return Checkpointing()
    if granularity == "window":
        return Checkpointing(window=True)
    nested = (
        isinstance(granularity, (tuple, list))
        and len(granularity) == 2
        and granularity[0] == "window"
    )
    group = granularity[1] if nested else granularity
    if isinstance(group, str):
        group = {"block": 1, "pass": layers}.get(group)
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(
            "granularity must be None, 'block', 'pass', 'window', a number of layers of at least "
            f"1, or ('window', 'block', 'pass' or such a number), got {granularity!r}"
        )
    return Checkpointing(group, nested)


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, computed once more when the backward asks for what it saved.

    It must leave its arguments as they are and depend on nothing else that changes.
    """
    # Inside another recomputation, tensors are let go only if they are arguments themselves.
    tensors: list[torch.Tensor] = []
    hole = torch.empty(0)

    def take(x: torch.Tensor) -> torch.Tensor:
        tensors.append(x)
        return hole

    holes = [map_tensors(take, argument) for argument in arguments]

    def run(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return function(*(map_tensors(lambda _: next(given), tree) for tree in holes))

    # torch's early stop, its default, is needed: run to the end, the hooks of DeepSpeed's ZeRO-3
    # would let go of parameters again that the backward has just gathered.
    return checkpoint(run, *tensors, use_reentrant=False)


def run_blocks(
    blocks: Sequence[nn.Module],
    indices: Sequence[int],
    h: torch.Tensor,
    memory: Mapping[int, Memory | None],
    context: Context,
    *,
    last_writer: int | None = None,
    group: int | None = None,
) -> tuple[torch.Tensor | None, dict[int, Memory]]:
    """Apply `blocks[i] for i in indices` to `h: [B, T, D]`.

    memory: what each block starts from (missing: nothing); a new dict comes back, this one stays.
    last_writer: stop at this block and only let it write; h comes back as None.
    group: recompute in the backward, so many blocks at a time. The memory is an argument and a
        result of what is recomputed, so nothing is lost on the way.
    """
    after: dict[int, Memory] = {}
    if group is not None and torch.is_grad_enabled():
        for first in range(0, len(indices), group):
            part = indices[first : first + group]
            run = partial(run_blocks, blocks, part, last_writer=last_writer)
            h, new = recompute(run, h, {i: memory.get(i) for i in part}, context)
            after |= new
            if h is None:
                break
        return h, after
    for i in indices:
        h, after[i] = blocks[i](h, memory.get(i), context, i == last_writer)
        if i == last_writer:
            break
    return h, after
