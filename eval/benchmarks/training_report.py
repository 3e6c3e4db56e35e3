"""Table and figure of `training`, from its results.json alone."""

from __future__ import annotations

import math
from typing import Any

from hybrid_sleep.support.provenance import describe

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


def _option(row: dict[str, Any]) -> str:
    cut = row["truncation"]
    return label(row["checkpointing"]) + ("" if cut is None else f", last {cut} of N")


def markdown(result: dict[str, Any]) -> str:
    """One row a setting and option, then the verdict."""
    lines = [f"| {' | '.join(HEAD)} |", "|---:|---:|---:|---|---|" + "---:|" * (len(HEAD) - 5)]
    for row in result["rows"]:
        cut = row["truncation"]
        cells = [
            *(str(row[name]) for name in ("window", "windows", "passes")),
            label(row["checkpointing"]),
            "all passes" if cut is None else f"last {cut}",
        ]
        if row["out_of_memory"]:
            cells += ["out of memory", *["-"] * 6]
        else:
            taken = row["time_ratio"]
            cells += [
                f"{row['tokens_per_second']:,.0f}",
                *(_mib(row[name]) for name in ("peak_bytes", "gradient_bytes", "held_bytes")),
                "-" if row["memory_ratio"] is None else f"**{row['memory_ratio']:.3f}**",
                "-" if taken is None else f"**{taken['median']:.2f}**",
                "-" if taken is None else " to ".join(f"{x:.2f}" for x in taken["quartiles"]),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    if "target" in result:
        target = result["target"]
        met = ", ".join(map(label, target["met_by"]))
        lines += [
            "",
            f"Target at {target['windows']} windows of {target['window']} and N = "
            f"{target['passes']}: memory at most {target['memory']:g} and time at most "
            f"{target['time']:g} of a step that keeps everything: "
            + (f"met by {met}." if met else "**missed**."),
        ]
    if not result["complete"]:
        lines += ["", f"Not complete ({result['ended']}); the same command goes on."]
    lines += ["", _method(result)]
    lines += ["", describe(result["provenance"])]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def _method(result: dict[str, Any]) -> str:
    row, rounds = result["rows"][0], sorted({r["rounds"] for r in result["rows"] if "rounds" in r})
    on_cpu = result["clock"] == "cpu_seconds"
    kind = row["autocast"] or "float32"
    return (
        f"Forward with its loss and backward, without an optimizer's step; batch {row['batch']}, "
        f"{row['layers']} layers of {row['hidden']} (three Gated DeltaNet, one attention), {kind}, "
        f"{row['vocabulary']} words, `every_window`. Medians of {'/'.join(map(str, rounds))} "
        "steps. memory and time: against a step that keeps everything, in turn with it in one "
        "process, pair by pair. Peak: above what lay there before the step, gradients included as "
        "far as they exist then, "
        + (
            "counted from every allocation and release. Times and tokens/s are of one thread's "
            "processor time, which other work on the machine lengthens less than that of the wall."
            if on_cpu
            else "as the CUDA allocator counts it. Times are on the clock of the wall."
        )
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def figure(result: dict[str, Any]) -> Any:
    """Memory against time of each option at the base setting; tokens/s against what is varied."""
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.plots import GREY, INK, PALE

    base = {name: result["rows"][0][name] for name in ("window", "windows", "passes")}
    speeds = {name: _speeds(result, base, name) for name in ("passes", "window")}
    speeds = {name: lines for name, lines in speeds.items() if lines}
    widths = [2.0, *[1.0] * len(speeds)]
    picture = Figure(figsize=(3.2 * sum(widths), 4.6), dpi=200, layout="constrained")
    panels = picture.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(labelsize=11, colors=INK)
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
    _draw_costs(panels[0], result, base)
    for axes, (name, lines) in zip(panels[1:], speeds.items(), strict=True):
        _draw_speeds(axes, lines, name)
    return picture


def _draw_costs(axes: Any, result: dict[str, Any], base: dict[str, int]) -> None:
    from hybrid_sleep.eval.plots import BLUE, GREEN, GREY, INK, ORANGE

    styles = {
        "by layers of a pass": (BLUE, "o"),
        "by windows": (ORANGE, "^"),
        "truncated: another gradient": (GREEN, "s"),
    }
    by_layers, by_windows, truncated = styles
    points = [(1.0, 1.0, "none")]
    axes.plot([1.0], [1.0], color=INK, marker="*", markersize=11, linestyle="none")
    seen = set()
    for row in _at(result, base):
        if row["memory_ratio"] is None or row["time_ratio"] is None:
            continue
        kind = by_windows if "window" in label(row["checkpointing"]) else by_layers
        kind = kind if row["truncation"] is None else truncated
        (colour, marker), taken = styles[kind], row["time_ratio"]
        x, (low, high) = taken["median"], taken["quartiles"]
        axes.errorbar(
            [x], [row["memory_ratio"]], xerr=[[x - low], [high - x]], color=colour, marker=marker,
            markersize=8, linestyle="none", label=None if kind in seen else kind,
        )  # fmt: skip
        points.append((x, row["memory_ratio"], _option(row)))
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
    if "target" in result:
        target = result["target"]
        top = _share(target["memory"])
        axes.axvspan(left, target["time"], ymax=top, color=GREEN, alpha=0.12, linewidth=0)
        axes.annotate(
            f"at most {target['memory']:g} at {target['time']:g}x", (0.02, top - 0.02),
            xycoords="axes fraction", fontsize=10, color=GREEN, va="top",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(*LIMITS)
    axes.set_xlim(left, right)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("time / time of keeping everything", fontsize=12)
    axes.set_ylabel("peak memory / that of keeping everything", fontsize=12)
    axes.set_title(
        f"A training step, {base['windows']} windows of {base['window']}, N = {base['passes']}",
        fontsize=13, color=INK, loc="left",
    )  # fmt: skip
    if seen:
        axes.legend(fontsize=10, frameon=False, loc="lower left")


def _share(value: float) -> float:
    """How high `value` stands between LIMITS, on their logarithmic axis."""
    low, high = map(math.log, LIMITS)
    return (math.log(value) - low) / (high - low)


def _speeds(
    result: dict[str, Any], base: dict[str, int], name: str
) -> dict[str, list[tuple[int, float]]]:
    """(`name`, tokens/s) by option, the rest as at the base setting; options seen once are left
    out."""
    rest = {key: value for key, value in base.items() if key != name}
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in _at(result, rest):
        if row["truncation"] is None and not row["out_of_memory"]:
            points = lines.setdefault(label(row["checkpointing"]), [])
            points.append((row[name], row["tokens_per_second"]))
    return {key: sorted(points) for key, points in lines.items() if len(points) > 1}


def _draw_speeds(axes: Any, lines: dict[str, list[tuple[int, float]]], name: str) -> None:
    from hybrid_sleep.eval.plots import BLUE, GREEN, INK, ORANGE, VERMILLION

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
    axes.set_title("tokens/s", fontsize=13, color=INK, loc="left")
    axes.legend(fontsize=9, frameon=False, loc="best")


def _at(result: dict[str, Any], setting: dict[str, int]) -> list[dict[str, Any]]:
    return [
        row for row in result["rows"] if all(row[name] == value for name, value in setting.items())
    ]
