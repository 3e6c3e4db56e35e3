"""Trials: runs that are trained with every seed and measured; planned at once, run, resumed.

Runs of one seed share more than luck: the data, often the first weights and the checkpoint that
they start from. So seeds are compared in pairs.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hybrid_sleep.eval.measure.accuracy import SPLIT, measure_auto, measure_depth
from hybrid_sleep.eval.measure.run_cost import cost_of
from hybrid_sleep.eval.results import Result
from hybrid_sleep.eval.tasks.accuracy import Accuracy
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.training.data import TRAIN_SPLIT, held_out_seed
from hybrid_sleep.training.weights import load_model
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from hybrid_sleep.training import RunConfig

Changes = Mapping[str, Any] | Sequence[str]
SEED = "{seed}"
VALIDATION = "validation"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of a variant with one seed, and the accuracy of its model.

    split: of the examples: test, or validation, which a run is watched on while it trains (see
    `HeldOut`). auto_passes: the most passes where the model's own depth was measured too, see
    `auto`. first_weights: a digest of the checkpoint that training started from. seconds: of
    training. accuracy: by depth. auto: by tolerance (see `measure_auto`). cost: see `cost_of`; None
    in results from before it was counted.
    """

    variant: str
    seed: int
    depths: list[int]
    examples: int
    split: str = SPLIT
    auto_passes: int | None = None
    config: dict[str, Any]
    first_weights: str | None
    steps: int
    seconds: float
    accuracy: dict[int, Accuracy]
    auto: dict[float, Accuracy] | None = None
    cost: dict[str, float] | None = None


@dataclass(kw_only=True)
class TrialsResult(Result):
    """What all studies of trials have. clock: of `seconds`, "processor" or "wall"."""

    config: str
    overrides: list[str]
    examples: int
    split: str = SPLIT
    seeds: list[int]
    clock: str
    rows: list[Trial]

    def trials(self, variant: str) -> dict[int, Trial]:
        """Finished trials of a variant, by seed."""
        return {row.seed: row for row in self.rows if row.variant == variant}


def _asked(run: RunConfig) -> tuple[Any, ...] | None:
    return None if run.task is None else (run.task.name, run.task.params)


