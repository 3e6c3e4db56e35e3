"""What a sleep did, measured: SleepReport and the norms behind it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hybrid_sleep.sleep.cache import SleepCache, Window
from hybrid_sleep.sleep.state import AttentionMemory, FastWeights, Memory

Change = dict[int, torch.Tensor]


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


def change_of(
    before: Mapping[int, torch.Tensor], after: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Squared norms `[layers, 2, R]` of the step in each layer's S and of what it started from."""
    return torch.stack(
        [
            torch.stack(
                (
                    (S - before[i]).detach().square().flatten(1).sum(1),
                    before[i].detach().square().flatten(1).sum(1),
                )
            )
            for i, S in after.items()
        ]
    )


def relative_by_row(change: Change) -> torch.Tensor:
    """`||S_j - S_{j-1}|| / ||S_{j-1}||` over all layers together: `[R]` on the CPU."""
    step, start = torch.stack(list(change.values())).sum(0).cpu()
    return torch.sqrt(step / start.clamp(min=torch.finfo(start.dtype).tiny))


def relative_by_layer(
    cache: SleepCache, after: Mapping[int, Memory], changes: list[Change], name: str
) -> dict[int, list[float]]:
    """Relative change per layer and pass; raises ValueError where fast weights are not finite.

    The norms are waited for once. They tell of a NaN wherever a pass measured one; layers that no
    pass measured, or whose squares overflowed, are looked at themselves.
    """
    measured = [(layer, pair) for change in changes for layer, pair in change.items()]
    by_layer: dict[int, list[float]] = {layer: [] for layer, _ in measured}
    suspects = (set(cache.fast_weights) | set(after)) - set(by_layer)
    if measured:
        squares = torch.stack([pair.sum(1) for _, pair in measured]).tolist()
        for (layer, _), (step, start) in zip(measured, squares, strict=True):
            if math.isfinite(step + start):
                by_layer[layer].append(math.sqrt(step / max(start, sys.float_info.min)))
            else:
                suspects.add(layer)
    cache.check_finite(name, only=suspects)
    for layer in suspects:
        m = after.get(layer)
        if isinstance(m, FastWeights) and not bool(torch.isfinite(m.S).all()):
            raise ValueError(
                f"{name}: this sleep would leave a NaN or an infinity in the fast weights of "
                f"layer {layer}; the cache is as it was before"
            )
    return by_layer


def bytes_to_free(cache: SleepCache, window: Window) -> int:
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
