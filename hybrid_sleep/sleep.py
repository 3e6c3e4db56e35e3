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
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from hybrid_sleep.cache import SleepCache, Window
from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.layers.context import AttentionMemory, Context, FastWeights, Memory
from hybrid_sleep.layers.stack import Granularity, run_blocks

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


@dataclass
class SleepReport:
    """What one sleep did.

    rows: which rows of the batch slept.
    tokens: how many tokens were consolidated in all; tokens_by_row: in each of `rows`.
    passes: depth reached, pass 1 included (the largest over rows); passes_by_row: each row's.
    change: per state-space layer, `||S_j - S_{j-1}|| / ||S_{j-1}||` of passes j = 2, 3, ...
    bytes_freed: keys, values, hidden states and tails that the boundary dropped.
    seconds: wall-clock time.
    """

    rows: list[int]
    tokens: int
    tokens_by_row: list[int]
    passes: int
    passes_by_row: list[int]
    change: dict[int, list[float]] = field(default_factory=dict)
    bytes_freed: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to consolidate: the window is empty"
        change = "; ".join(
            f"layer {layer}: " + ", ".join(f"{c:.3f}" for c in changes)
            for layer, changes in self.change.items()
        )
        return (
            f"{self.tokens} tokens in {len(self.rows)} row(s), {self.passes} pass(es), "
            f"{self.bytes_freed / 1024:.1f} KiB freed, {self.seconds * 1e3:.1f} ms"
            + (f"; change of S by pass: {change}" if change else "")
        )


def check_passes(passes: Any, name: str = "passes") -> Passes:
    """Return `passes` if it is an integer of at least 1 or "auto", else raise ValueError."""
    is_count = isinstance(passes, int) and not isinstance(passes, bool)
    if passes == "auto" or (is_count and passes > 0):
        return passes
    raise ValueError(f"{name} must be an integer of at least 1 or 'auto', got {passes!r}")


def last_writer(config: HybridSleepConfig, start: int) -> int | None:
    """The last block from `start` on that leaves something behind at a boundary.

    Fast weights do; keys and values only under sliding eviction. What follows it is dead on the
    last pass, and so is whatever it reads itself.
    """
    lasting = ("linear_attention", "full_attention")[: 2 if config.eviction == "sliding" else 1]
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
) -> SleepReport | None:
    """Let `rows` (ascending, on the CPU) sleep and open a new window; rows without tokens stay.

    passes: depth N; 1 only evicts. "auto" ends, row by row, with the first pass that changes the
    looped fast weights by less than `tol`, at the latest after `max_passes`; since no pass is known
    to be the last beforehand, none is pruned.
    report: measure and check; raises ValueError, leaving the cache as it was, where fast weights
    are not finite before or after.
    """
    began = time.perf_counter()
    config = backbone.config
    rows = rows[cache.counts[rows] > 0]
    if not len(rows):
        return SleepReport([], 0, [], 0, []) if report else None
    if report:
        cache.check_finite()
    window = cache.window(rows)
    start, end = config.loop_range
    writer = last_writer(config, start)
    depth = (max_passes if passes == "auto" else passes) if writer is not None else 1
    after: dict[int, Memory] = {}
    depths = torch.ones_like(rows)
    changes: list[dict[int, torch.Tensor]] = []
    if depth > 1:
        context = backbone.context(
            window.kept,
            window.lengths,
            int(window.kept.max()),
            window.first_position,
            window.hidden,
            sleeping=True,
        )
        coda_writes = writer >= end
        stop_at = writer if passes != "auto" and not coda_writes else None
        awake = torch.ones(len(rows), dtype=torch.bool)
        h, after = window.hidden, {i: m for i, m in window.memory.items() if start <= i < end}
        for j in range(2, depth + 1):
            h_j, after_j = run_blocks(
                backbone.layers,
                range(start, end),
                h,
                _entering(window, after),
                context,
                last_writer=stop_at if j == depth else None,
                granularity=backbone.granularity,
            )
            depths[awake] = j
            if report or passes == "auto":
                changes.append(_change(after, after_j))
            if not bool(awake.all()):
                h_j, after_j = _only(awake, h_j, h, after_j, after)
            h, after = h_j, after_j
            if passes == "auto":
                awake &= _relative(list(changes[-1].values())) >= tol
                if not bool(awake.any()):
                    break
        if coda_writes:
            coda = {i: m for i, m in window.opening.items() if i >= end} | {
                i: m for i, m in window.older.items() if i >= end
            }
            _, coda = run_blocks(
                backbone.layers,
                range(end, config.num_hidden_layers),
                h,
                coda,
                context,
                last_writer=writer,
                granularity=backbone.granularity,
            )
            after |= coda
    if config.eviction == "hard":
        after = {i: m for i, m in after.items() if isinstance(m, FastWeights)}
    if report:
        for layer, m in after.items():
            if isinstance(m, FastWeights) and not bool(torch.isfinite(m.S).all()):
                raise ValueError(
                    f"cache: this sleep would leave a NaN or an infinity in the fast weights of "
                    f"layer {layer}; the cache is as it was before"
                )
    freed = _bytes_to_free(cache, window)
    cache.cross(rows, after)
    if not report:
        return None
    by_layer = {
        layer: [_relative([c[layer].sum(1)[:, None]]).item() for c in changes if layer in c]
        for layer in (changes[0] if changes else ())
    }
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


def _entering(window: Window, after: Mapping[int, Memory]) -> dict[int, Memory]:
    """What a pass starts from: the fast weights of the last pass, short-term memory as it was."""
    entering: dict[int, Memory] = dict(window.older)
    for i, m in after.items():
        if isinstance(m, FastWeights):
            entering[i] = FastWeights(m.S, *window.opening.get(i, FastWeights(None))[1:])
    return entering


def _change(before: Mapping[int, Memory], after: Mapping[int, Memory]) -> dict[int, torch.Tensor]:
    """Per state-space layer `[2, R]`: squared norms of the step and of what it started from."""
    return {
        i: torch.stack(
            (
                (m.S - before[i].S).detach().square().flatten(1).sum(1),
                before[i].S.detach().square().flatten(1).sum(1),
            )
        )
        for i, m in after.items()
        if isinstance(m, FastWeights)
    }


def _relative(squares: list[torch.Tensor]) -> torch.Tensor:
    """`sqrt(step / start)` on the CPU from `[2, R]` squared norms, summed over the list."""
    step, start = torch.stack(squares).sum(0).cpu()
    return torch.sqrt(step / start.clamp(min=torch.finfo(start.dtype).tiny))


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


def _bytes_to_free(cache: SleepCache, window: Window) -> int:
    """Bytes of the slots, hidden states and tails that these rows lose at the boundary."""
    held = window.kept + window.lengths
    keep = held.clamp(max=cache.config.window - 1) if cache.is_sliding_eviction else held * 0
    slots, tokens, rows = int((held - keep).sum()), int(window.lengths.sum()), len(held)
    freed = tokens * window.hidden.shape[2] * window.hidden.element_size()
    for m in window.memory.values():
        if isinstance(m, AttentionMemory):
            freed += sum(slots * x.shape[1] * x.shape[3] * x.element_size() for x in m)
        elif not cache.is_sliding_eviction:
            freed += sum(rows * x[0].nbytes for x in m[1:] if x is not None)
    return freed
