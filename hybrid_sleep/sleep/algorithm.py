"""The sleep: N passes over a full window, then everything but the fast weights goes.

Lee, McLeish, Goldstein, Fanti, "Do Language Models Need Sleep?", arXiv 2605.26099, Algorithm 1.
The ordinary forward over the window was pass 1, so a sleep of depth N runs passes 2..N:

    h <- pass-1 hidden states of the window            (the cache kept them)
    repeat for pass 2..N:   h, S <- LoopedBlocks(h, S)
    S of the coda <- S at the window's start;  S <- Coda(h, S)
    drop keys, values, hidden states, convolution tails

A pass and the coda are functions of a `Night`; `engine.py` runs them, on a GPU from CUDA graphs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.layers.stack import Checkpointing, run_blocks
from hybrid_sleep.sleep import execution as engine
from hybrid_sleep.sleep.cache import SleepCache, Window
from hybrid_sleep.sleep.execution import Night, Step, begin
from hybrid_sleep.sleep.report import (
    Change,
    SleepReport,
    bytes_to_free,
    change_of,
    relative_by_layer,
    relative_by_row,
)
from hybrid_sleep.sleep.state import Context, FastWeights, Memory
from hybrid_sleep.sleep.trees import map_tensors

Passes = int | Literal["auto"]
TOLERANCE = 1e-2
MAX_PASSES = 16


@dataclass(frozen=True)
class Truncation:
    """How far gradients flow back; None everywhere: all the way.

    passes: through that many last passes of a sleep.
    windows: through at most that many windows of a row.
    """

    passes: int | None = None
    windows: int | None = None


class Backbone(engine.Backbone, Protocol):
    """What a sleep needs of a model."""

    checkpointing: Checkpointing
    truncation: Truncation

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

    Gradients flow as `backbone.truncation.passes` says: what pass N - passes + 1 starts from is cut
    loose, but not what the window opened with, from which each pass and the coda start.

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
    after, depths, changes, path = _repeat_passes(
        backbone, window, passes, tol, max_passes, report
    )
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
        path=path,
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
) -> tuple[dict[int, Memory], torch.Tensor, list[Change], str]:
    """Passes 2..N and the coda: the memory they leave, each row's depth, each pass's change, and
    how they were run."""
    config, writer = backbone.config, last_writer(backbone.config)
    start, end = config.loop_range
    depth = max_passes if passes == "auto" else passes
    depths, changes = torch.ones_like(window.lengths), []
    if depth == 1 or writer is None:
        why = "only one pass" if depth == 1 else "no layer leaves anything behind"
        return {}, depths, changes, f"eager: {why}"
    pruned = passes != "auto" and writer < end
    last = "last pass" if pruned else "pass"
    # Without gradients steps may be recorded, for sleeps that measure and others alike.
    learns = torch.is_grad_enabled()
    measure = measure or passes == "auto" or not learns
    steps: dict[str, Step] = {}
    kept = backbone.truncation.passes
    first_kept = 1 if kept is None or not learns else depth - kept + 1
    if first_kept > 1:
        steps["cut"] = _cut
    if depth > 2 or not pruned:
        steps["pass"] = partial(_pass, backbone, None, measure)
    if pruned:
        steps[last] = partial(_pass, backbone, writer, measure)
    if writer >= end:
        steps["coda"] = partial(_coda, backbone, writer)
    with begin(backbone, _fall_asleep(backbone, window), steps) as night:
        awake = torch.ones_like(window.lengths, dtype=torch.bool)
        for j in range(2, depth + 1):
            if j == first_kept:
                night.take("cut")
            with torch.set_grad_enabled(learns and j >= first_kept):
                night.take(last if j == depth else "pass")
            depths = depths + awake
            change = night.change()
            if change is not None:
                changes.append(dict(zip(night.layers, change, strict=True)))
            if passes == "auto":
                awake = awake & (relative_by_row(changes[-1]) >= tol)
                if not bool(awake.any()):
                    break
                if not bool(awake.all()):
                    night.only(awake)
        if "coda" in steps:
            night.take("coda")
        S, left = night.end()
    looped = {i: FastWeights(x, *left.get(i, FastWeights(None))[1:]) for i, x in S.items()}
    return left | looped, depths, changes, night.path


def _fall_asleep(backbone: Backbone, window: Window) -> Night:
    """Where pass 2 starts: hidden states and fast weights of pass 1, short-term memory as it was
    when the window opened, and for the coda its fast weights of that time as well."""
    start, end = backbone.config.loop_range
    S = {
        i: m.S for i, m in window.memory.items() if start <= i < end and isinstance(m, FastWeights)
    }
    tails = {i: m._replace(S=None) if i < end else m for i, m in window.opening.items()}
    entering: dict[int, Memory] = {i: m for i, m in (tails | window.older).items() if i >= start}
    context = backbone.context(
        window.kept,
        window.lengths,
        int(window.kept.max()),
        window.first_position,
        window.hidden,
        sleeping=True,
    )
    return Night(window.hidden, S, entering, context)


def _pass(
    backbone: Backbone, last: int | None, measure: bool, night: Night
) -> dict[str, Any]:
    """`h, S <- LoopedBlocks(h, S)`; with `last`, what only later passes would read is left out."""
    entering = dict(night.entering)
    for i, S in night.S.items():
        entering[i] = entering.get(i, FastWeights(None))._replace(S=S)
    h, after = run_blocks(
        backbone.blocks,
        range(*backbone.config.loop_range),
        night.h,
        entering,
        night.context,
        last_writer=last,
        group=backbone.checkpointing.group,
    )
    new = {"h": h, "S": {i: after[i].S for i in night.S}, "left": {}}
    if backbone.config.eviction == "sliding":
        new["left"] = {
            i: m._replace(S=None) if isinstance(m, FastWeights) else m for i, m in after.items()
        }
    if night.awake is not None:
        new = {name: map_tensors(night.pick, x, getattr(night, name)) for name, x in new.items()}
    if measure and night.S:
        new["change"] = change_of(night.S, new["S"])
    return new


def _cut(night: Night) -> dict[str, Any]:
    """What earlier passes left, without the way it came about."""
    return {"h": night.h.detach(), "S": {i: S.detach() for i, S in night.S.items()}, "left": {}}


def _coda(backbone: Backbone, writer: int, night: Night) -> dict[str, Any]:
    """`S <- Coda(h, S)` from the window's start, the last block only as far as it writes."""
    _, left = run_blocks(
        backbone.blocks,
        range(backbone.config.loop_range[1], backbone.config.num_hidden_layers),
        night.h,
        night.entering,
        night.context,
        last_writer=writer,
        group=backbone.checkpointing.group,
    )
    if backbone.config.eviction == "hard":
        left = {i: FastWeights(m.S) for i, m in left.items() if isinstance(m, FastWeights)}
    return {"left": left}
