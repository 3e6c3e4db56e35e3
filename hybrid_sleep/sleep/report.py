"""The record of a sleep: SleepReport, and the norms behind it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hybrid_sleep.sleep.state import LayerState

if TYPE_CHECKING:
    from hybrid_sleep.sleep.cache import SleepCache, Window
    from hybrid_sleep.sleep.carry import Outcome

# Squared norms `[R, layers, 2]` of one pass, with the layers they are of.
Change = tuple[Sequence[int], torch.Tensor]


@dataclass
class SleepReport:
    """What one sleep did.

    rows: which rows of the batch slept.
    tokens: how many tokens were consolidated in all; tokens_by_row: in each of `rows`.
    passes: depth reached, pass 1 included (the largest over rows); passes_by_row: each row's.
    change: per looped state-space layer, `||S_j - S_{j-1}|| / ||S_{j-1}||` of passes j = 2, 3, ...
    bytes_freed: keys, values, hidden states and tails that the boundary dropped.
    seconds: wall-clock time.
    path: how the passes were run: "cuda graph: captured", "cuda graph: replayed", or "eager: " and
        why no graph was used.
    kind: "fast", a sleep of the fast weights. time: when it began, seconds since 1970 (UTC).
    """

    rows: list[int]
    tokens: int
    tokens_by_row: list[int]
    passes: int
    passes_by_row: list[int]
    change: dict[int, list[float]] = field(default_factory=dict)
    bytes_freed: int = 0
    seconds: float = 0.0
    path: str = ""
    kind: str = "fast"
    time: float = field(default_factory=time.time)

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
            + (f"; {self.path}" if self.path else "")
            + (f"; change of S by pass: {change}" if change else "")
        )


def nothing_slept() -> SleepReport:
    """The report of a sleep for which no row has tokens."""
    return SleepReport([], 0, [], 0, [])


def change_of(
    before: Mapping[int, torch.Tensor], after: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Squared norms `[R, layers, 2]` of the step in each layer's S and of what it started from."""

    def square(x: torch.Tensor) -> torch.Tensor:
        return x.detach().square().flatten(1).sum(1)

    pairs = [torch.stack((square(S - before[i]), square(before[i])), -1) for i, S in after.items()]
    return torch.stack(pairs, dim=1)


def relative_by_row(change: torch.Tensor) -> torch.Tensor:
    """`||S_j - S_{j-1}|| / ||S_{j-1}||` over all layers together: `[R]` on the CPU."""
    step, start = change.transpose(0, 1).sum(0).cpu().unbind(-1)
    return torch.sqrt(step / start.clamp(min=torch.finfo(start.dtype).tiny))


def relative_by_layer(
    cache: SleepCache, after: Mapping[int, LayerState], changes: Sequence[Change], name: str
) -> dict[int, list[float]]:
    """Relative change per layer and pass; raises ValueError where fast weights are not finite.

    The norms are waited for once. They tell of a NaN wherever a pass measured one; layers that no
    pass measured, or whose squares overflowed, are looked at themselves.
    """
    by_layer: dict[int, list[float]] = {i: [] for layers, _ in changes for i in layers}
    suspects = (set(cache.fast_weights) | set(after)) - set(by_layer)
    if changes:
        squares = torch.stack([change.sum(0) for _, change in changes]).tolist()
        for (layers, _), of_pass in zip(changes, squares, strict=True):
            for layer, (step, start) in zip(layers, of_pass, strict=True):
                if math.isfinite(step + start):
                    by_layer[layer].append(math.sqrt(step / max(start, sys.float_info.min)))
                else:
                    suspects.add(layer)
    cache.check_finite(name, only=suspects)
    for layer in suspects:
        S = after.get(layer, LayerState()).S
        if S is not None and not bool(torch.isfinite(S).all()):
            raise ValueError(
                f"{name}: this sleep would leave a NaN or an infinity in the fast weights of "
                f"layer {layer}; the cache is as it was before"
            )
    return by_layer


def report_of(
    window: Window, done: Outcome, change: dict[int, list[float]], freed: int, began: float
) -> SleepReport:
    """The report of a sleep of `window` that began at `time.perf_counter() == began`.

    freed: bytes that the boundary dropped.
    """
    seconds = time.perf_counter() - began
    return SleepReport(
        rows=window.rows.tolist(),
        tokens=int(window.lengths.sum()),
        tokens_by_row=window.lengths.tolist(),
        passes=int(done.depths.max()),
        passes_by_row=done.depths.tolist(),
        change=change,
        bytes_freed=freed,
        seconds=seconds,
        path=done.path,
        time=time.time() - seconds,
    )
