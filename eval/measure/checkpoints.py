"""Trained models as training left them on disk: their runs, and their accuracy by sleep depth."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_sleep.eval.measure.accuracy import SPLIT, measure_depth
from hybrid_sleep.eval.measure.depth import DepthResult, MeasuredRun, TaskRecord, read_baseline
from hybrid_sleep.eval.measure.gradients import gradient_norms
from hybrid_sleep.eval.tasks.accuracy import check_depths
from hybrid_sleep.support.progress import progress_bar
from hybrid_sleep.support.provenance import check_device, provenance
from hybrid_sleep.training.weights import check_model, load_model

if TYPE_CHECKING:
    from hybrid_sleep.training import RunConfig


def bench_checkpoints(
    checkpoints: Sequence[str | os.PathLike],
    depths: Iterable[int],
    *,
    count: int = 2000,
    seed: int = 0,
    batch_size: int = 250,
    device: str = "cpu",
    baseline: str | os.PathLike | None = None,
    gradients: bool = False,
    command: str | None = None,
) -> DepthResult:
    """Measure trained models on the task they were trained for, with a progress bar.

    Several checkpoints are seeds of one recipe. `baseline`: the results.json of a model trained at
    one depth, to compare with (see `read_baseline`). gradients: also how large they are at each
    pass, see `gradient_norms`. Interrupted after the first checkpoint, it returns what it has.

    Raises ValueError or FileNotFoundError, before any model is loaded, for a checkpoint that
    training did not write or that is not whole, for checkpoints of different recipes or of the same
    seed, and for a baseline that cannot be compared.
    """
    depths = check_depths(depths)
    check_device(device)
    if not checkpoints:
        raise ValueError("checkpoints must be one or more folders of trained models, got none")
    runs = [read_run(checkpoint) for checkpoint in checkpoints]
    check_seeds_of_one_recipe(checkpoints, runs)
    for checkpoint in checkpoints:
        check_model(checkpoint)
    task = runs[0].load_task()
    result = DepthResult(
        task=TaskRecord.of(task),
        examples=count,
        split=SPLIT,
        eval_seed=seed,
        runs=[],
        baseline=None if baseline is None else read_baseline(baseline, runs[0]),
        command=command,
        provenance=provenance(device),
    )
    try:
        for number, (checkpoint, run) in enumerate(zip(checkpoints, runs, strict=True), 1):
            model = load_model(checkpoint, device)
            with progress_bar(f"measure {number}/{len(runs)}") as progress:
                measured = measure_depth(model, task, depths, count, seed, batch_size, progress)
            norms = {N: gradient_norms(model, task, N) for N in depths} if gradients else None
            result.runs.append(MeasuredRun.of(checkpoint, run, measured, norms))
    except KeyboardInterrupt:
        if not result.runs:
            raise
        result.ended = "interrupted"
    return result


def check_seeds_of_one_recipe(
    checkpoints: Sequence[str | os.PathLike], runs: Sequence[RunConfig]
) -> None:
    """ValueError unless the runs differ in their seeds, and otherwise in nothing that matters."""
    from hybrid_sleep.training.run import FREE_ON_RESUME
    from hybrid_sleep.training.schema import flat

    may_differ = {"output_dir", "train.seed", "train.device", *FREE_ON_RESUME}
    first = flat(runs[0].to_dict())
    seeds: dict[int, str] = {}
    for checkpoint, run in zip(checkpoints, runs, strict=True):
        name, settings = os.fspath(checkpoint), flat(run.to_dict())
        for key in sorted((first.keys() | settings.keys()) - may_differ):
            if first.get(key) != settings.get(key):
                raise ValueError(
                    f"checkpoints must be seeds of one recipe, got {key}={first.get(key)!r} in "
                    f"{os.fspath(checkpoints[0])!r} and {settings.get(key)!r} in {name!r}"
                )
        if run.train.seed in seeds:
            raise ValueError(
                f"checkpoints must be of different seeds, got train.seed={run.train.seed} in both "
                f"{seeds[run.train.seed]!r} and {name!r}"
            )
        seeds[run.train.seed] = name


def read_run(checkpoint: str | os.PathLike) -> RunConfig:
    """The run that `checkpoint` came from, as training left it beside the weights."""
    from hybrid_sleep.training import load_run_config
    from hybrid_sleep.training.folder import RUN_FILE

    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"checkpoint must be the folder of a trained model, got {str(folder)!r}, which is none"
        )
    # A checkpoint taken on the way lies inside the folder of its run.
    for place in (folder, folder.parent):
        if (place / RUN_FILE).is_file():
            return load_run_config(place / RUN_FILE)
    raise FileNotFoundError(
        f"checkpoint must be a model written by hybrid-sleep train, got {str(folder)!r} without "
        f"{RUN_FILE}, which names its task"
    )
