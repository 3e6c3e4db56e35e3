"""Table and figure of `nights.bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING

from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import STYLES, blank, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.nights.bench import NightsResult
    from hybrid_sleep.eval.nights.course import Evening

Measure = Callable[["Evening"], float | None]

MEBI = 2**20


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _newest(evening: Evening) -> float | None:
    return evening.told[-1] if evening.told else None


def _earlier(evening: Evening) -> float | None:
    return _mean(evening.told[:-1])


def _first(evening: Evening) -> float | None:
    return evening.told[0] if evening.told else None


# Of every night, in the table.
MEASURES: tuple[tuple[str, str, Measure], ...] = (
    ("facts", ".3f", lambda x: x.facts.recall if x.night else None),
    ("facts, held out", ".3f", lambda x: x.facts.paraphrase if x.night else None),
    ("told that day", ".3f", _newest),
    ("told before", ".3f", _earlier),
    ("all told, reworded", ".3f", lambda x: _mean(x.reworded)),
    ("locality", ".3f", lambda x: x.facts.locality),
    ("perplexity ratio", ".3f", lambda x: x.facts.perplexity_ratio),
    ("store, MiB", ".2f", lambda x: x.store / MEBI),
    ("folder, MiB", ".2f", lambda x: x.folder / MEBI),
    ("seconds awake", ".1f", lambda x: x.learned if x.night else None),
    ("seconds asleep", ".1f", lambda x: x.facts.seconds),
)
# By panel of the figure.
DRAWN: tuple[tuple[str, tuple[tuple[str, Measure], ...]], ...] = (
    (
        "What is answered",
        (
            ("all facts so far", lambda x: x.facts.recall if x.night else None),
            ("told that day", _newest),
            ("told on earlier days", _earlier),
            ("told on the first day", _first),
        ),
    ),
    (
        "What was known before",
        (
            ("locality", lambda x: x.facts.locality),
            ("perplexity ratio", lambda x: x.facts.perplexity_ratio),
        ),
    ),
    (
        "On the disk, MiB",
        (
            ("facts, edits, experience", lambda x: x.store / MEBI),
            ("and weights for undo", lambda x: (x.store + x.weights) / MEBI),
            ("the folder", lambda x: x.folder / MEBI),
        ),
    ),
    (
        "Seconds a day",
        (
            ("awake", lambda x: x.learned if x.night else None),
            ("asleep", lambda x: x.facts.seconds),
        ),
    ),
)


def markdown(result: NightsResult) -> str:
    """What is answered after each night, what drifts, and how each night ended."""
    if not result.rows:
        return "\n".join(result.footer()) + "\n"
    first = result.rows[0]
    body = [
        [
            str(night) if night else "before",
            *(_spread(result, night, measure, form) for _, form, measure in MEASURES),
            *(_ended(result, night, part) for part in ("experience", "facts")),
        ]
        for night in range(first.nights + 1)
    ]
    lines = [
        *table(
            ["night", *(name for name, _, _ in MEASURES), "night over experience",
             "night over facts"],
            body,
        ),
        "",
        f"Each day {first.facts} facts are learned at wake and {first.told} others are told, which "
        "are kept as experience; the night is over the experience and then over the facts. Means "
        f"over seeds {', '.join(str(row.seed) for row in result.rows)}, lowest to highest in "
        "brackets where they differ. Facts: all so far, by their first statement and question; "
        "held out: in words that no edit sees. Told: questions as they were asked with the answer "
        "told; reworded: asked in other words. Locality and perplexity ratio: to the model before "
        "the first day. Store: facts, edits, and what is known of experience; folder: with the "
        "pristine weights, statistics, and the weights trained by each night, kept for undo.",
        "",
        "Between the records of the nights and what was measured after them locality and "
        f"perplexity ratio differ by {max(row.unreported for row in result.rows):.1e} at most.",
        *_failures(result),
        "",
        f"Models of {first.parameters:,} parameters.",
    ]  # fmt: skip
    return "\n".join([*lines, *result.footer()]) + "\n"


def figure(result: NightsResult) -> Figure:
    """What may drift, night by night; the band is from the lowest to the highest seed."""
    picture = blank(12.8, 8.0)
    panels = picture.subplots(2, 2).flatten()
    nights = range(result.rows[0].nights + 1) if result.rows else range(1)
    for axes, (title, curves) in zip(panels, DRAWN, strict=True):
        dress(axes, title)
        for i, (label, measure) in enumerate(curves):
            _draw(axes, result, nights, i, label, measure)
        axes.set_xticks(list(nights))
        if axes.get_lines():
            axes.legend(fontsize=10, frameon=False)
    panels[0].set_ylim(-0.03, 1.04)
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    for axes in panels[2:]:
        axes.set_ylim(bottom=0)
        axes.set_xlabel("nights", fontsize=13)
    return picture


def _draw(
    axes: Axes, result: NightsResult, nights: range, i: int, label: str, measure: Measure
) -> None:
    places, shown = [], []
    for night in nights:
        values = _values(result, night, measure)
        if values:
            places.append(night)
            shown.append((mean(values), min(values), max(values)))
    colour, marker, line = STYLES[i % len(STYLES)]
    if places:
        middle, low, high = zip(*shown, strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            places, middle, color=colour, marker=marker, linestyle=line, markersize=5,
            linewidth=2, label=label,
        )  # fmt: skip


def _values(result: NightsResult, night: int, measure: Measure) -> list[float]:
    found = [measure(row.evenings[night]) for row in result.rows]
    return [value for value in found if value is not None]


def _spread(result: NightsResult, night: int, measure: Measure, form: str) -> str:
    values = _values(result, night, measure)
    if not values:
        return "-"
    middle, low, high = (f"{x:{form}}" for x in (mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _outcome(evening: Evening, part: str) -> str:
    return evening.experience if part == "experience" else evening.facts.outcome


def _ended(result: NightsResult, night: int, part: str) -> str:
    said = [_outcome(row.evenings[night], part).partition(":")[0] for row in result.rows]
    said = [one for one in said if one]
    return ", ".join(f"{said.count(x)} {x}" for x in dict.fromkeys(said)) or "-"


def _failures(result: NightsResult) -> list[str]:
    """Why nights were taken back."""
    found = [
        f"- seed {row.seed}, night {evening.night}, over {part}: {why}"
        for row in result.rows
        for evening in row.evenings
        for part in ("experience", "facts")
        for outcome, _, why in [_outcome(evening, part).partition(": ")]
        if outcome == "rolled back"
    ]
    return ["", "Taken back:", *found] if found else []
