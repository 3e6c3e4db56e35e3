"""Accuracy against sleep depth: the same checkpoint, asked after 1, 2, 3... passes per window.

A checkpoint is asked the way a user would ask it. The whole past and the separator go in without
labels, so every full window sleeps, at the depth asked for; the token at position t is predicted
by the logits at t-1, from pass 1. Later labels are predicted with the earlier ones given, in the
same forward. For `exact` that is the same as answering freely: an example counts only if every
label is right, and up to the first mistake the two see the same tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.depth_report import read_baseline, run_record, summarise
from hybrid_sleep.eval.tasks import Task
from hybrid_sleep.eval.tasks.base import check_int
from hybrid_sleep.support.provenance import check_device
from hybrid_sleep.training.weights import check_model, load_model

if TYPE_CHECKING:
    import torch

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
    import torch

    depths = check_depths(depths)
    check_int("count", count, 1)
    check_int("batch_size", batch_size, 1)
    check_int("seed", seed, 0)
    examples = list(task.examples(SPLIT, seed, count))
    tokens = torch.tensor([example["input_ids"] for example in examples])
    device = next(model.parameters()).device
    result = DepthResult(count=count, eval_seed=seed)
    predictions = {depth: [] for depth in depths}
    seconds = dict.fromkeys(depths, 0.0)
    done, total = 0, count * sum(depths)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            # The first call pays for allocations and caches that belong to no depth.
            predict(model, tokens[:batch_size].to(device), 1)
            for start in range(0, count, batch_size):
                input_ids = tokens[start : start + batch_size].to(device)
                for depth in depths:
                    began = time.perf_counter()
                    predictions[depth].append(predict(model, input_ids, depth).cpu())
                    seconds[depth] += time.perf_counter() - began
                    done += len(input_ids) * depth
                    if progress is not None:
                        progress(done, total)
    finally:
        model.train(training)
    for depth in depths:
        score = task.score(torch.cat(predictions[depth]), examples)
        for name in ("exact", "per_question", "per_label", "by_difficulty"):
            getattr(result, name)[depth] = score[name]
        result.questions = score["questions"]
        result.seconds[depth] = seconds[depth]
    return result


def predict(model: Any, input_ids: torch.Tensor, depth: int) -> torch.Tensor:
    """The model's choice for every token of `input_ids` [B, T], given those before it.

    The first token, which nothing precedes, gets -1.
    """
    import torch

    chosen = model(input_ids=input_ids[:, :-1], sleep_passes=depth, use_cache=False).logits.argmax(
        -1
    )
    return torch.nn.functional.pad(chosen, (1, 0), value=-1)


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
    from hybrid_sleep.eval.progress import progress_bar

    depths = check_depths(depths)
    check_device(device)
    if not checkpoints:
        raise ValueError("checkpoints is empty; allowed: one or more folders of trained models")
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
            raise ValueError(f"depths={text!r}; allowed: such as 1-8 or 1,2,4")
        depths += range(int(first), int(last if dash else first) + 1)
    return check_depths(depths)


def check_depths(depths: Iterable[int]) -> list[int]:
    """`depths` in ascending order; ValueError unless distinct integers of at least 1."""
    checked = [check_int("depths", depth, 1) for depth in depths]
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"depths={checked}; allowed: one or more distinct integers of at least 1")
    return sorted(checked)
