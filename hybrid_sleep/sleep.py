"""The sleep: N passes over a full window, then everything but the fast weights goes.

Lee, McLeish, Goldstein, Fanti, "Do Language Models Need Sleep?", arXiv 2605.26099, Algorithm 1.
The ordinary forward over the window was pass 1, so a sleep of depth N runs passes 2..N:

    h <- pass-1 hidden states of the window            (the cache kept them)
    repeat for pass 2..N:   h, S <- LoopedBlocks(h, S)
    S of the coda <- S at the window's start;  S <- Coda(h, S)
    drop keys, values, hidden states, convolution tails
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import nn

from hybrid_sleep.cache import SleepCache, Window
from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.layers.context import Context, FastWeights, Memory
from hybrid_sleep.layers.stack import Granularity, run_blocks
from hybrid_sleep.report import (
    Change,
    SleepReport,
    bytes_to_free,
    change_of,
    relative_by_layer,
    relative_by_row,
)

Passes = int | Literal["auto"]
TOLERANCE = 1e-2
MAX_PASSES = 16


class Backbone(Protocol):
    """What a sleep needs of a model."""

    config: HybridSleepConfig
    layers: nn.ModuleList
    granularity: Granularity | None

    def context(
        self,
        past: torch.Tensor,
        new: torch.Tensor,
        width: int,
        first_position: torch.Tensor,
        like: torch.Tensor,
        *,
        sleeping: bool,
    ) -> Context:
        """Positions and visibility for `new` tokens a row behind `past` slots."""


def check_passes(passes: Any, config: HybridSleepConfig, name: str = "passes") -> Passes:
    """Return `passes` if it is an integer of at least 1 or "auto", else raise ValueError.

    "auto" watches looped fast weights, so it is refused where no state-space layer is looped.
    """
    is_count = isinstance(passes, int) and not isinstance(passes, bool)
    if not (is_count and passes > 0) and passes != "auto":
        raise ValueError(f"{name} must be an integer of at least 1 or 'auto', got {passes!r}")
    start, end = config.loop_range
    if passes == "auto" and "linear_attention" not in config.layer_types[start:end]:
        raise ValueError(
            f"{name}='auto' watches looped fast weights, and loop={(start, end)} holds no "
            "state-space layer; allowed is an integer of at least 1"
        )
    return passes


def last_writer(config: HybridSleepConfig) -> int | None:
    """The last looped or later block that leaves something behind at a boundary.

    Fast weights do; keys and values only under sliding eviction. What follows it is dead on the
    last pass, and so is whatever it reads itself.
    """
    lasting = ("linear_attention", "full_attention")[: 2 if config.eviction == "sliding" else 1]
    start, _ = config.loop_range
    writers = [i for i, t in enumerate(config.layer_types) if i >= start and t in lasting]
    return writers[-1] if writers else None


def consolidate(
    backbone: Backbone,
    cache: SleepCache,
    rows: torch.Tensor,
    passes: Passes,
    *,
    tol: float = TOLERANCE,
    max_passes: int = MAX_PASSES,
    report: bool = True,
    name: str = "cache",
) -> SleepReport | None:
    """Let `rows` (ascending, on the CPU) sleep and open a new window; rows without tokens stay.

    passes: depth N; 1 only evicts. "auto" ends, row by row, with the first pass that changes the
    looped fast weights by less than `tol`, at the latest after `max_passes`; since no pass is known
    to be the last beforehand, none is pruned.
    report: measure and check; raises ValueError naming `name`, leaving the cache as it was, where
    fast weights are not finite before or after.
    """
    began = time.perf_counter()
    rows = rows[cache.counts[rows] > 0]
    if not len(rows):
        return SleepReport([], 0, [], 0, []) if report else None
    window = cache.window(rows)
    after, depths, changes = _repeat_passes(backbone, window, passes, tol, max_passes, report)
    if backbone.config.eviction == "hard":
        after = {i: m for i, m in after.items() if isinstance(m, FastWeights)}
    by_layer = relative_by_layer(cache, after, changes, name) if report else {}
    freed = bytes_to_free(cache, window)
    cache.cross(rows, after)
    if not report:
        return None
    done = SleepReport(
        rows=rows.tolist(),
        tokens=int(window.lengths.sum()),
        tokens_by_row=window.lengths.tolist(),
        passes=int(depths.max()),
        passes_by_row=depths.tolist(),
        change=by_layer,
        bytes_freed=freed,
        seconds=time.perf_counter() - began,
    )
    cache.reports.append(done)
    return done


def _repeat_passes(
    backbone: Backbone,
    window: Window,
    passes: Passes,
    tol: float,
    max_passes: int,
    measure: bool,
) -> tuple[dict[int, Memory], torch.Tensor, list[Change]]:
    """Passes 2..N and the coda: the memory they leave, each row's depth, each pass's change."""
    config, layers, granularity = backbone.config, backbone.layers, backbone.granularity
    (start, end), writer = config.loop_range, last_writer(config)
    depth = max_passes if passes == "auto" else passes
    depths, changes = torch.ones_like(window.lengths), []
    if depth == 1 or writer is None:
        return {}, depths, changes
    context = backbone.context(
        window.kept,
        window.lengths,
        int(window.kept.max()),
        window.first_position,
        window.hidden,
        sleeping=True,
    )
    last = writer if passes != "auto" and writer < end else None
    awake = torch.ones_like(window.lengths, dtype=torch.bool)
    h, after = window.hidden, {i: m for i, m in window.memory.items() if start <= i < end}
    for j in range(2, depth + 1):
        before = after
        h_j, after = run_blocks(
            layers,
            range(start, end),
            h,
            _entering(window, before),
            context,
            last_writer=last if j == depth else None,
            granularity=granularity,
        )
        if not bool(awake.all()):
            h_j, after = _only(awake, h_j, h, after, before)
        h, depths = h_j, depths + awake
        if measure or passes == "auto":
            changes.append(change_of(before, after))
        if passes == "auto":
            awake = awake & (relative_by_row(changes[-1]) >= tol)
            if not bool(awake.any()):
                break
    if writer >= end:
        opening = {i: m for i, m in (*window.opening.items(), *window.older.items()) if i >= end}
        coda = range(end, config.num_hidden_layers)
        _, read_again = run_blocks(
            layers, coda, h, opening, context, last_writer=writer, granularity=granularity
        )
        after = after | read_again
    return after, depths, changes


def _entering(window: Window, after: Mapping[int, Memory]) -> dict[int, Memory]:
    """What a pass starts from: the fast weights of the last pass, short-term memory as it was."""
    entering: dict[int, Memory] = dict(window.older)
    for i, m in after.items():
        if isinstance(m, FastWeights):
            entering[i] = FastWeights(m.S, *window.opening.get(i, FastWeights(None))[1:])
    return entering


def _only(
    awake: torch.Tensor,
    h: torch.Tensor,
    h_before: torch.Tensor,
    after: Mapping[int, Memory],
    before: Mapping[int, Memory],
) -> tuple[torch.Tensor, dict[int, Memory]]:
    """Take the new values in rows that are still `awake`, the ones before in the others."""
    awake = awake.to(h.device)

    def pick(new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
        return None if new is None else torch.where(awake.view(-1, *[1] * (new.ndim - 1)), new, old)

    kept = {i: type(m)(*map(pick, m, before[i])) for i, m in after.items()}
    return pick(h, h_before), kept
