"""A run compared with others, trained with several seeds: baselines, ablations, variants by hand.

`bench depth CONFIG` compares a run with what the same compute and the same tokens buy at N = 1
(`baselines`), `bench ablate` with variants of it (`ablations`, or changes that are given).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from hybrid_sleep.eval.measure.accuracy import SPLIT
from hybrid_sleep.eval.measure.depth import TaskRecord
from hybrid_sleep.eval.measure.run_cost import one_stage
from hybrid_sleep.eval.measure.statistics import Gap, Seeds, over_questions
from hybrid_sleep.eval.studies import rates as learning_rates
from hybrid_sleep.eval.studies.ablations import ABLATIONS, ablations_of, applicable
from hybrid_sleep.eval.studies.baselines import baselines_of
from hybrid_sleep.eval.studies.variants import (
    REFERENCE,
    Variant,
    compared_at,
    tied_depths,
)
from hybrid_sleep.eval.tasks.accuracy import check_depths
from hybrid_sleep.eval.trials import VALIDATION, Call, TrialsResult

if TYPE_CHECKING:
    from hybrid_sleep.training import RunConfig

AUTO = "adaptive"
ABLATION_NAMES = (*ABLATIONS, AUTO)
FEWEST_SEEDS = 3


class AutoShare(NamedTuple):
    """Accuracy where each row chose its depth: the tolerance, the mean depth, shares by seed."""

    tolerance: float
    passes: float
    per_question: Seeds


@dataclass(kw_only=True)
class Comparison(TrialsResult):
    """Variants of a run, each trained with every seed and measured on the same test examples.

    The first of `variants` is what the others are compared with. left_out: ablations that would
    have changed nothing, and why. rates: what each variant got right on validation examples, by
    multiple of the learning rates, where these were chosen. All shares are of questions.
    """

    benchmark: ClassVar[str] = "comparison"
    task: TaskRecord
    variants: list[Variant]
    left_out: dict[str, str]
    rates: dict[str, dict[float, float]] = field(default_factory=dict)

    @property
    def reference(self) -> Variant:
        return self.variants[0]

    @property
    def measured(self) -> list[Variant]:
        """Variants of which at least one trial is finished."""
        return [variant for variant in self.variants if self.trials(variant.name)]

    @property
    def questions(self) -> dict[int, int]:
        """How many questions of each difficulty the test examples have."""
        first = self.rows[0]
        return first.accuracy[first.depths[0]].questions

    @property
    def kinds(self) -> list[str]:
        """Kinds of questions that the task tells apart, of every difficulty among the examples."""
        first = self.rows[0]
        return first.accuracy[first.depths[0]].kinds

    @property
    def floor(self) -> float:
        """The floor of all questions together."""
        return over_questions(self.task.floor, self.questions)

    def shares(
        self, variant: Variant, depth: int, level: int | None = None, kind: str | None = None
    ) -> Seeds:
        """Questions right at `depth`, of one difficulty (None: of all), over seeds.

        kind: of these, questions of one kind.
        """
        found = self.trials(variant.name).values()
        return Seeds(tuple(trial.accuracy[depth].share(level, kind) for trial in found))

    def tied(self, variant: Variant) -> dict[int, Seeds]:
        """Each difficulty at the depth it was trained at; empty where training ties none, or at
        depths that were not measured."""
        if not set(variant.tied.values()) <= set(variant.depths):
            return {}
        return {x: self.shares(variant, depth, x) for x, depth in variant.tied.items()}

    def ahead(
        self, variant: Variant, level: int | None = None, kind: str | None = None
    ) -> Gap | None:
        """What the reference scores more than `variant`, each where it is compared.

        level: on questions of one difficulty; None: on all. kind: of these, on one kind.
        """
        one, other = (
            {
                seed: trial.accuracy[side.compared_at].share(level, kind)
                for seed, trial in self.trials(side.name).items()
            }
            for side in (self.reference, variant)
        )
        return Gap.between(one, other)

    def steps(self, variant: Variant) -> float:
        """Mean steps of a training."""
        return mean(trial.steps for trial in self.trials(variant.name).values())

    def seconds(self, variant: Variant) -> float:
        """Mean seconds of a training."""
        return mean(trial.seconds for trial in self.trials(variant.name).values())

    def cost(self, variant: Variant) -> dict[str, float] | None:
        """Mean of `cost_of` over seeds; None where it was not counted."""
        trials = self.trials(variant.name).values()
        costs = [trial.cost for trial in trials if trial.cost is not None]
        if len(costs) < len(trials):
            return None
        return {name: mean(cost[name] for cost in costs) for name in costs[0]}

    @property
    def auto(self) -> list[AutoShare]:
        """The reference at depths that its rows choose, by tolerance."""
        trials = self.trials(self.reference.name).values()
        found = [trial.auto for trial in trials if trial.auto is not None]
        return [
            AutoShare(
                tolerance,
                mean(auto[tolerance].passes for auto in found),
                Seeds(tuple(auto[tolerance].per_question for auto in found)),
            )
            for tolerance in (found[0] if found else ())
        ]


def run(
    call: Call,
    *,
    depths: Sequence[int] | None = None,
    baselines: Sequence[str] = (),
    ablations: Sequence[str] | Literal["all"] = (),
    variants: Mapping[str, list[str]] | None = None,
    rates: Sequence[float] = (),
) -> Comparison:
    """Train and measure the run of `call`, and what it is compared with, with every seed.

    depths: where the reference and its ablations are evaluated (default: 1 to the deepest in
    training); baselines are at 1. baselines, ablations: names, of `BASELINES` and of
    `ABLATION_NAMES`; of "all" ablations those that would change nothing of this run are left out.
    variants: `key=value` changes by name, in place of these; the first is the reference. rates:
    multiples of the learning rates, of which each variant gets the one that is best for it on
    validation examples, see `studies.rates`; none: all have those of the run. Raises ValueError or
    FileNotFoundError before anything is trained, also for baselines with fewer than 3 seeds.
    """
    asked = ABLATION_NAMES if ablations == "all" else ablations
    if baselines and len(call.seeds) < FEWEST_SEEDS:
        raise ValueError(
            f"seeds must be at least {FEWEST_SEEDS}, such as 0,1,2, got {list(call.seeds)}"
        )
    if variants and (baselines or asked or rates):
        raise ValueError("variants must come without baselines, ablations and rates, got both")
    multiples = learning_rates.check_rates(rates)
    levels = None if depths is None else check_depths(depths)
    left_out: dict[str, str] = {}
    if variants:
        planned = _given(call, variants, levels)
    else:
        first = call.load(seed=call.seeds[0])
        if baselines or asked:
            one_stage(first)
        levels = levels or list(range(1, first.sleep_passes.deepest + 1))
        names = [name for name in asked if name != AUTO]
        if ablations == "all":
            names, left_out = applicable(first, names, levels)
        planned = [
            _reference(first, levels),
            *baselines_of(first, baselines, levels),
            *ablations_of(first, names, levels),
        ]
    # What cannot be run is refused before hours of rates.
    call.plan({variant.name: variant.changes for variant in planned})
    if multiples:
        return _tuned(call, planned, multiples, AUTO in asked, left_out)
    return _measured(call, planned, AUTO in asked, left_out=left_out)


def _tuned(
    call: Call, planned: list[Variant], rates: list[float], auto: bool, left_out: dict[str, str]
) -> Comparison:
    """The comparison at the rates that are best on validation examples, with a seed of its own."""
    began, trying = time.monotonic(), learning_rates.own_call(call)
    run = trying.load(seed=trying.seeds[0])
    trials = {
        variant.name: learning_rates.trials_of(variant, run, rates)
        for variant in planned
        if not variant.name.endswith("_tokens")
    }
    every = [trial for found in trials.values() for trial in found.values()]
    tried = _measured(trying, every, split=VALIDATION, left_out={})
    if not tried.complete:
        seeds = list(call.seeds)
        return replace(tried, variants=planned, seeds=seeds, rows=[], split=SPLIT)
    shares = {
        name: {rate: tried.shares(t, t.compared_at).mean for rate, t in found.items()}
        for name, found in trials.items()
    }
    best = {name: learning_rates.best(found) for name, found in shares.items()}
    # A baseline at equal tokens is the one at equal compute, ended sooner: it has the same rate.
    planned = [
        learning_rates.at_rate(v, run, best[v.name.removesuffix("_tokens")]) for v in planned
    ]
    if call.minutes is not None:
        left = call.minutes - (time.monotonic() - began) / 60
        call = replace(call, minutes=max(left, 1e-9))
    return _measured(call, planned, auto, left_out=left_out, rates=shares)


def _measured(
    call: Call, planned: list[Variant], auto: bool = False, split: str = SPLIT, **fields: Any
) -> Comparison:
    runs = call.plan({variant.name: variant.changes for variant in planned})
    task = next(iter(runs.values())).load_task()
    return call.run(
        Comparison,
        runs,
        {variant.name: variant.depths for variant in planned},
        {planned[0].name: max(planned[0].depths)} if auto else None,
        split=split,
        task=TaskRecord.of(task),
        variants=planned,
        **fields,
    )


def _reference(run: RunConfig, depths: list[int]) -> Variant:
    drawn = run.sleep_passes.depths()
    words = " in training" if len(drawn) > 1 else ""
    return Variant(
        name=REFERENCE,
        label=f"sleep, N = {', '.join(map(str, drawn))}{words}",
        depths=depths,
        compared_at=compared_at(run, depths),
        role="reference",
        equal="both",
        tied=tied_depths(run),
    )


def _given(
    call: Call, variants: Mapping[str, list[str]], depths: list[int] | None
) -> list[Variant]:
    """The variants that are given, the first as reference."""
    runs = {name: run for (name, _), run in call.plan(variants).items()}
    depths = depths or list(range(1, max(run.sleep_passes.deepest for run in runs.values()) + 1))
    return [
        Variant(
            name=name,
            label=name,
            changes=changes,
            depths=depths,
            compared_at=compared_at(runs[name], depths),
            role="reference" if place == 0 else "ablation",
        )
        for place, (name, changes) in enumerate(variants.items())
    ]
