"""Tables and figure of `facts.bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from hybrid_sleep.eval.facts.arms import ARMS, BASELINES
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import STYLES, blank, dress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.facts.bench import FactsResult, FactsRow
    from hybrid_sleep.eval.facts.measured import Point

Measure = Callable[["Point"], float | None]
RECALL: tuple[str, Measure] = ("recall", lambda p: p.recall)
MEASURES: tuple[tuple[str, Measure], ...] = (
    RECALL,
    ("statement", lambda p: p.share("statement 0")),
    ("chat", lambda p: p.share("question 0")),
    ("paraphrase", lambda p: p.share("held_out")),
    ("chat paraphrase", lambda p: p.share("held_out_question")),
    ("negation", lambda p: p.share("negation")),
    ("locality", lambda p: p.locality),
    ("perplexity ratio", lambda p: p.perplexity_ratio),
)
DRAWN: tuple[tuple[str, Measure], ...] = (
    RECALL,
    ("paraphrase (held out)", lambda p: p.paraphrase),
    ("locality", lambda p: p.locality),
    ("perplexity ratio", lambda p: p.perplexity_ratio),
)
LABELS = {**{name: arm.label for name, arm in ARMS.items()}, **BASELINES}


def markdown(result: FactsResult) -> str:
    """What each arm answers before, after wake and after sleep, and what it costs."""
    lines = [
        *_answers(result),
        "",
        "Recall: the first statement and the first question of a relation, which edits are written "
        "in (statement and chat: each alone; the earlier system's recipe knows no chat). "
        "Paraphrase: statements and questions that no edit sees. Negation: the fact's object "
        "completes its negation, which it should not. Locality: of what the pristine model "
        "answers. All by greedy decoding, exact words. Means over seeds and orders, lowest to "
        "highest in brackets where they differ.",
        *_costs(result),
        *_changes(result),
        *_slept(result),
        *result.footer(),
    ]
    return "\n".join(lines) + "\n"


def figure(result: FactsResult) -> Figure:
    """The wake curve of each arm, its last sleep beside it, and baselines as single marks."""
    picture = blank(12.8, 8.4)
    panels = picture.subplots(2, 2).flatten()
    named = [name for name in LABELS if result.of(name)]
    last = max([p.facts for row in result.rows for p in row.wake], default=1)
    slept, later = 1.12 * last, 1.24 * last
    for axes, (title, measure) in zip(panels, DRAWN, strict=True):
        dress(axes, title)
        axes.axvline(1.06 * last, color="#DDDDDD", linewidth=1)
        for i, name in enumerate(named):
            rows = result.of(name)
            colour, marker, line = STYLES[i % len(STYLES)]
            style = {"color": colour, "marker": marker, "markersize": 7, "label": LABELS[name]}
            if name in BASELINES:
                curve = _over_rows(rows, lambda row: row.wake, measure)
                axes.plot(
                    [later], [y for _, y in curve], fillstyle="none", linestyle="none",
                    markeredgewidth=2, **style,
                )  # fmt: skip
                continue
            curve = _over_rows(rows, lambda row: row.wake, measure)
            axes.plot(*zip(*curve, strict=True), linestyle=line, linewidth=2, alpha=0.85, **style)
            after = _values([row.sleeps[-1:] for row in rows], measure)
            if after and curve:
                axes.plot(
                    [curve[-1][0], slept], [curve[-1][1], mean(after)], color=colour,
                    linestyle=":", linewidth=1.4,
                )  # fmt: skip
                axes.plot([slept], [mean(after)], color=colour, marker=marker, markersize=10)
        ticks = sorted({p.facts for row in result.rows for p in row.wake if p.facts})
        shown = [k for k in ticks if k == last or k <= 0.85 * last and k >= last / 8] or ticks
        axes.set_xlim(-0.05 * last, 1.3 * last)
        axes.set_xticks([0, *shown, slept, later], ["0", *map(str, shown), "sleep", "at once"])
        for label in axes.get_xticklabels()[-2:]:
            label.set(rotation=30, ha="right", fontsize=10)
        if title == "perplexity ratio":
            highest = max(axes.get_ylim()[1], 1.05)
            if highest > 3:
                axes.set_yscale("log")
            else:
                axes.set_ylim(min(0.98, axes.get_ylim()[0]), highest)
        else:
            axes.set_ylim(-0.03, 1.04)
    for axes in panels[2:]:
        axes.set_xlabel("facts learned at wake", fontsize=13)
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, labels, fontsize=11, frameon=False, loc="outside lower center", ncols=4)
    picture.suptitle(
        f"{result.facts} facts in the weights of {_model(result)}", x=0.01, ha="left", fontsize=15
    )
    return picture


def _model(result: FactsResult) -> str:
    return "the small world's models" if result.model == "world" else result.model


def _answers(result: FactsResult) -> list[str]:
    head = ["", "", *(name for name, _ in MEASURES), "k*", "k* (statement)"]
    rows: list[list[str]] = []
    for name, label in LABELS.items():
        found = result.of(name)
        if not found:
            continue
        stages: list[tuple[str, list[Sequence[Point]]]]
        if name in BASELINES:
            stages = [("all at once", [row.wake for row in found])]
        else:
            stages = [
                ("before", [row.wake[:1] for row in found]),
                ("wake", [row.wake[-1:] for row in found]),
                ("sleep", [row.sleeps[-1:] for row in found]),
            ]
            second = list(dict.fromkeys(p.stage for row in found for p in row.second))
            stages += [
                (stage, [[p for p in row.second if p.stage == stage][-1:] for row in found])
                for stage in second
            ]
        for i, (stage, points) in enumerate(stages):
            thresholds = ["", ""]
            if stage == "wake":
                thresholds = [
                    _threshold(found, lambda row: row.threshold()),
                    _threshold(found, lambda row: row.threshold("statement 0")),
                ]
            cells = [_spread(_values(points, measure)) for _, measure in MEASURES]
            rows.append(["" if i else label, stage, *cells, *thresholds])
    seeds = len({row.seed for row in result.rows})
    orders = len({row.order for row in result.rows})
    known = _range([row.known for row in result.rows])
    return [
        f"{result.facts} facts, {_model(result)}, {seeds} seeds, {orders} orders; locality on "
        f"{known} things that the pristine model answers. k*: the largest of "
        f"{', '.join(map(str, result.points))} facts at which recall is .9 or more at wake.",
        "",
        *table(head, rows, "llr"),
    ]


def _costs(result: FactsResult) -> list[str]:
    head = ["", "seconds a fact", "bytes a fact", "change of the weights, %", "seconds a sleep",
            "cycles", "set up, seconds"]  # fmt: skip
    rows = []
    for name, label in LABELS.items():
        found = result.of(name)
        if not found:
            continue
        last = [row.wake[-1] for row in found]
        seconds = [s for row in found for s in row.learn_seconds] or [
            p.seconds for p in last if p.seconds is not None
        ]
        stored = [p.bytes / p.facts for p in last if p.bytes is not None and p.facts]
        sleeps = [p for row in found for p in row.sleeps]
        # Of the failures at all strengths the first one; the file has the others.
        told = sorted(
            {
                f"{len(row.sleeps)} x {row.sleeps[-1].outcome.partition(';')[0]}"
                for row in found
                if row.sleeps
            }
            | {p.outcome for p in last if p.outcome}
        )
        rows.append(
            [
                label,
                f"{mean(seconds):.2f}",
                f"{mean(stored):,.0f}" if stored else "",
                _spread([100 * p.changed for p in last if p.changed is not None], 1),
                _spread([p.seconds for p in sleeps if p.seconds is not None], 1),
                "; ".join(told),
                f"{mean(row.setup_seconds for row in found):.1f}",
            ]
        )
    elsewhere = [
        f"Seconds of {label}: on {machine}."
        for name, label in LABELS.items()
        for machine in sorted({row.machine for row in result.of(name) if row.machine})
    ]
    notes = ["", " ".join(elsewhere)] if elsewhere else []
    return ["", *table(head, rows, "lrrrrlr"), *notes]


def _changes(result: FactsResult) -> list[str]:
    head = ["", "after", "updated: new object", "former object", "deleted: object",
            "as the pristine model", "bits after restart"]  # fmt: skip
    rows = []
    for name, label in LABELS.items():
        found = [row for row in result.of(name) if row.changes]
        for stage in dict.fromkeys(c.stage for row in found for c in row.changes):
            every = [c for row in found for c in row.changes if c.stage == stage]
            updated = [c for c in every if c.new is not None]
            deleted = [c for c in every if c.new is None]
            same = all(row.reopened for row in found)
            rows.append(
                [
                    label,
                    stage,
                    _spread([c.says_new for c in updated if c.says_new is not None]),
                    _spread([c.says_old for c in updated]),
                    _spread([c.says_old for c in deleted]),
                    _spread([c.as_before for c in deleted]),
                    "the same" if same else "**others**",
                ]
            )
    if not rows:
        return []
    return [
        "",
        *table(head, rows, "llr"),
        "",
        "Shares of all texts of the fact. As the pristine model: the whole reply, to the letter.",
    ]


def _slept(result: FactsResult) -> list[str]:
    found = [row for row in result.rows if row.slept]
    if not found:
        return []
    names = list(found[0].slept[0].answered)
    head = ["", "windows slept over", "depth", *(name.replace("_", " ") for name in names)]
    rows = []
    for arm, label in LABELS.items():
        own = [row for row in found if row.arm == arm]
        for place in range(len(own[0].slept) if own else 0):
            parts = [row.slept[place] for row in own]
            depth = str(parts[0].passes) if parts[0].windows else ""
            cells = [_spread([p.answered[name] for p in parts]) for name in names]
            rows.append([label, str(parts[0].windows), depth, *cells])
    return ["", *table(head, rows, "lrr"), "", "After the sleep; text about others in between."]


def _values(parts: Sequence[Sequence[Point]], measure: Measure) -> list[float]:
    return [x for part in parts for p in part if (x := measure(p)) is not None]


def _over_rows(
    rows: Sequence[FactsRow], part: Callable[[FactsRow], Sequence[Point]], measure: Measure
) -> list[tuple[float, float]]:
    by_count: dict[int, list[float]] = {}
    for row in rows:
        for point in part(row):
            value = measure(point)
            if value is not None:
                by_count.setdefault(point.facts, []).append(value)
    return [(k, mean(values)) for k, values in sorted(by_count.items())]


def _threshold(rows: Sequence[FactsRow], of: Callable[[FactsRow], int]) -> str:
    return _range([of(row) for row in rows])


def _range(values: Sequence[int]) -> str:
    if not values:
        return "no"
    lowest, highest = min(values), max(values)
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"


def _spread(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return ""
    lowest, highest = (f"{x:.{digits}f}" for x in (min(values), max(values)))
    middle = f"{mean(values):.{digits}f}"
    return middle if lowest == highest else f"{middle} ({lowest} to {highest})"
