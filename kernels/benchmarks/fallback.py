"""The gated delta rule on a CPU compared with the PyTorch fallback inside transformers.

Both get the same normalised q and k and the same initial state, and both return the final state.
Their calls are interleaved in one process, so that other load on the machine slows both; every
ratio is that of a pair.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hybrid_sleep.kernels.benchmarks.cases import BOTH, FORWARD, Shape
from hybrid_sleep.kernels.benchmarks.timing import interleaved, median_and_quartiles
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.resume import collect
from hybrid_sleep.validation import check_count

LEAST_SECONDS = 1.5
# Speedups to reach, as geometric means over the shapes, slower on none of them.
TARGETS = {FORWARD: 2.0, BOTH: 1.5}

SHAPES = tuple(
    Shape(T, B, H, d)
    for T, B in ((24, 128), (75, 32), (256, 8), (2048, 1))
    for H in (4, 8)
    for d in (32, 64, 128)
)


def run(
    shapes: Sequence[Shape] | None = None,
    *,
    repeats: int = 7,
    least_seconds: float = LEAST_SECONDS,
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time both implementations on every shape (default: SHAPES), forward and forward + backward.

    At least `repeats` pairs of each, more where that takes less than `least_seconds`. A row's
    `ratio` is the median over its pairs of the fallback's time over ours (above 1: ours is faster),
    `error` the largest difference of any result or gradient, relative to its largest value.
    minutes, out, progress: see `support.resume.collect`.

    Raises ValueError when `repeats` is below 2 or `minutes` not above 0.
    """
    check_count("repeats", repeats, 2)

    def measure(key: dict[str, Any]) -> dict[str, Any]:
        shape = Shape(**{name: key[name] for name in Shape._fields})
        return _measure(shape, key["direction"], repeats, least_seconds)

    return collect(
        {
            "benchmark": "fallback",
            "rows": [],
            "summary": {},
            "command": command,
            "provenance": provenance("cpu"),
        },
        [
            {**shape._asdict(), "direction": direction}
            for shape in (SHAPES if shapes is None else shapes)
            for direction in TARGETS
        ],
        measure,
        finish=_summarise,
        minutes=minutes,
        out=out,
        progress=progress,
    )


def _measure(shape: Shape, direction: str, repeats: int, least_seconds: float) -> dict[str, Any]:
    works = _works(shape)
    error = max(map(_error, *(work() for work in works[BOTH])))
    ours, fallback = works[direction]
    # The first run of each is slower and does not count.
    ours()
    fallback()
    seconds = interleaved({"ours": ours, "fallback": fallback}, repeats, least_seconds)
    pairs = zip(seconds["ours"], seconds["fallback"], strict=True)
    ratio, quartiles = median_and_quartiles([b / a for a, b in pairs])
    return {
        "ratio": ratio,
        "quartiles": quartiles,
        "error": error,
        "ours_seconds": seconds["ours"],
        "fallback_seconds": seconds["fallback"],
    }


def _summarise(result: dict[str, Any]) -> None:
    directions = {row["direction"] for row in result["rows"]}
    result["summary"] = {
        direction: _summary(result["rows"], direction)
        for direction in TARGETS
        if direction in directions
    }


def _summary(rows: list[dict[str, Any]], direction: str) -> dict[str, float | bool]:
    ratios = [row["ratio"] for row in rows if row["direction"] == direction]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    target = TARGETS[direction]
    reached = mean >= target and min(ratios) >= 1
    return {"geometric_mean": mean, "least": min(ratios), "target": target, "reached": reached}


def _works(shape: Shape) -> dict[str, tuple[Callable, Callable]]:
    """For each direction, ours and the fallback, as functions that return what they computed."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    # Without the decorator that would prefer an optional package, if one is installed.
    compute = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    T, B, H, d = shape
    drawn = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=drawn)

    inputs = [
        normalize(draw(B, T, H, d), dim=-1),
        normalize(draw(B, T, H, d), dim=-1),
        draw(B, T, H, d),
        -draw(B, T, H).abs() / 2,
        draw(B, T, H).sigmoid(),
        draw(B, H, d, d),
    ]
    grad_outputs = [draw(B, T, H, d), draw(B, H, d, d)]
    inputs = [x.requires_grad_() for x in inputs]

    def ours(q, k, v, g, beta, state):
        return gated_delta_rule(q, k, v, g, beta, initial_state=state)

    def fallback(q, k, v, g, beta, state):
        return compute(q, k, v, g, beta, initial_state=state, output_final_state=True)

    def forward(op: Callable) -> Callable:
        def work():
            with torch.no_grad():
                return op(*inputs)

        return work

    def both_ways(op: Callable) -> Callable:
        def work():
            results = op(*inputs)
            return [*results, *torch.autograd.grad(results, inputs, grad_outputs)]

        return work

    return {
        FORWARD: (forward(ours), forward(fallback)),
        BOTH: (both_ways(ours), both_ways(fallback)),
    }


def _error(found: Tensor, reference: Tensor) -> float:
    found, reference = found.detach(), reference.detach()
    return float((found - reference).abs().max() / reference.abs().max())
