"""How strongly to write: the front of recall against locality, and the point chosen on it.

What suits a model of one size underfits or ruins another, so the weight of what is preserved is
tried on probe facts, from weak to strong. v* is found once; the edits are put beside the weights,
which are not touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import nn

from hybrid_sleep.parametric.edit import EditOptions, plan_facts, solve_plan
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.gate import LOWER_IS_BETTER, Measured, Thresholds
from hybrid_sleep.parametric.probes import Baseline, Probes, audit, measure
from hybrid_sleep.parametric.sites import Site, added
from hybrid_sleep.parametric.solve import Preconditioner, Spectrum
from hybrid_sleep.support.io import write_json_atomic, write_text_atomic
from hybrid_sleep.support.markdown import table
from hybrid_sleep.support.plots import GREY, INK, STYLES, new_figure, save_figure
from hybrid_sleep.validation import check_number

WEIGHTS = tuple(10.0**power for power in range(-1, 5))
# What of a budget says how little must be lost, and what how much must be gained.
COSTS = ("locality", "perplexity_ratio", "calibration", "negation")
GAINS = ("recall", "paraphrase")


@dataclass(frozen=True)
class Point:
    """One strength: `weight` and `clamp` of the edit, what was measured, error and norm of the
    solve."""

    weight: float
    clamp: float
    measured: Measured
    error: float
    norm: float


@dataclass(frozen=True)
class Calibration:
    """The front: `points`, by clamp and falling weight; `chosen` of them, and `why`."""

    points: tuple[Point, ...]
    chosen: Point
    why: str
    budget: Thresholds
    options: EditOptions

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def text(self) -> str:
        """A table in Markdown, and why the point was chosen."""

        def share(value: float | None) -> str:
            return "" if value is None else f"{value:.3f}"

        rows = [
            [
                f"{point.weight:g}",
                f"{point.clamp:g}",
                share(point.measured.recall),
                share(point.measured.paraphrase),
                share(point.measured.negation),
                share(point.measured.locality),
                share(point.measured.perplexity_ratio),
                share(point.measured.calibration),
                f"{point.norm:.3g}",
                "chosen" if point is self.chosen else "",
            ]
            for point in self.points
        ]
        head = ["weight", "clamp", "recall", "paraphrase", "negation", "locality"]
        head += ["perplexity ratio", "calibration error gained", "norm of the edit", ""]
        return "\n".join([*table(head, rows), "", f"{self.why}."]) + "\n"

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Write calibration.json, calibration.md, front.png into `folder`; returns their paths."""
        folder = Path(folder)
        paths = [folder / f"calibration.{kind}" for kind in ("json", "md")]
        write_json_atomic(paths[0], self.to_dict())
        write_text_atomic(paths[1], self.text())
        figure, axes = new_figure("Recall against locality, by the strength of an edit")
        clamps = sorted({point.clamp for point in self.points})
        for clamp, (colour, mark, line) in zip(clamps, cycle(STYLES), strict=False):
            own = sorted((p for p in self.points if p.clamp == clamp), key=lambda p: p.weight)
            x, y = ([getattr(p.measured, name) for p in own] for name in ("locality", "recall"))
            axes.plot(x, y, color=colour, marker=mark, linestyle=line, label=f"clamp {clamp:g}")
            for point, at in zip(own, zip(x, y, strict=True), strict=True):
                axes.annotate(
                    f"{point.weight:g}", at, (4, 4), textcoords="offset points", color=GREY
                )
        best = self.chosen.measured
        assert best.locality is not None and best.recall is not None
        axes.plot(best.locality, best.recall, "o", ms=16, mfc="none", mec=INK, label="chosen")
        for bound, draw in (
            (self.budget.locality, axes.axvline),
            (self.budget.recall, axes.axhline),
        ):
            if bound is not None:
                draw(bound, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("locality (numbers: weight of what is preserved)", fontsize=12)
        axes.set_ylabel("recall", fontsize=12)
        axes.legend(frameon=False, fontsize=11)
        save_figure(figure, folder / "front.png")
        return [*paths, folder / "front.png"]


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[tuple[Fact, Relation]],
    probes: Probes,
    statistics: Mapping[Site, Spectrum],
    *,
    options: EditOptions | None = None,
    weights: Sequence[float] = WEIGHTS,
    clamps: Sequence[float] | None = None,
    budget: Thresholds | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """The options of an edit with the strength that suits `model`, and all that was tried.

    facts: probes, which the model does not know, as many as will be in the weights together.
    probes: what must stay as it is. statistics: of the keys of each site to edit. weights: to try,
    at each of `clamps` (None: that of the options).

    Chosen is the largest weight, which changes the model the least, that holds all of `budget`; if
    there is none, the highest recall and paraphrase of those that hold its locality, perplexity and
    negation; if there is none of these, the highest locality. `why` says which.

    The weights are not touched. Raises ValueError for no facts or weights, and weights <= 0.
    """
    if not facts:
        raise ValueError("facts must be one or more, got none")
    options, budget = options or EditOptions(), budget or Thresholds()
    clamps = (options.target.clamp,) if clamps is None else tuple(clamps)
    if not weights or not clamps:
        raise ValueError("weights and clamps must be one or more, got none")
    for weight in weights:
        check_number("weights", weight, above=0)
    sites = sorted(statistics, key=lambda site: site.layer)
    items = [(i, fact, relation) for i, (fact, relation) in enumerate(facts)]
    baseline = Baseline.of(model, tokenizer, probes)
    points: list[Point] = []
    for clamp in clamps:
        at = replace(options, target=replace(options.target, clamp=clamp))
        plan = plan_facts(model, tokenizer, items, sites[-1], at)
        for weight in sorted(set(weights), reverse=True):
            conditioned = {
                site: Preconditioner(statistics[site], weight, options.filter) for site in sites
            }
            edit = solve_plan(model, plan, conditioned)
            with added(model, {site: edit.factors[site.name] for site in sites}):
                results = audit(model, tokenizer, facts, every=True)
                found = measure(model, tokenizer, results, probes, baseline)
            solved = list(edit.solutions.values())
            points.append(
                Point(
                    weight,
                    clamp,
                    found,
                    max(one["error"] for one in solved),
                    sum(one["norm"] ** 2 for one in solved) ** 0.5,
                )
            )
            if progress is not None:
                progress(len(points), len(clamps) * len(set(weights)))
    chosen, why = choose(points, budget)
    target = replace(options.target, clamp=chosen.clamp)
    best = replace(options, weight=chosen.weight, target=target)
    return Calibration(tuple(points), chosen, why, budget, best)


def choose(points: Sequence[Point], budget: Thresholds) -> tuple[Point, str]:
    """The point that `calibrate` describes, and why it is that one."""

    def said(point: Point) -> float:
        return (point.measured.recall or 0.0) + (point.measured.paraphrase or 0.0)

    words = ", ".join(
        f"{name.replace('_', ' ')} {getattr(budget, name)}"
        for name in (*COSTS, *GAINS)
        if getattr(budget, name) is not None
    )
    within = [p for p in points if all(_holds(p.measured, budget, name) for name in COSTS)]
    enough = [p for p in within if all(_holds(p.measured, budget, name) for name in GAINS)]
    if enough:
        best = max(enough, key=lambda point: (point.weight, -point.clamp))
        return best, f"Weight {best.weight:g} is the largest with all of {words}"
    if within:
        best = max(within, key=lambda point: (said(point), point.weight))
        return best, (
            f"No weight has all of {words}; {best.weight:g} recalls the most of those that cost no "
            "more than that"
        )
    best = max(points, key=lambda point: (point.measured.locality or 0.0, point.weight))
    return best, f"Every weight costs more than {words}; {best.weight:g} has the highest locality"


def _holds(found: Measured, budget: Thresholds, name: str) -> bool:
    value, bound = getattr(found, name), getattr(budget, name)
    if value is None or bound is None:
        return True
    return bool(value <= bound if name in LOWER_IS_BETTER else value >= bound)
