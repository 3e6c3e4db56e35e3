"""A run in one figure, from its `metrics.jsonl` alone."""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.support.io import read_json_lines
from hybrid_sleep.support.plots import BLUE, GREY, SKY, STYLES, new_panels, save_figure
from hybrid_sleep.training.depth import Drawn, in_words
from hybrid_sleep.training.folder import FIGURE_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH = 0.04  # share of a run's steps that the smoothed loss averages over
TAIL = 0.1  # share of a run at its start and at its end whose loss is shown by position


def plot_run(metrics_path: str | os.PathLike, majority: float | None = None) -> Figure:
    """Loss by step and depth; below it what was evaluated, and the loss by position, if recorded.

    majority: what always guessing the most frequent label scores, drawn among exact accuracies.
    Raises FileNotFoundError if there is no such file, ValueError if it holds no training step.
    """
    records = _read(Path(metrics_path))
    losses = [
        (line["step"], _drawn(line["depth"]), line["loss"]) for line in records if "depth" in line
    ]
    if not losses:
        raise ValueError(f"metrics_path must hold training steps, got none in {metrics_path}")
    measures = [name for name in ("exact", "perplexity") if any(name in r for r in records)]
    drawn = {depth for _, depth, _ in losses}
    depths = {depth for depth in drawn if isinstance(depth, int)}
    for name in measures:
        depths |= {int(depth) for record in records for depth in record.get(name, ())}
    at_once = sorted(depth for depth in drawn if isinstance(depth, tuple))
    styles = _styles([*sorted(depths), *at_once])
    by_position = [record for record in records if "loss_by_position" in record]
    names = {"exact": "Exact accuracy", "perplexity": "Held-out perplexity"}
    titles = ["Training loss", *(names[name] for name in measures)]
    titles += ["Loss by position in the window"] if by_position else []
    figure, axes = new_panels(titles, height=3.1)
    _draw_loss(axes[0], losses, styles)
    for panel, name in zip(axes[1:], measures, strict=False):
        _draw_measure(panel, records, name, styles, majority if name == "exact" else None)
    for panel in axes[: 1 + len(measures)]:
        panel.set_xlabel("training step", fontsize=13)
        panel.set_xlim(0, 1.02 * records[-1]["step"])
    if by_position:
        _draw_positions(axes[-1], by_position)
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=color, marker=marker, linestyle=line, linewidth=2, label=in_words(depth)
        )
        for depth, (color, marker, line) in styles.items()
    ]
    figure.legend(
        handles=handles, title="sleep depth N", title_fontsize=11, fontsize=11, frameon=False,
        loc="outside lower center", ncols=min(8, len(handles)), handlelength=2.6,
    )  # fmt: skip
    return figure


def save_run_plot(
    metrics_path: str | os.PathLike, out: str | os.PathLike, majority: float | None = None
) -> Path:
    """Write `plot_run`'s figure into the folder `out`, atomically; its path."""
    path = Path(out) / FIGURE_FILE
    save_figure(plot_run(metrics_path, majority), path)
    return path


def smoothed(points: Sequence[tuple[int, float]], width: float) -> list[float]:
    """For each (step, value), steps ascending, the mean of all values within `width` / 2 steps."""
    steps = [step for step, _ in points]
    means = []
    for step in steps:
        first = bisect.bisect_left(steps, step - width / 2)
        last = bisect.bisect_right(steps, step + width / 2)
        means.append(_mean([value for _, value in points[first:last]]))
    return means


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"metrics_path must be a run's metrics.jsonl, got {str(path)!r}")
    return read_json_lines(path)


def _drawn(depth: int | list[int]) -> Drawn:
    return depth if isinstance(depth, int) else tuple(depth)


def _styles(depths: list[Drawn]) -> dict[Drawn, tuple[str, str, Any]]:
    """A colour, marker and line for each depth; a scale of one colour where they do not suffice."""
    if len(depths) <= len(STYLES):
        return dict(zip(depths, STYLES, strict=False))
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    markers = [marker for _, marker, _ in STYLES]
    return {
        depth: (
            to_hex(colormaps["cividis"](i / (len(depths) - 1))), markers[i % len(markers)], "-"
        )
        for i, depth in enumerate(depths)
    }  # fmt: skip


def _draw_loss(
    axes: Axes, losses: list[tuple[int, Drawn, float]], styles: dict[Drawn, Any]
) -> None:
    width = SMOOTH * losses[-1][0]
    for depth, (color, _, line) in styles.items():
        own = [(step, loss) for step, drawn, loss in losses if drawn == depth]
        if own:
            steps = [step for step, _ in own]
            axes.plot(steps, [loss for _, loss in own], color=color, alpha=0.35, linewidth=0.7)
            axes.plot(steps, smoothed(own, width), color=color, linestyle=line, linewidth=2)
    axes.set_ylabel("loss of a step", fontsize=13)
    values = sorted(loss for _, _, loss in losses)
    # The first steps of a run would otherwise flatten all the others.
    low, high = values[0], values[int(0.98 * (len(values) - 1))]
    room = 0.08 * (high - low) or 0.1
    axes.set_ylim(0 if 0 <= low < 0.5 * high else low - room, high + room)


def _draw_measure(
    axes: Axes,
    records: list[dict[str, Any]],
    name: str,
    styles: dict[Drawn, Any],
    majority: float | None,
) -> None:
    found = [(record["step"], record[name]) for record in records if name in record]
    for depth, (color, marker, line) in styles.items():
        own = [(step, values[str(depth)]) for step, values in found if str(depth) in values]
        axes.plot(
            [step for step, _ in own], [value for _, value in own], color=color, marker=marker,
            markersize=6, linestyle=line, linewidth=2,
        )  # fmt: skip
    if name == "perplexity":
        axes.set_ylabel("perplexity", fontsize=13)
        return
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_ylabel("exact accuracy", fontsize=13)
    if majority is not None:
        axes.axhline(majority, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
        axes.annotate(
            f"majority {100 * majority:.1f} %", (1, majority), xycoords=("axes fraction", "data"),
            xytext=(0, -5), textcoords="offset points", ha="right", va="top", fontsize=11,
            color=GREY,
        )  # fmt: skip


def _draw_positions(axes: Axes, records: list[dict[str, Any]]) -> None:
    last = records[-1]["step"]
    early = records[: max(1, round(TAIL * len(records)))]
    late = [record for record in records if record["step"] > (1 - TAIL) * last] or records[-1:]
    bins = len(records[-1]["loss_by_position"])
    for some, label, color, line, marker in (
        (early, "first tenth of the run", SKY, (0, (5, 1.5)), "s"),
        (late, "last tenth", BLUE, "-", "o"),
    ):
        columns = zip(*(record["loss_by_position"] for record in some), strict=True)
        means = [_mean([value for value in column if value is not None]) for column in columns]
        positions = [(i + 0.5) / bins for i in range(bins)]
        axes.plot(positions, means, color=color, linestyle=line, marker=marker, linewidth=2.2,
                  markersize=6, label=label)  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.1 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else None)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("position of the predicted token in its window", fontsize=13)
    axes.set_ylabel("loss", fontsize=13)
    axes.legend(fontsize=11, frameon=False)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
