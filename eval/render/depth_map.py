"""A map of depth: table, who is best where, and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_sleep.eval.measure.statistics import NO_DIFFERENCE, Seeds
from hybrid_sleep.eval.render.lines import seeds_line
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import GREY, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.studies.depth_map import DepthMap


def verdicts(result: DepthMap) -> list[str]:
    """For each value and compute, which depth is best, and whether the seeds agree on it."""
    lines = []
    first = result.depths[0]
    for value in result.values:
        for multiple in result.compute:
            shares = result.shares(value, multiple)
            if len(shares) < 2:
                continue
            best = max(shares, key=lambda depth: shares[depth].mean)
            top = shares[best].mean
            place = f"{_key(result)} = {value}, {multiple:g}x compute: "
            near = [depth for depth, share in shares.items() if share.mean > top - NO_DIFFERENCE]
            if len(near) > 1 and first in near:
                depths = " and ".join(f"N = {depth}" for depth in near)
                lines.append(f"{place}{depths} are within {NO_DIFFERENCE:g} ({top:.3f}).")
                continue
            if best == first:
                gaps = [result.ahead(value, multiple, depth) for depth in shares if depth != best]
                sure = all(gap is not None and gap.highest < 0 for gap in gaps)
                how = "with every seed" if sure else "but not with every seed"
                lines.append(f"{place}N = {first} is best ({top:.3f}), {how}.")
                continue
            said = f"{place}N = {best} is best ({top:.3f})"
            if (gap := result.ahead(value, multiple, best)) is not None:
                how = "with every seed" if gap.lowest > 0 else "but the seeds do not agree"
                said += (
                    f", {gap.mean:+.3f} over N = {first} ({gap.lowest:+.3f} to {gap.highest:+.3f})"
                    f", {how}"
                )
            lines.append(f"{said}.")
    return lines


def markdown(result: DepthMap) -> str:
    """The table of a map, who is best where, floors, and where it came from."""
    key, depths = _key(result), result.depths
    rows = []
    for value in result.values:
        for multiple in result.compute:
            shares, steps = result.shares(value, multiple), result.steps(value, multiple)
            if not shares:
                continue
            best = max(share.mean for share in shares.values())
            cells = [_cell(shares[depth], best) if depth in shares else "" for depth in depths]
            of = " / ".join(str(steps.get(depth, "")) for depth in depths)
            rows.append([value, f"{result.floors[value]:.3f}", f"{multiple:g}x", *cells, of])
    head = [key, "floor", "compute", *(f"N = {depth}" for depth in depths), "steps"]
    fixed = {name: x for name, x in result.task.params.items() if name != key}
    params = ", ".join(f"{name}={value}" for name, value in fixed.items())
    longest = max((trial.seconds for trial in result.rows), default=0.0)
    lines = [
        *table(head, rows),
        "",
        "Share of questions right, each model evaluated at the depth it was trained at: mean over "
        f"seeds {', '.join(map(str, result.seeds))} (lowest to highest), best in bold; "
        f"{result.examples} test examples. In a row all trainings take the same FLOPs, "
        f"{result.flops:.3g} at 1x, so deeper sleep has fewer steps (last column, in the order of "
        "N); parameters and the cost of a decode step are the same everywhere. Floor: the best "
        f"guess without memory of the past. Task: {result.task.name} ({params}); the longest "
        f"training took {longest:.0f} {result.clock} seconds.",
        "",
        *(f"- {line}" for line in verdicts(result)),
    ]
    return "\n".join([*lines, *result.footer()]) + "\n"


def _key(result: DepthMap) -> str:
    return result.key.rpartition(".")[2]


def _cell(share: Seeds, best: float) -> str:
    shown = f"{share.mean:.3f}"
    shown = f"**{shown}**" if share.mean == best else shown
    return f"{shown} ({share.lowest:.3f} to {share.highest:.3f})"


def figure(result: DepthMap) -> Figure:
    """Accuracy against difficulty, a line for each depth and a panel for each compute."""
    values = result.values
    titles = [f"{result.task.name}, compute x {multiple:g}" for multiple in result.compute]
    picture, panels = new_panels(titles)
    for axes, multiple in zip(panels, result.compute, strict=True):
        axes.plot(
            range(len(values)), [result.floors[value] for value in values], color=GREY,
            linestyle=(0, (4, 3)), linewidth=1.6, label="floor",
        )  # fmt: skip
        measured = [result.shares(value, multiple) for value in values]
        for index, depth in enumerate(result.depths):
            found = {x: shares[depth] for x, shares in enumerate(measured) if depth in shares}
            if not found:
                continue
            seeds_line(
                axes, [*found], [*found.values()], index, len(result.depths), f"N = {depth}"
            )
        axes.set_ylim(0, 1.04)
        axes.set_xticks(range(len(values)), values)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_ylabel("accuracy on questions", fontsize=13)
    panels[-1].set_xlabel(_key(result), fontsize=13)
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(
        handles, labels, fontsize=11, frameon=False, loc="outside lower center", ncols=4
    )
    return picture
