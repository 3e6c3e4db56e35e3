"""Table and figure of `bridge.bench`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from hybrid_sleep.eval.bridge.arms import ARMS
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import GREY, STYLES, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.bridge.bench import BridgeResult

# What a sleep is to keep of the gain, and what it may cost on other texts.
AIM_KEPT, AIM_LOST = 0.5, 0.02


def markdown(result: BridgeResult) -> str:
    """What each arm keeps of the days, and of everything else, and how its nights ended."""
    rows = []
    for name in _named(result):
        courses = result.of(name)
        ended = [outcome.partition(":")[0] for c in courses for outcome in c.nights]
        rows.append(
            [
                ARMS[name].label,
                _told([mean(c.floor) for c in courses]),
                _told([mean(c.ceiling) for c in courses]),
                _told([mean(c.kept) for c in courses]),
                _told([mean(c.last) for c in courses]),
                _told([c.share(c.kept) for c in courses]),
                _told([c.share(c.last) for c in courses]),
                _told([c.unrelated[-1] - c.unrelated[0] for c in courses], sign=True),
                ", ".join(f"{ended.count(x)} {x}" for x in dict.fromkeys(ended)),
                f"{mean(c.seconds / max(1, len(c.nights)) for c in courses):.1f}",
            ]
        )
    lines = [
        *table(
            ["", "empty state, before", "with the cache", "empty state, after its night",
             "after all nights", "share of the gain kept", "and after all nights",
             "unrelated, change", "nights", "seconds a night"],
            rows,
            "lrrrrrrrlr",
        ),
        "",
        "Accuracy of questions about texts that were slept over, each key asked alone; means over "
        f"seeds {', '.join(str(row.seed) for row in result.rows)}, lowest to highest in brackets. "
        "Share of the gain: from the empty state before to the cache, over all days together. "
        "Unrelated: answers about other texts, slept over as well, after all nights and before the "
        "first.",
        "",
        *_words(result),
    ]  # fmt: skip
    if result.rows:
        row = result.rows[0]
        told = "; ".join(
            ", ".join(f"{name} {value:g}" for name, value in of.items())
            for of in (row.training, row.night)
        )
        other = mean(c.unrelated[0] for x in result.rows for c in x.courses[:1])
        lines += [
            "",
            f"{row.days} days of {row.pairs} pairs over {row.vocab_size} tokens, no key in two of "
            f"them, slept over with {row.passes} passes; models of {row.parameters:,} parameters, "
            f"trained for {mean(x.training_seconds for x in result.rows):.0f} s to {other:.3f} on "
            f"unrelated texts. Chance: {1 / (row.vocab_size - row.vocab_size // 2):.3f}. Training "
            f"and nights: {told}.",
        ]
    return "\n".join([*lines, *result.footer()]) + "\n"


def figure(result: BridgeResult) -> Figure:
    """What is answered of the days, and of other texts, by arm."""
    picture, (upper, lower) = new_panels(
        ["Questions about what was slept over", "Other texts, read in context"], height=3.9
    )
    named = _named(result)
    width = 0.25
    for i, (label, of) in enumerate(
        {
            "with the cache": "ceiling", "cache gone, after its night": "kept",
            "after all nights": "last",
        }.items()
    ):  # fmt: skip
        colour = STYLES[i % len(STYLES)][0]
        for place, name in enumerate(named):
            values = [mean(getattr(c, of)) for c in result.of(name)]
            at = place + (i - 1) * width
            shown = label if not place else None
            upper.barh([at], [mean(values)], color=colour, height=width, label=shown)
            upper.plot([min(values), max(values)], [at, at], color=GREY, linewidth=2)
    for place, name in enumerate(named):
        values = [c.unrelated[-1] for c in result.of(name)]
        lower.barh([place], [mean(values)], color=STYLES[0][0], height=0.6)
        lower.plot([min(values), max(values)], [place, place], color=GREY, linewidth=2)
    before = [c.unrelated[0] for c in result.of(named[0])] if named else []
    if before:
        lower.axvline(mean(before), color=GREY, linestyle="--", label="before any night")
    for axes in (upper, lower):
        axes.set_yticks(range(len(named)), [ARMS[name].label for name in named], fontsize=11)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("accuracy (lines: lowest to highest seed)", fontsize=13)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    picture.set_size_inches(12.4, picture.get_size_inches()[1])
    return picture


def _named(result: BridgeResult) -> list[str]:
    return [name for name in ARMS if result.of(name)]


def _told(values: Sequence[float | None], *, sign: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    form = "+.3f" if sign else ".3f"
    shown, low, high = (f"{x:{form}}" for x in (mean(known), min(known), max(known)))
    return shown if low == high else f"{shown} ({low} to {high})"


def _words(result: BridgeResult) -> list[str]:
    """Whether a sleep reaches what it is to reach, seed by seed."""
    lines = []
    for name in ("sleep", "own-text"):
        courses = result.of(name)
        shares = [c.share(c.kept) for c in courses]
        if not courses or None in shares:
            continue
        kept = [share for share in shares if share is not None]
        lost = [c.unrelated[0] - c.unrelated[-1] for c in courses]
        reached = min(kept) >= AIM_KEPT and max(lost) <= AIM_LOST
        lines.append(
            f"{ARMS[name].label}: at least half of the gain kept in "
            f"{sum(x >= AIM_KEPT for x in kept)} of {len(kept)} seeds, unrelated texts within 2 "
            f"points in {sum(x <= AIM_LOST for x in lost)}: the aim is "
            f"{'reached' if reached else 'missed'}."
        )
    return lines
