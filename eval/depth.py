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
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.provenance import describe, provenance
from hybrid_sleep.eval.tasks import Task
from hybrid_sleep.eval.tasks.base import check_int

if TYPE_CHECKING:
    import torch

    from hybrid_sleep.training import RunConfig

Z95 = 1.959963984540054
SPLIT = "test"


@dataclass(kw_only=True)
class DepthResult:
    """One checkpoint measured at several depths, on `count` examples each.

    `exact` is the share of examples with every label right, `per_label` the share of labels,
    `seconds` the time of all forwards; each by depth.
    """

    count: int
    eval_seed: int
    exact: dict[int, float] = field(default_factory=dict)
    per_label: dict[int, float] = field(default_factory=dict)
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
    data = task.batch(SPLIT, seed, count)
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
            predict(model, data["input_ids"][:batch_size].to(device), 1)
            for start in range(0, count, batch_size):
                input_ids = data["input_ids"][start : start + batch_size].to(device)
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
        score = task.score(torch.cat(predictions[depth]), data)
        result.exact[depth] = score["exact"]
        result.per_label[depth] = score["per_label"]
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
    command: str | None = None,
) -> dict[str, Any]:
    """Measure trained models, each on the task it was trained for, with a progress bar.

    Several checkpoints are taken as seeds of one recipe. Raises ValueError or FileNotFoundError,
    before any model is loaded, if one of them was not written by training or if their tasks
    differ.
    """
    from hybrid_sleep.eval.progress import progress_bar

    depths = check_depths(depths)
    if not checkpoints:
        raise ValueError("checkpoints is empty; allowed: one or more folders of trained models")
    runs = [read_run(checkpoint) for checkpoint in checkpoints]
    for checkpoint, run in zip(checkpoints, runs, strict=True):
        if run.task != runs[0].task:
            raise ValueError(
                f"{os.fspath(checkpoint)} was trained on {run.task}, {os.fspath(checkpoints[0])} "
                f"on {runs[0].task}; allowed: checkpoints of one task"
            )
    task = runs[0].load_task()
    results, records = [], []
    for number, (checkpoint, run) in enumerate(zip(checkpoints, runs, strict=True), 1):
        model = load_model(checkpoint, device)
        with progress_bar(f"measure {number}/{len(runs)}") as progress:
            results.append(measure_depth(model, task, depths, count, seed, batch_size, progress))
        records.append(run_record(checkpoint, run))
    return summarise(task, results, records, device=device, command=command)


def load_model(checkpoint: str | os.PathLike, device: Any = "cpu") -> Any:
    """The model saved in `checkpoint`, without transformers' bar for its few weights."""
    from transformers.utils import logging

    from hybrid_sleep import HybridSleepForCausalLM

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return HybridSleepForCausalLM.from_pretrained(os.fspath(checkpoint)).to(device)
    finally:
        if shown:
            logging.enable_progress_bar()


def read_run(checkpoint: str | os.PathLike) -> RunConfig:
    """The run that `checkpoint` came from, as training left it beside the weights."""
    from hybrid_sleep.training import load_run_config
    from hybrid_sleep.training.run import RUN_FILE

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


