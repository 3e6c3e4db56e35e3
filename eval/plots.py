"""Accuracy against depth as a figure. Palette and axes are those of `support.plots`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hybrid_sleep.support.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    SKY,
    STYLES,
    VERMILLION,
    new_figure,
    new_panels,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Where older imports look for them.
__all__ = [
    "BLUE", "GREEN", "GREY", "INK", "ORANGE", "PALE", "SKY", "STYLES", "VERMILLION",
    "depth_figure", "new_figure", "new_panels", "save_figure",
]  # fmt: skip


def depth_figure(result: dict[str, Any]) -> Figure:
    """Exact accuracy against depth, and the floor; several checkpoints behind their mean."""
    runs = result["runs"]
    depths = [int(depth) for depth in result["accuracy"]]
    accuracy = list(result["accuracy"].values())
    asked = "one checkpoint" if len(runs) == 1 else f"{len(runs)} checkpoints, each"
    figure, axes = new_figure(f"{result['task']['name']}: {asked} asked at {len(depths)} depths")
    deepest = max((max(run["trained_depths"]) for run in runs), default=0)
    if deepest < max(depths):
        axes.axvspan(deepest + 0.5, max(depths) + 0.65, color=GREY, alpha=0.1, linewidth=0)
        axes.annotate(
            "deeper than trained", (deepest + 0.6, 0.02), fontsize=11, color=GREY, va="bottom"
        )
    floor = result["floor"]
    axes.axhline(floor, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
    axes.annotate(
        f"floor: always the most frequent label, {_percent(floor)}",
        (1, floor), xycoords=("axes fraction", "data"), xytext=(0, -5),
        textcoords="offset points", ha="right", va="top", fontsize=11, color=GREY,
    )  # fmt: skip
    if len(runs) == 1:
        ends = list(runs[0]["interval"].values())
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(accuracy, ends, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(accuracy, ends, strict=True)],
        ]
        axes.errorbar(
            depths, accuracy, yerr=errors, color=BLUE, marker="o", markersize=8, linewidth=2.5,
            capsize=4, label="this model (bars: 95 %)",
        )  # fmt: skip
    else:
        for index, run in enumerate(runs):
            axes.plot(
                depths, list(run["exact"].values()), color=SKY, linewidth=1.2, marker=".",
                label="each seed" if index == 0 else None,
            )  # fmt: skip
        low, high = zip(*result["spread"].values(), strict=True)
        axes.fill_between(depths, low, high, color=SKY, alpha=0.3, linewidth=0)
        axes.plot(
            depths, accuracy, color=BLUE, marker="o", markersize=8, linewidth=2.5,
            label=f"mean of {len(runs)} seeds",
        )  # fmt: skip
    baseline = result["baseline"]
    if baseline:
        at = str(baseline["depth"])
        value, (low, high) = baseline["accuracy"][at], baseline["spread"][at]
        axes.errorbar(
            [baseline["depth"]], [value], yerr=[[value - low], [high - value]], color=VERMILLION,
            marker="D", markersize=10, linestyle="none", capsize=4, zorder=4,
            label=f"trained at N = {at} only, {baseline['examples_ratio']:.0f}x the examples",
        )  # fmt: skip
    for depth, value in zip(depths, accuracy, strict=True):
        axes.annotate(
            _percent(value), (depth, value), xytext=(4, -9), textcoords="offset points",
            ha="left", va="top", fontsize=11, color=INK,
        )  # fmt: skip
    axes.set_ylim(0, 1.04)
    axes.set_xticks(depths)
    axes.set_xlim(min(depths) - 0.35, max(depths) + 0.65)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("sleep depth N (passes over each window)", fontsize=13)
    axes.set_ylabel("every label right", fontsize=13)
    figure.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=2)
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
