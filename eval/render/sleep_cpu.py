"""Table and figure of `costs.sleep_cpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import BLUE, INK, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.costs.sleep_cpu import SleepCost


def markdown(result: SleepCost) -> str:
    """One row a shape and depth."""
    head = ["state space", "eviction", "loop", "B", "L", "D", "layers", "N", "sleep, ms",
            "N calls, ms", "ratio", "quartiles", "(N-1)/N", "within"]  # fmt: skip
    cells = [
        [
            row.state_space,
            row.eviction,
            "all" if row.loop is None else f"{row.loop[0]} to {row.loop[1]}",
            row.batch,
            row.window,
            row.hidden,
            row.layers,
            row.passes,
            f"{1000 * row.sleep_seconds:.2f}",
            f"{1000 * row.calls_seconds:.2f}",
            f"**{row.ratio:.3f}**",
            " to ".join(f"{value:.3f}" for value in row.quartiles),
            f"{row.bound:.3f}",
            "yes" if row.within else "**no**",
        ]
        for row in result.rows
    ]
    fewest, most = (pick(row.pairs for row in result.rows) for pick in (min, max))
    lines = [
        *table(head, cells, "lllr"),
        "",
        f"Medians of {fewest} to {most} pairs of runs in one process, in alternating order. "
        "A call returns logits for the whole window and a cache, as `model(input_ids)` does by "
        "default. Measured on a CPU; says nothing about a GPU.",
        *result.footer(),
    ]
    return "\n".join(lines) + "\n"


def figure(result: SleepCost) -> Figure:
    """The ratio of every shape, grouped by depth, under its bound."""
    picture, axes = new_figure("A sleep of depth N against N calls of the model")
    depths = sorted({row.passes for row in result.rows})
    for place, depth in enumerate(depths):
        axes.hlines(
            (depth - 1) / depth, place - 0.4, place + 0.4, color=INK, linewidth=2,
            label="(N-1)/N" if place == 0 else "",
        )  # fmt: skip
    styles = {"gated_deltanet": (BLUE, "o", -0.12), "mamba2": (ORANGE, "^", 0.12)}
    for name, (colour, marker, shift) in styles.items():
        rows = [row for row in result.rows if row.state_space == name]
        if rows:
            axes.plot(
                [depths.index(row.passes) + shift for row in rows], [row.ratio for row in rows],
                color=colour, marker=marker, markersize=8, linestyle="none", alpha=0.8, label=name,
            )  # fmt: skip
    axes.set_ylim(0, 1.04)
    axes.set_xticks(range(len(depths)), [f"N = {depth}" for depth in depths])
    axes.set_ylabel("time of the sleep / time of N calls", fontsize=13)
    picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=3)
    return picture
