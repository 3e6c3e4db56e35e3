"""What a sleep of depth N costs, against N plain calls of the model on the same window.

A sleep reuses pass 1 and computes no logits, so it should take at most (N-1)/N of the N calls.
Both are timed in one process, in turn and in alternating order, and compared pair by pair. On a
CUDA device `sleep_on_gpu` measures instead; its claims are made there alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from hybrid_sleep.eval.benchmarks import sleep_on_gpu
from hybrid_sleep.eval.benchmarks.generation import synchronise
from hybrid_sleep.eval.benchmarks.models import VOCABULARY, untrained
from hybrid_sleep.support.provenance import check_device, describe, provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.validation import check_count

LEAST_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and the windows it reads."""

    state_space: str
    batch: int
    window: int
    hidden: int
    layers: int
    eviction: str = "hard"
    loop: tuple[int, int] | None = None


def _shapes() -> tuple[Shape, ...]:
    shapes = []
    for state_space in ("gated_deltanet", "mamba2"):
        for batch, window, hidden, layers in (
            (1, 24, 64, 2),
            (128, 24, 64, 2),
            (8, 75, 128, 4),
            (1, 256, 256, 4),
            (1, 1024, 256, 4),
        ):
            size = {"batch": batch, "window": window, "hidden": hidden, "layers": layers}
            shapes.append(Shape(state_space=state_space, **size))
        middle = {"batch": 8, "window": 75, "hidden": 128, "layers": 4}
        shapes.append(Shape(state_space=state_space, **middle, eviction="sliding"))
        shapes.append(Shape(state_space=state_space, **middle, loop=(1, 3)))
    return tuple(shapes)


SHAPES = _shapes()


