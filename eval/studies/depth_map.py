"""Where does depth win? Difficulty x sleep depth x compute, one model trained for each.

All models of a map have the same parameters and the same cost in decoding. Those of one compute
take the same FLOPs to train, so a deeper sleep is paid for with fewer steps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar

from hybrid_sleep.eval.measure.depth import TaskRecord
from hybrid_sleep.eval.measure.run_cost import cost_of, one_stage
from hybrid_sleep.eval.measure.statistics import Gap, Seeds
from hybrid_sleep.eval.tasks.accuracy import check_depths
from hybrid_sleep.eval.trials import Call, Trial, TrialsResult


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of a map: what the varied key has, its sleep depth, its multiple of compute."""

    value: str
    depth: int
    compute: float


@dataclass(kw_only=True)
class DepthMap(TrialsResult):
    """Share of questions right by difficulty, depth and compute, each at the depth of training.

    key, values: what is varied. floors: mean floor over difficulties, by value. flops: what 1 x
    compute is. cells: by the name of the variant.
    """

    benchmark: ClassVar[str] = "map"
    task: TaskRecord
    key: str
    values: list[str]
    floors: dict[str, float]
    depths: list[int]
    compute: list[float]
    flops: float
    cells: dict[str, Cell]

    def at(self, value: str, compute: float) -> dict[int, dict[int, Trial]]:
        """Trials by depth and seed; depths without a finished one are left out."""
        found = {
            cell.depth: self.trials(name)
            for name, cell in self.cells.items()
            if (cell.value, cell.compute) == (value, compute)
        }
        return {depth: found[depth] for depth in self.depths if found.get(depth)}

    def shares(self, value: str, compute: float) -> dict[int, Seeds]:
        """Questions right by depth, over seeds."""
        return {
            depth: Seeds(tuple(_share(trial) for trial in trials.values()))
            for depth, trials in self.at(value, compute).items()
        }

    def ahead(self, value: str, compute: float, depth: int) -> Gap | None:
        """What `depth` scores more than the smallest depth of the map, seed by seed."""
        one, other = (
            {seed: _share(t) for seed, t in self.at(value, compute).get(d, {}).items()}
            for d in (depth, self.depths[0])
        )
        return Gap.between(one, other)

    def steps(self, value: str, compute: float) -> dict[int, int]:
        """Mean steps of training by depth."""
        return {
            depth: round(mean(trial.steps for trial in trials.values()))
            for depth, trials in self.at(value, compute).items()
        }


def _share(trial: Trial) -> float:
    return trial.accuracy[trial.depths[0]].per_question


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """Key and values of `key=[value, ...]`; ValueError for anything else."""
    from hybrid_sleep.training.parsing import parse_overrides

    ((key, values),) = parse_overrides([text])
    if not isinstance(values, list) or len({str(value) for value in values}) < max(1, len(values)):
        raise ValueError(f"vary must be such as task.params.steps=[2,4,6], got {text!r}")
    return key, values


def run(
    call: Call,
    vary: str,
    *,
    depths: Sequence[int] = (1, 2, 4),
    compute: Sequence[float] = (1.0, 3.0),
) -> DepthMap:
    """Train a model for every value of `vary`, depth, multiple of compute and seed; measure it.

    vary: `key=[values]`, what makes the task harder. compute: multiples of the FLOPs of the
    config's own run, as it stands, with the first value; every other cell takes as many steps as
    come nearest to its multiple. Raises ValueError or FileNotFoundError before anything is trained.
    """
    key, values = parse_vary(vary)
    levels, multiples = check_depths(depths), sorted(compute)
    base = one_stage(call.load({key: values[0]}))
    unit = cost_of(base)["training_flops"]
    cells, variants = {}, {}
    for value in values:
        for depth in levels:
            changes = {key: value, "sleep_passes": depth, "model.sleep_passes": depth}
            step = cost_of(call.load({**changes, "train.steps": 1, "train.warmup": 0}))
            for multiple in multiples:
                steps = max(1, round(multiple * unit / step["training_flops"]))
                name = re.sub(r"[^\w.-]+", "_", f"{key.rpartition('.')[2]}{value}").strip("_")
                name = f"{name}-N{depth}-C{multiple:g}"
                warmup = {"train.steps": steps, "train.warmup": min(base.train.warmup, steps)}
                variants[name] = {**changes, **warmup}
                cells[name] = Cell(value=str(value), depth=depth, compute=multiple)
    runs = call.plan(variants, one_task=False)
    floors = {
        cells[name].value: mean(run.load_task().floor().values())
        for (name, seed), run in runs.items()
        if seed == call.seeds[0]
    }
    return call.run(
        DepthMap,
        runs,
        {name: [cell.depth] for name, cell in cells.items()},
        task=TaskRecord.of(base.load_task()),
        key=key,
        values=[str(value) for value in values],
        floors=floors,
        depths=levels,
        compute=multiples,
        flops=unit,
        cells=cells,
    )
