"""Tables and figure of `hybrid-sleep eval`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import GREY, STYLES, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.harness.result import HarnessResult, Score, TaskRecord

SHARES = "shares"

# Scores of one metric by depth, lm-eval's name of the task and the metric first.
Line = tuple[str, str, dict[int, "Score"]]


def lines_of(result: HarnessResult) -> list[Line]:
    """Every metric of every task: (task, metric, score by depth), in the order they were asked."""
    found: dict[tuple[str, str, str], dict[int, Score]] = {}
    for row in result.rows:
        for score in row.scores:
            metric = score.metric + f" ({score.filter})" * (score.filter != "none")
            key = (row.task, score.name, metric)
            found.setdefault(key, {})[row.depth] = score
    return [(name, metric, by_depth) for (_, name, metric), by_depth in found.items()]


def markdown(result: HarnessResult) -> str:
    """A table of task x depth, the questions of ours by difficulty, and where it came from."""
    depths = result.depths
    guesses = ("floor", "majority")
    head = ["task", "metric", "documents", *guesses, *(f"N = {depth}" for depth in depths)]
    rows = []
    for name, metric, by_depth in lines_of(result):
        any_depth = next(iter(by_depth.values()))
        less = " (less is better)" if any_depth.higher_is_better is False else ""
        cells = [name, metric + less, str(any_depth.documents or "")]
        for guess in guesses:
            share = getattr(any_depth, guess)
            cells.append("" if share is None else f"{share:.4f}")
        rows.append([*cells, *(_cell(by_depth.get(depth)) for depth in depths)])
    lines = [
        *table(head, rows, "llr"),
        "",
        "Scores by sleep depth N, the passes over each full window (95 % interval, given how many "
        "documents there were). Of our own tasks, floor: the best guess without any memory of the "
        "past; majority: always the most frequent answer.",
    ]
    for task, about in result.tasks.items():
        lines += _by_difficulty(result, task, about)
    lines += ["", _about(result)]
    record = result.provenance
    versions = f"lm_eval {record['lm_eval']}; datasets {record['datasets']}"
    return "\n".join([*lines, *result.footer(versions)]) + "\n"


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    if score.value is None:
        return "not finite"
    text = f"{score.value:.4f}"
    if score.interval is None:
        return text
    low, high = score.interval
    return f"{text} ({low:.3f} to {high:.3f})"


def _by_difficulty(result: HarnessResult, task: str, about: TaskRecord) -> list[str]:
    """The table of one task of ours by difficulty; nothing if all questions are equally hard."""
    rows = {
        row.depth: row.by_difficulty
        for row in result.rows
        if row.task == task and row.by_difficulty and len(row.by_difficulty) > 1
    }
    if not rows:
        return []
    first = next(iter(rows.values()))
    head = [about.difficulty or "", "questions", *(f"N = {depth}" for depth in rows)]
    cells = [
        [level, part.questions, *(f"{levels[level].share:.4f}" for levels in rows.values())]
        for level, part in first.items()
    ]
    return ["", f"{task}: accuracy by {about.difficulty}", "", *table(head, cells)]


def _about(result: HarnessResult) -> str:
    """What was evaluated, in a sentence or two."""
    limit = "" if result.limit is None else f" (at most {result.limit} documents a task)"
    parts = [
        f"Checkpoint: {result.checkpoint}, {result.parameters} parameters, "
        f"{result.dtype}{limit}; seed {result.seed}, batch size {result.batch_size}."
    ]
    if result.trained_depths:
        parts.append(f"Trained at depths {', '.join(map(str, result.trained_depths))}.")
    if result.sleep_options:
        options = ", ".join(f"{name}={value}" for name, value in result.sleep_options.items())
        parts.append(f"Other than its config: {options}.")
    for task, about in result.tasks.items():
        if about.params is not None:
            params = ", ".join(f"{name}={value}" for name, value in about.params.items())
            words = ", in words" if about.in_words else ""
            parts.append(f"{task}: {params}{words}.")
    shots = {
        f"{score.name} {score.num_fewshot}"
        for row in result.rows
        for score in row.scores
        if score.num_fewshot
    }
    if shots:
        parts.append(f"Examples before the question: {', '.join(sorted(shots))}.")
    return " ".join(parts)


def headlines(result: HarnessResult) -> list[Line]:
    """One metric of each task that was asked for: the first, which of ours is `exact`.

    Of a group without a score of its own, that of each of its tasks.
    """
    chosen: list[Line] = []
    for task in result.tasks:
        part = replace(result, rows=[row for row in result.rows if row.task == task])
        lines = lines_of(part)
        names = {name for name, _, _ in lines}
        for name in (task,) if task in names else dict.fromkeys(name for name, _, _ in lines):
            chosen.append(next(line for line in lines if line[0] == name))
    return chosen


def figure(result: HarnessResult) -> Figure:
    """The first metric of each task against depth, 95 % bars, and what guesses score.

    Shares, between 0 and 1 and the more the better, have a panel together; any other metric has one
    of its own below.
    """
    from matplotlib.gridspec import GridSpec

    panels: dict[str, list[Line]] = {}
    for line in headlines(result):
        panels.setdefault(SHARES if _is_share(line) else line[1], []).append(line)
    panels = panels or {SHARES: []}
    figure, axes = new_figure(result.checkpoint, height=4.2 * len(panels))
    grid = GridSpec(len(panels), 1, figure=figure)
    axes.set_subplotspec(grid[0])
    for i, (kind, lines) in enumerate(panels.items()):
        if i:
            axes = dress(figure.add_subplot(grid[i]), "")
        for index, line in enumerate(lines):
            _draw(axes, line, result.depths, index, len(lines))
        if kind == SHARES:
            axes.set_ylim(0, 1.04)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_xticks(result.depths)
        axes.set_ylabel(", ".join(dict.fromkeys(metric for _, metric, _ in lines)), fontsize=13)
        axes.legend(fontsize=11, frameon=False)
    axes.set_xlabel("sleep depth N (passes over each window)", fontsize=13)
    return figure


def _is_share(line: Line) -> bool:
    values = [score.value for score in line[2].values() if score.value is not None]
    better = all(score.higher_is_better is not False for score in line[2].values())
    return better and all(0 <= value <= 1 for value in values)


def _draw(axes: Axes, line: Line, depths: list[int], style: int, of: int) -> None:
    name, metric, by_depth = line
    color, marker, dashes = STYLES[style % len(STYLES)]
    shown = {
        depth: (score.value, score.interval or [score.value, score.value])
        for depth in depths
        if (score := by_depth.get(depth)) is not None and score.value is not None
    }
    # Side by side, or the bars would hide each other.
    shift = 0.06 * (style - (of - 1) / 2)
    axes.errorbar(
        [depth + shift for depth in shown], [value for value, _ in shown.values()],
        yerr=[
            [max(0.0, value - low) for value, (low, _) in shown.values()],
            [max(0.0, high - value) for value, (_, high) in shown.values()],
        ],
        color=color, marker=marker, linestyle=dashes, markersize=7, linewidth=2,
        capsize=3, label=f"{name}: {metric}",
    )  # fmt: skip
    any_depth = next(iter(by_depth.values()))
    for guess in ("floor", "majority"):
        share = getattr(any_depth, guess)
        if share is None:
            continue
        axes.axhline(share, color=color, linestyle=(0, (4, 3)), linewidth=1.2, alpha=0.7)
        axes.annotate(
            f"{guess} {100 * share:.1f} %", (1, share), xycoords=("axes fraction", "data"),
            xytext=(0, -3), textcoords="offset points", ha="right", va="top", fontsize=10,
            color=GREY,
        )  # fmt: skip
