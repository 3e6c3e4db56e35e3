"""The result of a depth benchmark as data, in words, as a table and as a figure.

`summarise` makes the dict of results.json; everything else here reads that dict alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.statistics import over_seeds, wilson
from hybrid_sleep.eval.tasks import Task
from hybrid_sleep.support.io import keyed, unreadable
from hybrid_sleep.support.provenance import describe, provenance
from hybrid_sleep.support.records import read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.eval.depth import DepthResult
    from hybrid_sleep.training import RunConfig

EQUAL_WITHIN = 0.02


def summarise(
    task: Task,
    results: Sequence[DepthResult],
    runs: Sequence[dict[str, Any]],
    *,
    baseline: dict[str, Any] | None = None,
    device: Any = "cpu",
    command: str | None = None,
) -> dict[str, Any]:
    """What goes into results.json: one entry a checkpoint, their mean and spread, the floor.

    `runs[i]` is the `run_record` of the checkpoint behind `results[i]`. `accuracy` is the mean of
    the checkpoints by depth, `spread` their lowest and highest, `interval` its 95 % interval over
    them (see `over_seeds`); `interval` of a run is that of its own accuracy, given how many
    examples it saw. `by_difficulty`: mean shares of questions right. `baseline`: see
    `read_baseline`.
    """
    depths = results[0].depths
    majority = task.majority()
    mean = {}
    for name in ("exact", "per_question", "per_label", "seconds"):
        by_run = [getattr(result, name) for result in results]
        mean[name] = {d: sum(values[d] for values in by_run) / len(results) for d in depths}
    exact = {d: [result.exact[d] for result in results] for d in depths}
    return {
        "benchmark": "depth",
        "task": {"name": task.name, "params": task.params},
        "floor": majority.exact,
        "floor_per_label": majority.per_label,
        "floor_by_difficulty": keyed(task.floor()),
        "chance": task.chance(),
        "accuracy": keyed(mean["exact"]),
        "interval": keyed({d: over_seeds(exact[d]) for d in depths}),
        "per_question": keyed(mean["per_question"]),
        "difficulty": task.difficulty,
        "by_difficulty": keyed(
            {
                d: {
                    level: sum(result.by_difficulty[d][level] for result in results) / len(results)
                    for level in results[0].questions
                }
                for d in depths
            }
        ),
        "questions": keyed(results[0].questions),
        "per_label": keyed(mean["per_label"]),
        "spread": keyed({d: [min(exact[d]), max(exact[d])] for d in depths}),
        "seconds_per_example": keyed({d: mean["seconds"][d] / results[0].count for d in depths}),
        "best_depth": best_depth(mean["exact"]),
        "baseline": baseline,
        "complete": True,
        "examples": results[0].count,
        "split": results[0].split,
        "eval_seed": results[0].eval_seed,
        "runs": [
            {
                **run,
                **{
                    name: keyed(values)
                    for name, values in asdict(result).items()
                    if isinstance(values, dict)
                },
                "interval": keyed({d: wilson(result.exact[d], result.count) for d in depths}),
            }
            for run, result in zip(runs, results, strict=True)
        ],
        "command": command,
        "provenance": provenance(device),
    }


def run_record(checkpoint: str | os.PathLike, run: RunConfig) -> dict[str, Any]:
    """What results.json says of a checkpoint: name, seed, depths it was trained at, its config."""
    folder = Path(checkpoint)
    return {
        "checkpoint": folder.name if folder.is_absolute() else folder.as_posix(),
        "seed": run.train.seed,
        "trained_depths": list(run.sleep_passes.depths()),
        "mean_depth": run.sleep_passes.mean,
        "config": run.to_dict(),
    }


def best_depth(accuracy: dict[int, float]) -> int:
    """The smallest depth with the highest accuracy."""
    return max(sorted(accuracy), key=lambda depth: accuracy[depth])


def read_baseline(path: str | os.PathLike, run: RunConfig) -> dict[str, Any]:
    """A model trained at one depth, to compare with models trained by `run` at several.

    `path` is the results.json of that model's own depth benchmark. The baseline is asked at the
    depth it was trained at. `examples_ratio` and `passes_ratio` say how much more it was trained:
    examples, and passes over a context window summed over examples.

    Raises OSError or ValueError if the file cannot be read, is no such result, or one of another
    task or model.
    """
    result = read_records(path)
    if result.get("benchmark") != "depth":
        raise ValueError(
            f"baseline={str(path)!r}; allowed: results.json of hybrid-sleep bench depth"
        )
    try:
        return _compared(result, path, run)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"it is no result to compare with ({type(error).__name__}: {error})"
        raise unreadable(path, what) from error


def _compared(
    result: dict[str, Any], path: str | os.PathLike, run: RunConfig
) -> dict[str, Any]:
    trained = {tuple(run["trained_depths"]) for run in result["runs"]}
    if len(trained) != 1 or len(min(trained)) != 1:
        raise ValueError(
            f"baseline={str(path)!r} was trained at depths {sorted(trained)}; allowed: a baseline "
            "trained at one depth"
        )
    ((only,),) = trained
    depth, theirs = str(only), result["runs"][0]
    # As it would come back from a file, where a tuple is a list.
    ours = json.loads(json.dumps(run_record("", run)))
    for key in ("task", "model"):
        if theirs["config"][key] != ours["config"][key]:
            raise ValueError(
                f"baseline={str(path)!r} has {key}={theirs['config'][key]}; allowed: "
                f"{ours['config'][key]}"
            )
    if depth not in result["accuracy"]:
        raise ValueError(
            f"baseline={str(path)!r} was not measured at depth {depth}, which it was trained at"
        )
    examples = _examples(theirs) / _examples(ours)
    return {
        "depth": only,
        "accuracy": {depth: result["accuracy"][depth]},
        "spread": {depth: result["spread"][depth]},
        "seeds": [run["seed"] for run in result["runs"]],
        "examples_ratio": examples,
        "passes_ratio": examples * theirs["mean_depth"] / ours["mean_depth"],
        "command": result["command"],
        "provenance": result["provenance"],
    }


def _examples(record: dict[str, Any]) -> int:
    """Examples that the run behind a `run_record` trained on."""
    return record["config"]["train"]["steps"] * record["config"]["train"]["batch_size"]


def baseline_words(result: dict[str, Any]) -> str:
    """The comparison with training at one depth, said as it is."""
    base = result["baseline"]
    depth = str(base["depth"])
    accuracy, (low, high) = base["accuracy"][depth], base["spread"][depth]
    best = result["accuracy"][str(result["best_depth"])]
    text = (
        f"Baseline: the same model trained at N = {depth} alone, on {base['examples_ratio']:.1f} "
        f"times the examples ({base['passes_ratio']:.1f} times the passes over a window), reaches "
        f"{accuracy:.3f} at depth {depth} ({low:.3f} to {high:.3f} over {len(base['seeds'])} "
        "seeds). "
    )
    if accuracy > best - EQUAL_WITHIN:
        return text + (
            "So on this setting depth does not beat more training at equal compute. What it buys "
            "is data, the same accuracy from fewer examples, and a dial: one checkpoint that can "
            "be asked cheaply or thoroughly."
        )
    if high > best - EQUAL_WITHIN:
        return text + (
            "Its seeds differ: for about the same compute the best one gets as far without "
            f"sleeping deeper, on average they fall {best - accuracy:.3f} of exact accuracy short."
        )
    return text + (
        f"So for about the same compute, sleeping deeper is worth {best - accuracy:.3f} of exact "
        "accuracy here."
    )


def markdown(result: dict[str, Any]) -> str:
    """The table of a depth result, with the floor, what was asked, and where it came from."""
    several = len(result["runs"]) > 1
    seeds = [f"seed {run['seed']}" for run in result["runs"]] if several else []
    spread = ["lowest to highest", "95 % interval"] if several else ["95 % interval"]
    intervals = result.get("interval", {})
    head = ["depth N", "exact", *spread, *seeds, "per label", "ms per example", "cost"]
    lines = [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
    first = result["seconds_per_example"][min(result["accuracy"], key=int)]
    for depth, accuracy in result["accuracy"].items():
        low, high = (result["spread"] if several else result["runs"][0]["interval"])[depth]
        seconds = result["seconds_per_example"][depth]
        exact = f"{accuracy:.3f}"
        cells = [
            depth,
            f"**{exact}**" if int(depth) == result["best_depth"] else exact,
            f"{low:.3f} to {high:.3f}",
            *(_between(intervals.get(depth)) for _ in spread[1:]),
            *(f"{run['exact'][depth]:.3f}" for run in result["runs"] if several),
            f"{result['per_label'][depth]:.3f}",
            f"{1000 * seconds:.2f}",
            f"{seconds / first:.2f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    params = ", ".join(f"{name}={value}" for name, value in result["task"]["params"].items())
    lines += _by_difficulty(result)
    chance = f"; chance {result['chance']:.4f}" if "chance" in result else ""
    lines += [
        "",
        f"Task: {result['task']['name']} ({params}); {result['examples']} test examples a depth, "
        f"evaluation seed {result['eval_seed']}. Floor (always the most frequent label): "
        f"exact {result['floor']:.4f}, per label {result['floor_per_label']:.4f}{chance}.",
    ]
    if not result["complete"]:
        lines += ["", f"Interrupted after {len(result['runs'])} checkpoint(s)."]
    if result["baseline"]:
        lines += ["", baseline_words(result), "", f"`{result['baseline']['command']}`"]
    lines += ["", describe(result["provenance"])]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _by_difficulty(result: dict[str, Any]) -> list[str]:
    """The share of questions right by depth and difficulty, where there is more than one."""
    levels = list(result.get("questions", {}))
    if len(levels) < 2:
        return []
    head = [f"questions right, {result['difficulty']}:", *levels]
    lines = ["", f"| {' | '.join(head)} |", "|:---|" + "---:|" * len(levels)]
    for depth, shares in result["by_difficulty"].items():
        cells = [f"depth {depth}", *(f"{shares[level]:.3f}" for level in levels)]
        lines.append(f"| {' | '.join(cells)} |")
    floors = [f"{result['floor_by_difficulty'][level]:.3f}" for level in levels]
    return [*lines, f"| without memory | {' | '.join(floors)} |"]


def figure(result: dict[str, Any]) -> Figure:
    """Accuracy against depth, the floor, the spread and the baseline."""
    from hybrid_sleep.eval.plots import depth_figure

    return depth_figure(result)
