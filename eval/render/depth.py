"""Accuracy by sleep depth of trained models: table, comparison with a baseline, figure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean
from typing import TYPE_CHECKING

from hybrid_sleep.eval.measure.statistics import NO_DIFFERENCE, Seeds, best_depth, over_questions
from hybrid_sleep.eval.render.lines import seeds_line, shift
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import BLUE, GREY, INK, SKY, STYLES, VERMILLION, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.measure.depth import DepthResult


def markdown(result: DepthResult) -> str:
    """The table of a depth result, what can be scored without memory, and where it came from."""
    lines = accuracy_table(result)
    if result.hardest is not None:
        lines += ["", *level_table(result)]
    lines += [*_gradients(result), "", task_line(result)]
    if result.baseline is not None:
        lines += ["", baseline_words(result), "", f"`{result.baseline.command}`"]
    return "\n".join([*lines, *result.footer()]) + "\n"


def accuracy_table(result: DepthResult) -> list[str]:
    """A row a depth: accuracy with its intervals, seed by seed, and what an example costs."""
    several = len(result.runs) > 1
    seeds = [f"seed {run.seed}" for run in result.runs] if several else []
    best = best_depth({depth: result.shares("exact", depth).mean for depth in result.depths})
    intervals = ["lowest to highest", "95 % interval"] if several else ["95 % interval"]
    head = ["depth N", "exact", *intervals, *seeds, "per label", "ms per example", "cost"]
    rows = []
    for depth in result.depths:
        shares = result.shares("exact", depth)
        seconds = result.seconds_per_example(depth)
        exact = f"{shares.mean:.3f}"
        if several:
            ranges = [(shares.lowest, shares.highest), shares.interval]
        else:
            ranges = [result.interval(result.runs[0], depth)]
        rows.append(
            [
                depth,
                f"**{exact}**" if depth == best else exact,
                *map(_between, ranges),
                *(f"{share:.3f}" for share in shares.values if several),
                f"{result.shares('per_label', depth).mean:.3f}",
                f"{1000 * seconds:.2f}",
                f"{seconds / result.seconds_per_example(min(result.depths)):.2f}x",
            ]
        )
    return table(head, rows)


def task_line(result: DepthResult) -> str:
    """The task, how it was measured, and what scores are reached without memory of the past."""
    task = result.task
    questions = result.runs[0].accuracy[result.depths[0]].questions
    return (
        f"Task: {task}; {result.examples} test examples a depth, evaluation seed "
        f"{result.eval_seed}. Without memory of the past: floor (the best guess) "
        f"{over_questions(task.floor, questions):.4f} of questions; majority (always the most "
        f"frequent label) exact {task.majority['exact']:.4f}, per label "
        f"{task.majority['per_label']:.4f}; chance {task.chance:.4f}."
    )


def baseline_words(result: DepthResult) -> str:
    """The comparison with training at one depth, said as it is."""
    base = result.baseline
    assert base is not None
    best = result.judged(result.best_depth).mean
    theirs, of = base.judged(result.hardest), "exact accuracy"
    if result.hardest is not None:
        of = f"accuracy on {result.task.difficulty} = {result.hardest}"
    text = (
        f"Baseline: the same model trained at N = {base.depth} alone, on {base.examples_ratio:.1f} "
        f"times the examples ({base.compute_ratio:.2f} times the compute), reaches an "
        f"{of} of {theirs.mean:.3f} ({theirs.lowest:.3f} to {theirs.highest:.3f} over "
        f"{len(base.seeds)} seeds). "
    )
    if theirs.mean > best - NO_DIFFERENCE:
        return text + (
            "So on this setting depth does not beat more training at equal compute. What it buys "
            "is data, the same accuracy from fewer examples, and a choice at inference: one "
            "checkpoint that can be evaluated at little cost or at high accuracy."
        )
    if theirs.highest > best - NO_DIFFERENCE:
        return text + (
            "Its seeds differ: for about the same compute the best one gets as far without "
            f"sleeping deeper, on average they fall {best - theirs.mean:.3f} short."
        )
    return text + (
        f"So for about the same compute, sleeping deeper is worth {best - theirs.mean:.3f} here."
    )


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def level_table(result: DepthResult) -> list[str]:
    """Accuracy on questions by depth and difficulty, then of each kind of questions."""
    head = [f"accuracy by {result.task.difficulty}", *map(str, result.levels)]
    cells = [[name, *(f"{share:.3f}" for share in shares)] for name, shares in by_level(result)]
    lines = table(head, cells, "lr")
    for kind in result.kinds:
        cells = [
            [f"depth {N}", *(f"{result.of_level(x, N, kind).mean:.3f}" for x in result.levels)]
            for N in result.depths
        ]
        lines += ["", *table([f"{head[0]}, {kind}", *head[1:]], cells, "lr")]
    return lines


def _gradients(result: DepthResult) -> list[str]:
    """How large the gradient is at what goes into each pass, in units of the last one's."""
    measured = [run.gradients for run in result.runs if run.gradients]
    depths = [N for N in (measured[0] if measured else ()) if N > 1]
    if not depths:
        return []
    rows = []
    for N in depths:
        # Ratios, so their mean is the geometric one.
        shares = [[norm / norms[N][-1] for norm in norms[N]] for norms in measured if all(norms[N])]
        means = [geometric_mean(seeds) for seeds in zip(*shares, strict=True)]
        rows.append([f"depth {N}", *([f"{x:.2f}" for x in means] or ["0"] * N)])
    most = max(depths)
    head = ["gradient going into pass", *map(str, range(1, most + 1))]
    words = "Norm of the gradient of the loss, relative to that at the last pass; mean over seeds."
    return ["", *table(head, [row + [""] * (most + 1 - len(row)) for row in rows], "lr"), "", words]


