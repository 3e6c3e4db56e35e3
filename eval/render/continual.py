"""Tables and figure of `continual.bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean
from typing import TYPE_CHECKING

from hybrid_sleep.eval.continual.methods import METHODS
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import GREY, STYLES, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.continual.bench import ContinualResult, ContinualRow

# Tasks that a table has side by side.
MOST_ACROSS = 4
MEASURES: tuple[tuple[str, Callable[[ContinualRow], float]], ...] = (
    ("average", lambda row: row.scores.average),
    ("learning", lambda row: row.scores.learning),
    ("backward transfer", lambda row: row.scores.backward_transfer),
    ("forward transfer", lambda row: row.scores.forward_transfer(row.floors)),
    ("forgetting (from best)", lambda row: row.scores.forgetting_from_best),
    ("forgetting (from learned)", lambda row: row.scores.forgetting_from_learned),
    ("minimum", lambda row: row.scores.minimum(row.later)),
    ("worst case", lambda row: row.scores.worst_case(row.later)),
)


def markdown(result: ContinualResult) -> str:
    """What each method keeps and learns, by task, and what it costs."""
    named = [name for name in METHODS if result.of(name)]
    rows = [
        [
            METHODS[name].label,
            *(_told([measure(row) for row in result.of(name)]) for _, measure in MEASURES),
        ]
        for name in named
    ]
    first = result.rows[0] if result.rows else None
    seeds = ", ".join(sorted({str(row.seed) for row in result.rows}))
    blocks = [
        table(["", *(name for name, _ in MEASURES)], rows, "lr"),
        [
            f"Accuracy: the share of {result.measured}; means over seeds {seeds}, lowest to "
            "highest in brackets. Average: of all tasks at the end; learning: of each right behind "
            "it; minimum: the lowest that earlier tasks had at any time in later training; worst "
            "case: that, and the last task."
        ],
        *_by_task(result, named),
        _apart(result, named),
        _words(result),
    ]
    if first is not None:
        floors = ", ".join(f"{x:.3f}" for x in first.floors)
        told = ", ".join(f"{name} {value:g}" for name, value in first.settings.items())
        blocks.append([f"{result.about} Floors: {floors}. Training: {told}."])
    lines = [line for block in blocks if block for line in ("", *block)]
    return "\n".join([*lines[1:], *result.footer()]) + "\n"


def _by_task(result: ContinualResult, named: list[str]) -> list[list[str]]:
    """Each task right behind it and at the end, and what learning cost, a method or a task a line:
    blocks of lines."""
    costs = ["tokens trained on", "seconds"]
    spent = {
        name: [
            f"{mean(row.tokens for row in result.of(name)):,.0f}",
            f"{mean(row.seconds for row in result.of(name)):.0f}",
        ]
        for name in named
    }
    tasks = range(len(result.tasks))
    learned = {n: [[row.matrix[j + 1][j] for row in result.of(n)] for j in tasks] for n in named}
    last = {n: [[row.matrix[-1][j] for row in result.of(n)] for j in tasks] for n in named}
    if len(tasks) <= MOST_ACROSS:
        head = [f"{x}, {when}" for when in ("learned", "at the end") for x in result.tasks]
        rows = [
            [METHODS[n].label, *map(_told, learned[n]), *map(_told, last[n]), *spent[n]]
            for n in named
        ]
        return [table(["", *head, *costs], rows, "lr")]
    labels = [METHODS[n].label for n in named]
    rows = [
        [x, *(f"{mean(learned[n][j]):.3f} to {mean(last[n][j]):.3f}" for n in named)]
        for j, x in enumerate(result.tasks)
    ]
    return [
        table(["", *labels], rows, "lr"),
        ["Of each task: right behind it, and at the end."],
        table(["", *costs], [[METHODS[n].label, *spent[n]] for n in named], "lr"),
    ]


def _apart(result: ContinualResult, named: list[str]) -> list[str]:
    """What was measured beside the tasks, at the end."""
    names = list(result.rows[0].apart[-1]) if result.rows else []
    if not names:
        return []
    cells = [
        [METHODS[n].label, *(_told_if(row.apart[-1][x] for row in result.of(n)) for x in names)]
        for n in named
    ]
    return table(["at the end", *names], cells, "lr")


def figure(result: ContinualResult) -> Figure:
    """The first task while the others are learned, and what is known and learned in the end."""
    picture, (left, right) = new_panels(
        ["The first task, while later ones are learned", "All tasks, at the end"], height=3.9
    )
    named = [name for name in METHODS if result.of(name)]
    for index, name in enumerate(named):
        colour, marker, line = STYLES[index % len(STYLES)]
        rows = result.of(name)
        places, curves = _course(rows)
        left.plot(
            places, [mean(at) for at in zip(*curves, strict=True)], color=colour, marker=marker,
            linestyle=line, markersize=4, linewidth=2, label=METHODS[name].label,
        )  # fmt: skip
        values = [row.scores.average for row in rows]
        right.barh([index], [mean(values)], color=colour, height=0.7)
        right.plot([min(values), max(values)], [index, index], color=GREY, linewidth=2)
    left.set_xlabel("tasks learned", fontsize=13)
    left.set_xticks(range(len(result.tasks) + 1))
    right.set_yticks(range(len(named)), [METHODS[name].label for name in named], fontsize=11)
    right.invert_yaxis()
    right.set_xlabel("mean accuracy (lines: lowest to highest seed)", fontsize=13)
    right.set_xlim(0, 1.02)
    left.set_ylim(0, 1.04)
    left.set_ylabel("accuracy", fontsize=13)
    for axes in (left, right):
        of = axes.yaxis if axes is left else axes.xaxis
        of.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    handles, labels = left.get_legend_handles_labels()
    picture.legend(handles, labels, fontsize=11, frameon=False, loc="outside lower center", ncols=4)
    picture.set_size_inches(12.4, picture.get_size_inches()[1])
    return picture


def _course(rows: list[ContinualRow]) -> tuple[list[float], list[list[float]]]:
    """Where, in tasks, the first task was measured, and what it was for each of `rows`."""
    places = [0.0]
    for task, seen in enumerate(rows[0].during):
        places += [task + (i + 1) / (len(seen) + 1) for i in range(len(seen))]
        places.append(task + 1.0)
    curves = []
    for row in rows:
        curve = [row.matrix[0][0]]
        for task, seen in enumerate(row.during):
            curve += [*(at[0] for at in seen), row.matrix[task + 1][0]]
        curves.append(curve)
    return places, curves


def _told(values: list[float]) -> str:
    shown = f"{mean(values):.3f}"
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return shown if low == high else f"{shown} ({low} to {high})"


def _told_if(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return _told(found) if found else "-"


def _words(result: ContinualResult) -> list[str]:
    """Where the sleep stands between plain training and joint training."""
    means = {
        name: mean(row.scores.backward_transfer for row in result.of(name))
        for name in ("fine-tuning", "joint", "sleep", "compress")
        if result.of(name)
    }
    if not {"fine-tuning", "joint"} <= means.keys() or means["joint"] <= means["fine-tuning"]:
        return []
    whole = means["joint"] - means["fine-tuning"]
    return [
        f"{METHODS[name].label}: backward transfer goes "
        f"{100 * (means[name] - means['fine-tuning']) / whole:.0f} % of the way from "
        "fine-tuning's to joint training's."
        for name in ("sleep", "compress")
        if name in means
    ]