def run_record(checkpoint: str | os.PathLike, run: RunConfig) -> dict[str, Any]:
    """What results.json says of a checkpoint: its name, its seed, its whole configuration."""
    folder = Path(checkpoint)
    return {
        "checkpoint": folder.name if folder.is_absolute() else folder.as_posix(),
        "seed": run.train.seed,
        "trained_depths": sorted(run.sleep_passes.probabilities()),
        "config": run.to_dict(),
    }


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


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share seen in `count` independent trials."""
    centre = share + Z95**2 / (2 * count)
    spread = Z95 * sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    # At 0 and 1 the bound is exact; rounding must not push it outside.
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def summarise(
    task: Task,
    results: Sequence[DepthResult],
    runs: Sequence[dict[str, Any]],
    *,
    device: Any = "cpu",
    command: str | None = None,
) -> dict[str, Any]:
    """What goes into results.json: one entry a checkpoint, their mean and spread, the floor.

    `runs[i]` describes the checkpoint behind `results[i]` (checkpoint, seed, config). `accuracy`
    is the mean of the checkpoints by depth, `spread` their lowest and highest; `interval` of a
    run is the 95 % interval of its own accuracy, given how many examples it saw.
    """
    depths = results[0].depths
    floor = task.floor()
    mean = {}
    for name in ("exact", "per_label", "seconds"):
        by_run = [getattr(result, name) for result in results]
        mean[name] = {d: sum(values[d] for values in by_run) / len(results) for d in depths}
    return {
        "benchmark": "depth",
        "task": {"name": task.name, "params": task.params},
        "floor": floor["exact"],
        "floor_per_label": floor["per_label"],
        "accuracy": _keyed(mean["exact"]),
        "per_label": _keyed(mean["per_label"]),
        "spread": _keyed(
            {
                d: [min(r.exact[d] for r in results), max(r.exact[d] for r in results)]
                for d in depths
            }
        ),
        "seconds_per_example": _keyed({d: mean["seconds"][d] / results[0].count for d in depths}),
        "best_depth": best_depth(mean["exact"]),
        "examples": results[0].count,
        "split": SPLIT,
        "eval_seed": results[0].eval_seed,
        "runs": [
            {
                **run,
                **{
                    name: _keyed(values)
                    for name, values in asdict(result).items()
                    if isinstance(values, dict)
                },
                "interval": _keyed({d: wilson(result.exact[d], result.count) for d in depths}),
            }
            for run, result in zip(runs, results, strict=True)
        ],
        "command": command,
        "provenance": provenance(device),
    }


def best_depth(accuracy: dict[int, float]) -> int:
    """The smallest depth with the highest accuracy."""
    return max(sorted(accuracy), key=lambda depth: accuracy[depth])


def _keyed(by_depth: dict[int, Any]) -> dict[str, Any]:
    return {str(depth): value for depth, value in by_depth.items()}


def markdown(result: dict[str, Any]) -> str:
    """The table of a depth result, with the floor, what was asked, and where it came from."""
    several = len(result["runs"]) > 1
    seeds = [f"seed {run['seed']}" for run in result["runs"]] if several else []
    spread = ["lowest to highest"] if several else ["95 % interval"]
    head = ["depth N", "exact", *spread, *seeds, "per label", "ms per example", "cost"]
    lines = [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
    first = result["seconds_per_example"][min(result["accuracy"], key=int)]
    for depth, accuracy in result["accuracy"].items():
        low, high = (result["spread"] if several else result["runs"][0]["interval"])[depth]
        seconds = result["seconds_per_example"][depth]
        cells = [
            depth,
            _bold(f"{accuracy:.3f}", int(depth) == result["best_depth"]),
            f"{low:.3f} to {high:.3f}",
            *(f"{run['exact'][depth]:.3f}" for run in result["runs"] if several),
            f"{result['per_label'][depth]:.3f}",
            f"{1000 * seconds:.2f}",
            f"{seconds / first:.2f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    params = ", ".join(f"{name}={value}" for name, value in result["task"]["params"].items())
    lines += [
        "",
        f"Task: {result['task']['name']} ({params}); {result['examples']} test examples a depth, "
        f"evaluation seed {result['eval_seed']}. Floor (always the most frequent label): "
        f"exact {result['floor']:.4f}, per label {result['floor_per_label']:.4f}.",
        "",
        describe(result["provenance"]),
    ]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def _bold(text: str, when: bool) -> str:
    return f"**{text}**" if when else text


def figure(result: dict[str, Any]) -> Any:
    """Accuracy against depth, the floor, and the spread, as a matplotlib figure."""
    from hybrid_sleep.eval.plots import depth_figure

    return depth_figure(result)