def by_level(result: DepthResult) -> list[tuple[str, list[float]]]:
    """Mean accuracy on questions of each difficulty: by depth, of the baseline, and the floor."""
    rows = [
        (f"depth {depth}", [result.of_level(level, depth).mean for level in result.levels])
        for depth in result.depths
    ]
    base = result.baseline
    if base is not None:
        shares = [base.judged(level).mean for level in result.levels]
        rows.append((f"trained at N = {base.depth} alone", shares))
    return [*rows, ("floor", [result.task.floor[level] for level in result.levels])]


def figure(result: DepthResult) -> Figure:
    """Exact accuracy against depth, majority and baseline; single seeds behind their mean.

    Of a task with several difficulties, accuracy on the questions of each.
    """
    depths, runs = result.depths, result.runs
    which = "one checkpoint" if len(runs) == 1 else f"{len(runs)} checkpoints"
    picture, axes = new_figure(f"{result.task.name}: {which}, evaluated at {len(depths)} depths")
    deepest = max(depth for run in runs for depth in run.trained_depths)
    if deepest < max(depths):
        axes.axvspan(deepest + 0.5, max(depths) + 0.65, color=GREY, alpha=0.1, linewidth=0)
        above = 0.02 if result.hardest is None else 0.03 + max(result.task.floor.values())
        axes.annotate(
            "deeper than trained", (deepest + 0.6, above), fontsize=11, color=GREY, va="bottom"
        )
    if result.hardest is None:
        _exact(axes, result)
    else:
        _levels(axes, result)
    axes.set_ylim(0, 1.04)
    axes.set_xticks(depths)
    axes.set_xlim(min(depths) - 0.35, max(depths) + 0.65)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("sleep depth N (passes over each window)", fontsize=13)
    picture.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=2)
    return picture


def _exact(axes: Axes, result: DepthResult) -> None:
    majority, base = result.task.majority["exact"], result.baseline
    axes.axhline(majority, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
    axes.annotate(
        f"majority: always the most frequent label, {_percent(majority)}",
        (1, majority), xycoords=("axes fraction", "data"), xytext=(0, -5),
        textcoords="offset points", ha="right", va="top", fontsize=11, color=GREY,
    )  # fmt: skip
    if len(result.runs) == 1:
        _one(axes, result)
    else:
        _several(axes, result)
    if base is not None:
        _baseline(axes, result, base.judged(None), base.depth, VERMILLION)
    for depth in result.depths:
        value = result.shares("exact", depth).mean
        axes.annotate(
            _percent(value), (depth, value), xytext=(4, -9), textcoords="offset points",
            ha="left", va="top", fontsize=11, color=INK,
        )  # fmt: skip
    axes.set_ylabel("exact accuracy", fontsize=13)


def _levels(axes: Axes, result: DepthResult) -> None:
    """A line for each difficulty, from the lowest checkpoint to the highest."""
    base, count = result.baseline, len(result.levels)
    for index, level in enumerate(result.levels):
        shares = [result.of_level(level, depth) for depth in result.depths]
        label = f"{result.task.difficulty} = {level}"
        seeds_line(axes, result.depths, shares, index, count, label)
        if base is not None:
            color, _, _ = STYLES[index % len(STYLES)]
            at = base.depth - 0.2 + shift(index, count)
            _baseline(axes, result, base.judged(level), at, color, named=index == count - 1)
    floors = [result.task.floor[level] for level in result.levels]
    for floor in sorted({*floors}):
        named = "floor: the best guess" if floor == min(floors) else None
        axes.axhline(floor, color=GREY, linestyle=(0, (4, 3)), linewidth=1.4, label=named)
    axes.set_ylabel("accuracy on questions", fontsize=13)


def _baseline(
    axes: Axes, result: DepthResult, share: Seeds, at: float, color: str, named: bool = True
) -> None:
    base = result.baseline
    assert base is not None
    label = f"trained at N = {base.depth} only, {base.compute_ratio:.1f}x the compute"
    axes.errorbar(
        [at], [share.mean], color=color, marker="D", markersize=10,
        yerr=[[share.mean - share.lowest], [share.highest - share.mean]],
        linestyle="none", capsize=4, zorder=4, label=label if named else None,
        markerfacecolor="white" if result.hardest is not None else color,
    )  # fmt: skip


def _one(axes: Axes, result: DepthResult) -> None:
    (run,) = result.runs
    exact = [run.accuracy[depth].exact for depth in result.depths]
    ends = [result.interval(run, depth) for depth in result.depths]
    errors = [
        [max(0.0, value - low) for value, (low, _) in zip(exact, ends, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(exact, ends, strict=True)],
    ]
    axes.errorbar(
        result.depths, exact, yerr=errors, color=BLUE, marker="o", markersize=8, linewidth=2.5,
        capsize=4, label="this model (bars: 95 %)",
    )  # fmt: skip


def _several(axes: Axes, result: DepthResult) -> None:
    depths = result.depths
    shares = [result.shares("exact", depth) for depth in depths]
    for index, run in enumerate(result.runs):
        axes.plot(
            depths, [run.accuracy[depth].exact for depth in depths], color=SKY, linewidth=1.2,
            marker=".", label="each seed" if index == 0 else None,
        )  # fmt: skip
    axes.fill_between(
        depths, [x.lowest for x in shares], [x.highest for x in shares],
        color=SKY, alpha=0.3, linewidth=0,
    )  # fmt: skip
    axes.plot(
        depths, [x.mean for x in shares], color=BLUE, marker="o", markersize=8, linewidth=2.5,
        label=f"mean of {len(shares[0].values)} seeds",
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
