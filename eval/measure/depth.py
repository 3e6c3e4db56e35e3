"""Accuracy by sleep depth of trained models, as a result: checkpoints, a baseline, the task."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from hybrid_sleep.eval.measure.run_cost import cost_of
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
    """One checkpoint: its name, its seed, depths it was trained at, its config, its accuracy.

    gradients: by depth N, the norm of the loss's gradient at what goes into each pass, see
    `gradient_norms`; none where it was not asked for.
    """

    checkpoint: str
    seed: int
    trained_depths: list[int]
    mean_depth: float
    config: dict[str, Any]
    accuracy: dict[int, Accuracy]
    gradients: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        checkpoint: str | os.PathLike,
        run: RunConfig,
        accuracy: Mapping[int, Accuracy],
        gradients: Mapping[int, list[float]] | None = None,
    ) -> MeasuredRun:
        """`accuracy` and `gradients` by depth of the model in `checkpoint`, which `run` trained."""
        return cls(
            **run_record(checkpoint, run), accuracy=dict(accuracy), gradients=dict(gradients or {})
        )


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
    """The same model trained at one depth alone, evaluated there: accuracy of each of its seeds.

    exact: of whole examples; by_difficulty: share of questions right. examples_ratio and
    compute_ratio: how much more it was trained than what it is compared with, also in FLOPs.
    """

    depth: int
    seeds: list[int]
    exact: list[float]
    by_difficulty: dict[int, list[float]]
    examples_ratio: float
    compute_ratio: float
    command: str | None
    provenance: dict[str, Any]

    def judged(self, level: int | None) -> Seeds:
        """Accuracy on questions of a difficulty, over seeds; None: exact accuracy."""
        return Seeds(tuple(self.exact if level is None else self.by_difficulty[level]))


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

    @property
    def levels(self) -> list[int]:
        """The difficulties of the test questions, ascending; none where it has no name."""
        return list(self.runs[0].accuracy[self.depths[0]].by_difficulty)

    @property
    def kinds(self) -> list[str]:
        """Kinds of questions that the task tells apart, of every difficulty among the examples."""
        return self.runs[0].accuracy[self.depths[0]].kinds

    def of_level(self, level: int, depth: int, kind: str | None = None) -> Seeds:
        """Share of the questions of one difficulty that all checkpoints get right at `depth`.

        kind: of these, questions of one kind.
        """
        return Seeds(tuple(run.accuracy[depth].share(level, kind) for run in self.runs))

    @property
    def hardest(self) -> int | None:
        """The highest difficulty where there are several: what a depth is judged by. Else None."""
        return self.levels[-1] if len(self.levels) > 1 else None

    def judged(self, depth: int) -> Seeds:
        """Accuracy on the hardest questions; exact accuracy where all are equally hard."""
        if self.hardest is None:
            return self.shares("exact", depth)
        return self.of_level(self.hardest, depth)

    def seconds_per_example(self, depth: int) -> float:
        """Mean time of a forward at `depth`."""
        return mean(run.accuracy[depth].seconds for run in self.runs) / self.examples

    def interval(self, run: MeasuredRun, depth: int) -> tuple[float, float]:
        """95 % interval of the exact accuracy of one checkpoint, given how many examples it saw."""
        return wilson(run.accuracy[depth].exact, self.examples)

    @property
    def best_depth(self) -> int:
        """The smallest depth with the highest mean accuracy (see `judged`)."""
        return best_depth({depth: self.judged(depth).mean for depth in self.depths})


def read_baseline(path: str | os.PathLike, run: RunConfig) -> Baseline:
    """A model trained at one depth, to compare with models trained by `run` at several.

    `path` is the results.json of that model's own depth benchmark. Raises OSError or ValueError if
    the file cannot be read, is no such result, or one of another task or model.
    """
    result: DepthResult = read(path, DepthResult)
    trained = {tuple(other.trained_depths) for other in result.runs}
    if len(trained) != 1 or len(min(trained)) != 1:
        raise ValueError(
            f"baseline must be trained at one depth, got {str(path)!r}, trained at depths "
            f"{sorted(trained)}"
        )
    ((depth,),) = trained
    if depth not in result.depths:
        raise ValueError(
            f"baseline must be measured at depth {depth}, which it was trained at, got "
            f"{result.depths} in {str(path)!r}"
        )
    return baseline_of(result.runs, depth, run, path, result)


class Trained(Protocol):
    """A model that was trained and measured: with what seed and config, how well at which depth."""

    @property
    def seed(self) -> int: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def accuracy(self) -> dict[int, Accuracy]: ...


def baseline_of(
    models: Sequence[Trained], depth: int, run: RunConfig, path: str | os.PathLike, result: Result
) -> Baseline:
    """The `models` of one config in `result`, which lies at `path`, as a baseline of `run`.

    Raises ValueError if they are of another task, or of another model but for its default depth.
    """
    from hybrid_sleep.training.config import run_config

    theirs = run_config(models[0].config)
    # As they would come back from a file, where a tuple is a list.
    known, ours = (json.loads(json.dumps(one.to_dict())) for one in (theirs, run))
    for config in (known, ours):
        config["model"].pop("sleep_passes", None)
    for key in ("task", "model"):
        if known[key] != ours[key]:
            raise ValueError(
                f"baseline must have {key}={ours[key]}, got {known[key]} in {str(path)!r}"
            )
    found = [model.accuracy[depth] for model in models]
    other, own = cost_of(theirs), cost_of(run)
    return Baseline(
        depth=depth,
        seeds=[model.seed for model in models],
        exact=[accuracy.exact for accuracy in found],
        by_difficulty={x: [a.by_difficulty[x] for a in found] for x in found[0].by_difficulty},
        examples_ratio=other["examples"] / own["examples"],
        compute_ratio=other["training_flops"] / own["training_flops"],
        command=result.command,
        provenance=result.provenance,
    )