def run(
    *,
    shapes: Sequence[Shape] = SHAPES,
    passes: Sequence[int] = (2, 4, 8),
    repeats: int = 9,
    least_seconds: float = LEAST_SECONDS,
    device: str = "cpu",
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time both sides on every shape and depth; `ratio` is the median over paired runs.

    At least `repeats` pairs of each, more where that takes less than `least_seconds`. `quartiles`
    are those of the paired ratios, `bound` is (N-1)/N. Interrupted after the first row, or out of
    `minutes`, it returns the rows it has, with `complete` False; rows that `out` has from the same
    code on the same machine are kept. On a CUDA device: see `sleep_on_gpu.run`, which has shapes
    and depths of its own.
    """
    import torch

    check_device(device)
    check_count("repeats", repeats, 2)
    for depth in passes:
        check_count("passes", depth, 2)
    slice_of = {"minutes": minutes, "out": out, "progress": progress}
    if torch.device(device).type == "cuda":
        return sleep_on_gpu.run(repeats=repeats, device=device, command=command, **slice_of)
    result = {
        "benchmark": "sleep",
        "measured_on": "cpu",
        "repeats": repeats,
        "rows": [],
        "command": command,
        "provenance": provenance(device),
    }
    models: dict[Shape, Any] = {}

    def measure(names: Row) -> Row:
        options = {name: value for name, value in names.items() if name != "passes"}
        options["loop"] = None if options["loop"] is None else tuple(options["loop"])
        shape, depth = Shape(**options), names["passes"]
        if shape not in models:
            models.clear()
            del options["batch"]
            models[shape] = untrained(device=device, **options)
        pairs = time_pairs(models[shape], shape.batch, depth, repeats, least_seconds)
        return {
            "pairs": len(pairs),
            "sleep_seconds": median(slept for slept, _ in pairs),
            "calls_seconds": median(called for _, called in pairs),
            **compare(pairs),
            "bound": (depth - 1) / depth,
        }

    def finish(result: dict[str, Any]) -> None:
        result["within_bound"] = all(row["ratio"] <= row["bound"] for row in result["rows"])

    wanted = [{**asdict(shape), "passes": depth} for shape in shapes for depth in passes]
    return collect(result, wanted, measure, finish=finish, **slice_of)


def compare(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Median and quartiles of the ratios of paired times."""
    low, middle, high = quantiles((a / b for a, b in pairs), n=4, method="inclusive")
    return {"ratio": middle, "quartiles": [low, high]}


def time_pairs(
    model: Any, batch: int, depth: int, repeats: int, least_seconds: float
) -> list[tuple[float, float]]:
    """(seconds of one sleep, seconds of `depth` calls) of at least `repeats` paired runs."""
    import torch

    device = next(model.parameters()).device
    drawn = torch.Generator().manual_seed(0)
    shape = (batch, model.config.window)
    input_ids = torch.randint(VOCABULARY, shape, generator=drawn).to(device)

    def timed(work: Callable[[], Any]) -> float:
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        return time.perf_counter() - began

    def sleep() -> float:
        cache = model(input_ids=input_ids, use_cache=True).cache
        seconds = timed(lambda: model.sleep(cache, passes=depth))
        done = cache.reports[-1].passes
        if done != depth:
            raise RuntimeError(f"the sleep did {done} passes where {depth} were asked for")
        return seconds

    def calls() -> float:
        return timed(lambda: [model(input_ids=input_ids) for _ in range(depth)])

    pairs = []
    with torch.no_grad():
        sleep()
        calls()
        began = time.perf_counter()
        while len(pairs) < repeats or time.perf_counter() < began + least_seconds:
            if len(pairs) % 2:
                called, slept = calls(), sleep()
            else:
                slept, called = sleep(), calls()
            pairs.append((slept, called))
    return pairs


def markdown(result: dict[str, Any]) -> str:
    """One row a shape and depth."""
    if result.get("measured_on") == "cuda":
        return sleep_on_gpu.markdown(result)
    head = ["state space", "eviction", "loop", "B", "L", "D", "layers", "N", "sleep, ms",
            "N calls, ms", "ratio", "quartiles", "(N-1)/N", "within"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for row in result["rows"]:
        cells = [
            row["state_space"],
            row["eviction"],
            "all" if row["loop"] is None else f"{row['loop'][0]} to {row['loop'][1]}",
            *(str(row[name]) for name in ("batch", "window", "hidden", "layers", "passes")),
            f"{1000 * row['sleep_seconds']:.2f}",
            f"{1000 * row['calls_seconds']:.2f}",
            f"**{row['ratio']:.3f}**",
            " to ".join(f"{value:.3f}" for value in row["quartiles"]),
            f"{row['bound']:.3f}",
            "yes" if row["ratio"] <= row["bound"] else "**no**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    fewest, most = (pick(row["pairs"] for row in result["rows"]) for pick in (min, max))
    if not result["complete"]:
        ended = result.get("ended", "interrupted").capitalize()
        lines += ["", f"{ended}; the shapes after these were not measured."]
    lines += [
        "",
        f"Medians of {fewest} to {most} paired runs in one process, in alternating order. A call "
        "returns logits for the whole window and a cache, as `model(input_ids)` does by default."
        + (" Measured on a CPU; says nothing about a GPU." if "measured_on" in result else ""),
        "",
        describe(result["provenance"]),
    ]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any]) -> Any:
    """The ratio of every shape, grouped by depth, under its bound."""
    if result.get("measured_on") == "cuda":
        return sleep_on_gpu.figure(result)
    from hybrid_sleep.eval.plots import BLUE, INK, ORANGE, new_figure

    picture, axes = new_figure("A sleep of depth N against N calls of the model")
    depths = sorted({row["passes"] for row in result["rows"]})
    styles = {"gated_deltanet": (BLUE, "o", -0.12), "mamba2": (ORANGE, "^", 0.12)}
    for place, depth in enumerate(depths):
        axes.hlines(
            (depth - 1) / depth, place - 0.4, place + 0.4, color=INK, linewidth=2,
            label="(N-1)/N" if place == 0 else None,
        )  # fmt: skip
    for name, (colour, marker, shift) in styles.items():
        points = [
            (depths.index(row["passes"]) + shift, row["ratio"])
            for row in result["rows"]
            if row["state_space"] == name
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=8,
                linestyle="none", alpha=0.8, label=name,
            )  # fmt: skip
    axes.set_ylim(0, 1.04)
    axes.set_xticks(range(len(depths)), [f"N = {depth}" for depth in depths])
    axes.set_ylabel("time of the sleep / time of N calls", fontsize=13)
    picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=3)
    return picture
