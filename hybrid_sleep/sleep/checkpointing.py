"""Activation checkpointing that hands states on: what the backward computes again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from hybrid_sleep.sleep.trees import map_tensors

GroupSize = int | Literal["block", "pass"]
Granularity = GroupSize | Literal["window"] | tuple[Literal["window"], GroupSize]


@dataclass(frozen=True)
class Checkpointing:
    """What the backward computes again instead of keeping it.

    group: consecutive blocks of a pass that are computed again together; None for none.
    window: whether pass 1 over a window, with the sleep behind it, is computed again as one.
    """

    group: int | None = None
    window: bool = False


@dataclass(frozen=True)
class Truncation:
    """How far gradients flow back; None everywhere: all the way.

    passes: through that many last passes of a sleep.
    windows: through at most that many windows of a row.
    """

    passes: int | None = None
    windows: int | None = None


def parse_granularity(granularity: Granularity | None, layers: int) -> Checkpointing:
    """Read `None`, `"block"` (1), k >= 1 blocks, `"pass"` (all `layers`), `"window"`, or
    `("window", one of the others)`; ValueError naming `granularity` for anything else."""
    if granularity is None:
        return Checkpointing()
    if granularity == "window":
        return Checkpointing(window=True)
    group: Any = granularity
    nested = False
    if isinstance(granularity, (tuple, list)) and len(granularity) == 2:
        outer, group = granularity
        nested = outer == "window"
        group = group if nested else None
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

    It must leave its arguments as they are and depend on nothing else that changes. Fast weights
    are among the arguments and results, so nothing that a window hands on is lost, as it is where
    transformers' checkpointing drops the cache.
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
