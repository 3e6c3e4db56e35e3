"""Table and figure of `costs.training`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.costs.training import TARGET
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    VERMILLION,
    blank,
    dress,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.costs.training import TrainingCost, TrainingRow

LIMITS = (0.01, 2.0)  # of the memory axis
GAP = 0.06  # between the names of two options, in heights of the panel
HEAD = ("L", "windows", "N", "checkpointing", "gradients through", "tokens/s", "peak, MiB",
        "gradients, MiB", "held before the backward, MiB", "memory", "time",
        "quartiles")  # fmt: skip


def label(checkpointing: Any) -> str:
    """A granularity of `set_activation_checkpointing` in words."""
    if isinstance(checkpointing, (list, tuple)):
        return " + ".join(map(label, checkpointing))
    if isinstance(checkpointing, int):
        return f"{checkpointing} layer" + "s" * (checkpointing > 1)
    return checkpointing or "none"


def option(row: TrainingRow) -> str:
    """Checkpointing and truncation of a row in words."""
    cut = row.truncation
    return label(row.checkpointing) + ("" if cut is None else f", last {cut} of N")


def markdown(result: TrainingCost) -> str:
    """One row a setting and option, then the verdict."""
    lines = table(HEAD, [_cells(result, row) for row in result.rows], "rrrllr")
    met = result.target_met_by
    if met is not None:
        base = result.base
        verdict = f"met by {', '.join(map(label, met))}" if met else "**missed**"
        lines += [
            "",
            f"Target at {base['windows']} windows of {base['window']} and N = {base['passes']}: "
            f"memory at most {TARGET['memory']:g} and time at most {TARGET['time']:g} of a step "
            f"that keeps everything: {verdict}.",
        ]
    return "\n".join([*lines, "", _method(result), *result.footer()]) + "\n"


def _cells(result: TrainingCost, row: TrainingRow) -> list[Any]:
    cut, taken = row.truncation, row.time_ratio
    setting = [
        row.window,
        row.windows,
        row.passes,
        label(row.checkpointing),
        "all passes" if cut is None else f"last {cut}",
    ]
    if row.out_of_memory:
        return [*setting, "out of memory", *["-"] * 6]
    memory = result.memory_ratio(row)
    return [
        *setting,
        f"{row.tokens_per_second:,.0f}",
        *(_mib(size) for size in (row.peak_bytes, row.gradient_bytes, row.held_bytes)),
        "-" if memory is None else f"**{memory:.3f}**",
        "-" if taken is None else f"**{taken.median:.2f}**",
        "-" if taken is None else " to ".join(f"{x:.2f}" for x in taken.quartiles),
    ]


def _method(result: TrainingCost) -> str:
    row, rounds = result.rows[0], sorted({row.rounds for row in result.rows if row.rounds})
    on_cpu = result.clock == "cpu_seconds"
    return (
        "Forward pass with its loss and backward pass, without an optimizer's step; batch "
        f"{row.batch}, {row.layers} layers of {row.hidden} (three Gated DeltaNet, one attention), "
        f"{row.autocast or 'float32'}, vocabulary {row.vocabulary}, `every_window`. Medians of "
        f"{'/'.join(map(str, rounds))} steps. memory and time: relative to a step that keeps "
        "everything, run alternately with it in one process, pair by pair. Peak: above what was "
        "there before the step, gradients included as far as they exist then, "
        + (
            "counted from every allocation and release. Times and tokens/s are of one thread's "
            "processor time, which other programs lengthen less than elapsed time."
            if on_cpu
            else "as the CUDA allocator counts it. Times are elapsed times."
        )
    )


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def figure(result: TrainingCost) -> Figure:
    """Memory against time of each option at the base setting; tokens/s against what is varied."""
    base = result.base
    speeds = {name: _speeds(result, base, name) for name in ("passes", "window")}
    speeds = {name: lines for name, lines in speeds.items() if lines}
    widths = [2.0, *[1.0] * len(speeds)]
    picture = blank(3.2 * sum(widths), 4.6)
    panels = picture.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    title = f"A training step, {base['windows']} windows of {base['window']}, N = {base['passes']}"
    _draw_costs(dress(panels[0], title), result, base)
    for axes, (name, lines) in zip(panels[1:], speeds.items(), strict=True):
        _draw_speeds(dress(axes, "tokens/s"), lines, name)
    return picture


def _draw_costs(axes: Any, result: TrainingCost, base: dict[str, int]) -> None:
    styles = {
        "by layers of a pass": (BLUE, "o"),
        "by windows": (ORANGE, "^"),
        "truncated: another gradient": (GREEN, "s"),
    }
    by_layers, by_windows, truncated = styles
    points = [(1.0, 1.0, "none")]
    axes.plot([1.0], [1.0], color=INK, marker="*", markersize=11, linestyle="none")
    seen = set()
    for row in result.rows:
        memory, taken = result.memory_ratio(row), row.time_ratio
        if not row.at(base) or memory is None or taken is None:
            continue
        kind = by_windows if "window" in label(row.checkpointing) else by_layers
        kind = kind if row.truncation is None else truncated
        colour, marker = styles[kind]
        x, (low, high) = taken.median, taken.quartiles
        axes.errorbar(
            [x], [memory], xerr=[[x - low], [high - x]], color=colour, marker=marker,
            markersize=8, linestyle="none", label=None if kind in seen else kind,
        )  # fmt: skip
        points.append((x, memory, option(row)))
        seen.add(kind)
    left, right = min(0.5, *(x for x, _, _ in points)) - 0.05, max(x for x, _, _ in points) + 0.1
    # Options lie close together: their names stand in a column, each with a line to its point.
    points.sort(key=lambda point: -point[1])
    heights = [1.0 + GAP]
    for _, y, _ in points:
        heights.append(min(heights[-1] - GAP, _share(y)))
    for index, (x, y, name) in enumerate(points):
        height = max(heights[index + 1], GAP * (len(points) - index - 0.5))
        axes.annotate(
            name, (x, y), xytext=(1.02, height), textcoords="axes fraction", fontsize=10,
            color=INK, va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip
    if result.target_met_by is not None:
        top = _share(TARGET["memory"])
        axes.axvspan(left, TARGET["time"], ymax=top, color=GREEN, alpha=0.12, linewidth=0)
        axes.annotate(
            f"at most {TARGET['memory']:g} at {TARGET['time']:g}x", (0.02, top - 0.02),
            xycoords="axes fraction", fontsize=10, color=GREEN, va="top",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(*LIMITS)
    axes.set_xlim(left, right)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("time / time of keeping everything", fontsize=12)
    axes.set_ylabel("peak memory / that of keeping everything", fontsize=12)
    if seen:
        axes.legend(fontsize=10, frameon=False, loc="lower left")


def _share(value: float) -> float:
    """How high `value` stands between LIMITS, on their logarithmic axis."""
    low, high = map(math.log, LIMITS)
    return (math.log(value) - low) / (high - low)


def _speeds(
    result: TrainingCost, base: dict[str, int], name: str
) -> dict[str, list[tuple[int, float]]]:
    """(`name`, tokens/s) by option, the rest as at the base setting; options seen once are left
    out."""
    rest = {key: value for key, value in base.items() if key != name}
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result.rows:
        if row.at(rest) and row.truncation is None and row.tokens_per_second is not None:
            points = lines.setdefault(label(row.checkpointing), [])
            points.append((getattr(row, name), row.tokens_per_second))
    return {key: sorted(points) for key, points in lines.items() if len(points) > 1}


def _draw_speeds(axes: Any, lines: dict[str, list[tuple[int, float]]], name: str) -> None:
    styles = ((INK, "*"), (BLUE, "o"), (ORANGE, "^"), (GREEN, "s"), (VERMILLION, "D"))
    for index, (key, points) in enumerate(lines.items()):
        colour, marker = styles[index % len(styles)]
        dash = "-" if index < len(styles) else (0, (5, 1.5))
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=dash,
                  markersize=7, linewidth=1.8, label=key)  # fmt: skip
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sleep depth N" if name == "passes" else "window L", fontsize=12)
    axes.legend(fontsize=9, frameon=False, loc="best")