R = TypeVar("R", bound=TrialsResult)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a study, which a later one with the same `out` continues.

    config: a run's YAML file; overrides: changes to it, `key=value`, in which `{seed}` stands for
    the seed. seeds: of every variant. count: test examples of each model and depth. jobs: trainings
    at the same time, each in a process. minutes: stop before a training that might take longer.
    out: folder whose results.json gets every trial when it is finished, and whose trials of the
    same code, machine, config and first weights are kept. command: what to call it in the result.
    progress: called with (trials done, trials in all). Raises ValueError for numbers that cannot
    be.
    """

    config: str | os.PathLike
    overrides: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2)
    count: int = 2000
    jobs: int = 1
    minutes: float | None = None
    out: Path | None = None
    command: str | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        check_count("count", self.count)
        check_count("jobs", self.jobs)
        for seed in self.seeds:
            check_count("seeds", seed, 0)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more, each once, got {list(self.seeds)}")

    def load(
        self, changes: Changes = (), seed: int | None = None, **more: Any
    ) -> RunConfig:
        """The run of the config with `changes` and `more` of them, for `seed` (None: its own)."""
        from hybrid_sleep.training import load_run_config
        from hybrid_sleep.training.parsing import parse_overrides

        texts = [*self.overrides, *(() if isinstance(changes, Mapping) else changes)]
        shown = str(self.seeds[0] if seed is None else seed)
        given = dict(parse_overrides([text.replace(SEED, shown) for text in texts]))
        given |= changes if isinstance(changes, Mapping) else {}
        given |= {} if seed is None else {"train.seed": seed}
        return load_run_config(self.config, {**given, **more})

    def plan(
        self, variants: Mapping[str, Changes], *, one_task: bool = True
    ) -> dict[tuple[str, int], RunConfig]:
        """The run of every variant and seed, in a folder of its own in the config's output_dir.

        Raises ValueError, naming the variant, for an impossible run or (with `one_task`) one that
        does not learn the task of the others.
        """
        runs: dict[tuple[str, int], RunConfig] = {}
        for seed in self.seeds:
            for name, changes in variants.items():
                try:
                    out = Path(self.load(changes, seed).output_dir) / name / f"seed{seed}"
                    run = self.load(changes, seed, output_dir=str(out))
                    first = next(iter(runs.values()), run)
                    # How often a window of it is written is no other task.
                    if run.task is None or (one_task and _asked(run) != _asked(first)):
                        raise ValueError(f"task must be one for all variants, got {run.task}")
                except (ValueError, FileNotFoundError) as error:
                    raise type(error)(f"variant {name!r}: {error}") from error
                runs[name, seed] = run
        return runs

    def run(
        self,
        kind: type[R],
        runs: Mapping[tuple[str, int], RunConfig],
        depths: Mapping[str, Sequence[int]],
        auto_passes: Mapping[str, int] | None = None,
        /,
        split: str = SPLIT,
        **fields: Any,
    ) -> R:
        """The `kind` of result with `fields`: each of `runs` trained, and measured at its `depths`.

        auto_passes: of variants whose models are also measured at depths of their own. An earlier
        training in a run's folder is replaced. Interrupted after the first trial or out of
        `minutes`, the result has the trials that are done.
        """
        device = device_of(next(iter(runs.values())))
        planned = [
            {
                "variant": name,
                "seed": seed,
                "depths": list(depths[name]),
                "examples": self.count,
                "split": split,
                "auto_passes": (auto_passes or {}).get(name),
                "config": run.to_dict(),
                "first_weights": None if run.init is None else _digest(run.init.checkpoint),
            }
            for (name, seed), run in runs.items()
        ]
        header = kind(
            config=Path(self.config).name,
            overrides=list(self.overrides),
            examples=self.count,
            split=split,
            seeds=list(self.seeds),
            clock="processor" if device == "cpu" else "wall",
            rows=[],
            command=self.command,
            provenance=provenance(device),
            **fields,
        )
        content = collect(
            header.content(),
            planned,
            partial(train_and_measure, dict(runs)),
            jobs=self.jobs,
            minutes=self.minutes,
            out=self.out,
            progress=self.progress,
        )
        return kind.from_content(content)


def train_and_measure(runs: Mapping[tuple[str, int], RunConfig], key: Row) -> Row:
    """What a `Trial` says beside its key."""
    from hybrid_sleep.training import train
    from hybrid_sleep.training.run import threads

    run = runs[key["variant"], key["seed"]]
    device, task = device_of(run), run.load_task()
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    trained = train(run, overwrite=True, progress=False)
    seconds = clock() - began
    most = key["auto_passes"]
    with threads(run.train.threads):
        model = load_model(trained.model_dir, device)
        drawn: dict[str, Any] = {}
        if key["split"] == VALIDATION:
            drawn = {"split": TRAIN_SPLIT, "seed": held_out_seed(run.train.seed)}
        accuracy = measure_depth(model, task, key["depths"], key["examples"], **drawn)
        auto = None
        if most is not None:
            auto = measure_auto(model, task, max_passes=most, count=key["examples"])
    return {
        "steps": trained.steps,
        "seconds": seconds,
        "accuracy": _plain(accuracy),
        "auto": None if auto is None else _plain(auto),
        "cost": cost_of(run),
    }


def device_of(run: RunConfig) -> str:
    """Where `run` trains: `cuda` or `cpu`."""
    import torch

    return "cuda" if run.train.device == "auto" and torch.cuda.is_available() else "cpu"


def _plain(accuracy: Mapping[Any, Accuracy]) -> dict[Any, dict[str, Any]]:
    return {depth: asdict(found) for depth, found in accuracy.items()}


def _digest(checkpoint: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
