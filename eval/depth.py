"""Accuracy against sleep depth: the same checkpoint, evaluated at 1, 2, 3... passes per window."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.depth_report import read_baseline, run_record, summarise
from hybrid_sleep.eval.tasks import Task
from hybrid_sleep.eval.tasks.accuracy import check_depths, measure_accuracy
from hybrid_sleep.support.provenance import check_device
from hybrid_sleep.training.weights import check_model, load_model
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from hybrid_sleep.training import RunConfig

SPLIT = "test"


@dataclass(kw_only=True)
class DepthResult:
    """One checkpoint measured at several depths, on `count` examples each.

    `exact` is the share of examples with every label right, `per_question` that of questions,
    `per_label` that of labels, `by_difficulty` that of questions by their difficulty, `seconds` the
    time of all forwards; each by depth. `questions`: how many there were, by difficulty.
    """

    count: int
    eval_seed: int
    split: str = SPLIT
    exact: dict[int, float] = field(default_factory=dict)
    per_question: dict[int, float] = field(default_factory=dict)
    per_label: dict[int, float] = field(default_factory=dict)
    by_difficulty: dict[int, dict[int, float]] = field(default_factory=dict)
    questions: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def depths(self) -> list[int]:
        return list(self.exact)


def measure_depth(
    model: Any,
    task: Task,
    depths: Iterable[int] = range(1, 9),
    count: int = 2000,
    seed: int = 0,
    batch_size: int = 250,
    progress: Callable[[int, int], None] | None = None,
) -> DepthResult:
    """Accuracy of `model` on `count` test examples of `task` at each depth.

    The examples are those of (test, `seed`), the same at every depth. `progress(done, total)` is
    called after every forward; the units are passes over an example. The model is put in eval
    mode and left as it was found. Raises ValueError for depths that are not distinct integers of
    at least 1, or a count or batch size below 1.
    """
    depths = check_depths(depths)
    check_count("count", count)
    check_count("batch_size", batch_size)
    check_count("seed", seed, 0)
    examples = list(task.examples(SPLIT, seed, count))
    batches = [examples[start : start + batch_size] for start in range(0, count, batch_size)]
    done, total = 0, count * sum(depths)

    def step(passes: int) -> None:
        nonlocal done
        done += passes
        if progress is not None:
            progress(done, total)

    # The first call pays for allocations and caches that belong to no depth.
    measure_accuracy(model, task, batches[:1], [1])
    measured = measure_accuracy(model, task, batches, depths, progress=step)
    result = DepthResult(count=count, eval_seed=seed)
    for depth, accuracy in measured.items():
        result.exact[depth] = accuracy.exact
        result.per_question[depth] = accuracy.per_question
        result.per_label[depth] = accuracy.per_label
        result.by_difficulty[depth] = accuracy.by_difficulty
        result.questions = accuracy.questions
        result.seconds[depth] = accuracy.seconds
    return result


def bench_checkpoints(
    checkpoints: Sequence[str | os.PathLike],
    depths: Iterable[int],
    *,
    count: int = 2000,
    seed: int = 0,
    batch_size: int = 250,
    device: str = "cpu",
    baseline: str | os.PathLike | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure trained models on the task they were trained for, with a progress bar.

    Several checkpoints are seeds of one recipe. `baseline`: the results.json of a model trained at
    one depth, to compare with (see `read_baseline`). Interrupted after the first checkpoint, it
    returns what it has, with `complete` False.

    Raises ValueError or FileNotFoundError, before any model is loaded, for a checkpoint that
    training did not write or that is not whole, for checkpoints of different recipes or of the same
    seed, and for a baseline that cannot be compared.
    """
    from hybrid_sleep.support.progress import progress_bar

    depths = check_depths(depths)
    check_device(device)
    if not checkpoints:
        raise ValueError("checkpoints must be one or more folders of trained models, got none")
    runs = [read_run(checkpoint) for checkpoint in checkpoints]
    check_seeds_of_one_recipe(checkpoints, runs)
    for checkpoint in checkpoints:
        check_model(checkpoint)
    base = None if baseline is None else read_baseline(baseline, runs[0])
    task = runs[0].load_task()
    results, complete = [], True
    try:
        for number, checkpoint in enumerate(checkpoints, 1):
            model = load_model(checkpoint, device)
            with progress_bar(f"measure {number}/{len(runs)}") as progress:
                measured = measure_depth(model, task, depths, count, seed, batch_size, progress)
            results.append(measured)
    except KeyboardInterrupt:
        if not results:
            raise
        complete = False
    records = [run_record(*pair) for pair in zip(checkpoints, runs, strict=True)]
    return {
        **summarise(
            task, results, records[: len(results)], baseline=base, device=device, command=command
        ),
        "complete": complete,
    }


def check_seeds_of_one_recipe(
    checkpoints: Sequence[str | os.PathLike], runs: Sequence[RunConfig]
) -> None:
    """ValueError unless the runs differ in their seeds, and otherwise in nothing that matters."""
    from hybrid_sleep.training.run import FREE_ON_RESUME
    from hybrid_sleep.training.schema import flat

    may_differ = {"output_dir", "train.seed", "train.device", *FREE_ON_RESUME}
    first, seeds = flat(runs[0].to_dict()), {}
    for checkpoint, run in zip(checkpoints, runs, strict=True):
        name, settings = os.fspath(checkpoint), flat(run.to_dict())
        for key in sorted((first.keys() | settings.keys()) - may_differ):
            if first.get(key) != settings.get(key):
                raise ValueError(
                    f"checkpoint {name!r} has {key}={settings.get(key)!r}, "
                    f"{os.fspath(checkpoints[0])!r} has {first.get(key)!r}; allowed: several "
                    "seeds of one recipe"
                )
        if run.train.seed in seeds:
            raise ValueError(
                f"checkpoints {seeds[run.train.seed]!r} and {name!r} both have train.seed="
                f"{run.train.seed}; allowed: each seed once"
            )
        seeds[run.train.seed] = name


def read_run(checkpoint: str | os.PathLike) -> RunConfig:
    """The run that `checkpoint` came from, as training left it beside the weights."""
    from hybrid_sleep.training import load_run_config
    from hybrid_sleep.training.folder import RUN_FILE

    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"checkpoint {str(folder)!r} is no folder; allowed: a trained model"
        )
    # A checkpoint taken on the way lies inside the folder of its run.
    for place in (folder, folder.parent):
        if (place / RUN_FILE).is_file():
            return load_run_config(place / RUN_FILE)
    raise FileNotFoundError(
        f"checkpoint {str(folder)!r} has no {RUN_FILE}, which names its task; allowed: a model "
        "written by hybrid-sleep train"
    )


def parse_depths(text: str) -> list[int]:
    """Depths from text such as `1-8` or `1,2,4-6`; ValueError for anything else."""
    depths = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise ValueError(f"depths must be such as 1-8 or 1,2,4, got {text!r}")
        depths += range(int(first), int(last if dash else first) + 1)
    return check_depths(depths)
