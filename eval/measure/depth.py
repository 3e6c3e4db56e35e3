"""Accuracy by sleep depth of trained models, as a result: checkpoints, a baseline, the task."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hybrid_sleep.eval.measure.statistics import Seeds, best_depth, wilson
from hybrid_sleep.eval.results import Result, read
from hybrid_sleep.eval.tasks import Task
from hybrid_sleep.eval.tasks.accuracy import Accuracy

if TYPE_CHECKING:
    from hybrid_sleep.training import RunConfig

Measure = Literal["exact", "per_question", "per_label"]


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """A task as results name it, and what can be scored on it without memory of the past.

    floor: what the best guess scores, by difficulty. majority: what always guessing the most
    frequent label scores, `exact` and `per_label`. chance: what a uniform guess scores.
    """

    name: str
    params: dict[str, Any]
    difficulty: str
    floor: dict[int, float]
    majority: dict[str, float]
    chance: float

    @classmethod
    def of(cls, task: Task) -> TaskRecord:
        """The record of `task`."""
        majority = task.majority()
        return cls(
            name=task.name,
            params=task.params,
            difficulty=task.difficulty,
            floor=task.floor(),
            majority={"exact": majority.exact, "per_label": majority.per_label},
            chance=task.chance(),
        )

    def __str__(self) -> str:
        params = ", ".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.name} ({params})"


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One checkpoint: its name, its seed, depths it was trained at, its config, its accuracy."""

    checkpoint: str
    seed: int
    trained_depths: list[int]
    mean_depth: float
    config: dict[str, Any]
    accuracy: dict[int, Accuracy]

    @classmethod
    def of(
        cls, checkpoint: str | os.PathLike, run: RunConfig, accuracy: Mapping[int, Accuracy]
    ) -> MeasuredRun:
        """`accuracy` by depth of the model in `checkpoint`, which `run` trained."""
        return cls(**run_record(checkpoint, run), accuracy=dict(accuracy))

    @property
    def examples(self) -> int:
        """How many it was trained on."""
        return self.config["train"]["steps"] * self.config["train"]["batch_size"]


def run_record(checkpoint: str | os.PathLike, run: RunConfig) -> dict[str, Any]:
    """What results say of a checkpoint: name, seed, depths it was trained at, its config."""
    folder = Path(checkpoint)
    return {
        "checkpoint": folder.name if folder.is_absolute() else folder.as_posix(),
        "seed": run.train.seed,
        "trained_depths": list(run.sleep_passes.depths()),
        "mean_depth": run.sleep_passes.mean,
        "config": run.to_dict(),
    }


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The same model trained at one depth alone, evaluated there: exact accuracy over its seeds.

    examples_ratio, passes_ratio: how much more it was trained than what it is compared with:
    examples, and passes over a context window summed over examples.
    """

    depth: int
    accuracy: float
    lowest: float
    highest: float
    seeds: list[int]
    examples_ratio: float
    passes_ratio: float
    command: str | None
    provenance: dict[str, Any]


@dataclass(kw_only=True)
class DepthResult(Result):
    """Checkpoints of one recipe, each measured at the same depths on the same test examples."""

    benchmark: ClassVar[str] = "depth"
    continues: ClassVar[bool] = False
    task: TaskRecord
    examples: int
    split: str
    eval_seed: int
    runs: list[MeasuredRun]
    baseline: Baseline | None = None

    @property
    def depths(self) -> list[int]:
        return list(self.runs[0].accuracy)

    def shares(self, measure: Measure, depth: int) -> Seeds:
        """A share of all checkpoints at `depth`."""
        return Seeds(tuple(getattr(run.accuracy[depth], measure) for run in self.runs))

    def by_difficulty(self, depth: int) -> dict[int, float]:
        """Mean shares of questions right at `depth`."""
        found = [run.accuracy[depth].by_difficulty for run in self.runs]
        return {level: mean(shares[level] for shares in found) for level in found[0]}

    def seconds_per_example(self, depth: int) -> float:
        """Mean time of a forward at `depth`."""
        return mean(run.accuracy[depth].seconds for run in self.runs) / self.examples

    def interval(self, run: MeasuredRun, depth: int) -> tuple[float, float]:
        """95 % interval of the exact accuracy of one checkpoint, given how many examples it saw."""
        return wilson(run.accuracy[depth].exact, self.examples)

    @property
    def best_depth(self) -> int:
        """The smallest depth with the highest mean exact accuracy."""
        return best_depth({depth: self.shares("exact", depth).mean for depth in self.depths})


def read_baseline(path: str | os.PathLike, run: RunConfig) -> Baseline:
    """A model trained at one depth, to compare with models trained by `run` at several.

    `path` is the results.json of that model's own depth benchmark. Raises OSError or ValueError if
    the file cannot be read, is no such result, or one of another task or model.
    """
    from hybrid_sleep.training.config import run_config

    result: DepthResult = read(path, DepthResult)
    trained = {tuple(other.trained_depths) for other in result.runs}
    if len(trained) != 1 or len(min(trained)) != 1:
        raise ValueError(
            f"baseline must be trained at one depth, got {str(path)!r}, trained at depths "
            f"{sorted(trained)}"
        )
    ((depth,),) = trained
    theirs = result.runs[0]
    # As it would come back from a file, where a tuple is a list.
    ours = MeasuredRun(**json.loads(json.dumps(run_record("", run))), accuracy={})
    # Fields that a config got since then have their defaults.
    known = json.loads(json.dumps(run_config(theirs.config).to_dict()))
    for key in ("task", "model"):
        if known[key] != ours.config[key]:
            raise ValueError(
                f"baseline must have {key}={ours.config[key]}, got {known[key]} in {str(path)!r}"
            )
    if depth not in result.depths:
        raise ValueError(
            f"baseline must be measured at depth {depth}, which it was trained at, got "
            f"{result.depths} in {str(path)!r}"
        )
    exact, examples = result.shares("exact", depth), theirs.examples / ours.examples
    return Baseline(
        depth=depth,
        accuracy=exact.mean,
        lowest=exact.lowest,
        highest=exact.highest,
        seeds=[other.seed for other in result.runs],
        examples_ratio=examples,
        passes_ratio=examples * theirs.mean_depth / ours.mean_depth,
        command=result.command,
        provenance=result.provenance,
    )
