"""`hybrid-sleep demo`: train a small model here, ask it at several depths, let it write on.

Everything measured is in results.json; results.md and accuracy.png are made from it alone.
"""

from __future__ import annotations

import os
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval import depth as depths_of
from hybrid_sleep.eval import depth_report, results
from hybrid_sleep.eval.tasks import IGNORED, Task
from hybrid_sleep.support.progress import progress_bar
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hybrid_sleep.training import RunConfig

RECIPE = "rule110_cpu.yaml"
DEPTHS = range(1, 7)
EXAMPLES = 2000
NEW_WINDOWS = 3
NO_BASELINE = (
    "The baseline (the same model trained at N = 1 alone) is not part of this installation; it is "
    "in the repository, eval/results/baseline_n1."
)


def run_demo(*, seed: int = 0, out: str | os.PathLike, command: str | None = None) -> Path:
    """Train, measure, generate; write results.json, results.md, accuracy.png into `out`.

    Returns the path of results.json. Interrupted, it raises KeyboardInterrupt saying what is
    already on disk. Raises ValueError for a seed that is not an integer of at least 0.
    """
    began = time.perf_counter()
    from hybrid_sleep.training.run import threads

    check_count("seed", seed, 0)
    run = recipe(seed, Path(out) / "training")
    with threads(run.train.threads):
        return _train_and_measure(run, Path(out), began, command)


def _train_and_measure(run: RunConfig, out: Path, began: float, command: str | None) -> Path:
    from rich.console import Console

    from hybrid_sleep.training import train
    from hybrid_sleep.training.folder import RUN_FILE, working

    console = Console()
    task, base = run.load_task(), baseline(run)
    try:
        model_dir = train(run, overwrite=True).model_dir
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"hybrid-sleep train {working(Path(run.output_dir)) / RUN_FILE} --resume goes on from "
            "the last checkpoint"
        ) from None
    trained = time.perf_counter()
    saved = f"the trained model in {model_dir} (hybrid-sleep bench depth {model_dir})"
    try:
        model = depths_of.load_model(model_dir)
        with progress_bar("measure") as progress:
            measured = depths_of.measure_depth(model, task, DEPTHS, EXAMPLES, progress=progress)
        result = depth_report.summarise(
            task,
            [measured],
            [depth_report.run_record(model_dir, run)],
            baseline=base,
            command=command,
        )
        result |= {
            "benchmark": "demo",
            "config": run.to_dict(),
            "generation": None,
            "seconds": time.perf_counter() - began,
            "seconds_training": trained - began,
        }
        paths = results.save(result, out)
        saved = f"the accuracies in {paths[0]}"
        console.print(table(result))
        result["generation"] = generate(model, task, result["best_depth"])
        result["seconds"] = time.perf_counter() - began
        paths = results.save(result, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"kept {saved}") from None
    for line in (*words(result), *written(result["generation"])):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print("wrote " + ", ".join(str(path) for path in paths), markup=False, soft_wrap=True)
    return paths[0]


def recipe(seed: int, output_dir: Path) -> RunConfig:
    """The demo's training run, from the packaged configs."""
    from hybrid_sleep.training import load_run_config

    with as_file(files("hybrid_sleep.configs") / "runs" / RECIPE) as path:
        return load_run_config(path, {"train.seed": seed, "output_dir": str(output_dir)})


def baseline(run: RunConfig) -> dict[str, Any] | None:
    """The committed result of the same model trained at N = 1 alone, None if not installed."""
    file = files("hybrid_sleep.eval") / "results" / "baseline_n1" / "results.json"
    if not file.is_file():
        return None
    with as_file(file) as path:
        return depth_report.read_baseline(path, run)


def generate(model: Any, task: Task, passes: int) -> dict[str, Any]:
    """Let `model` answer one test example and write on over several windows, sleeping by itself.

    The prompt is everything before the first label. Only the labels were ever supervised, so only
    the first tokens mean anything; what follows shows the sleeps.
    """
    import torch

    from hybrid_sleep import SleepCache

    # An example whose labels differ: one that a constant guess gets wrong.
    example = next(
        ex for ex in task.examples(depths_of.SPLIT, 0) if len(set(ex["labels"]) - {IGNORED}) > 1
    )
    first = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
    prompt, answers = example["input_ids"][:first], example["labels"][first:]
    window = model.config.window
    cache = SleepCache(model.config)
    sequence = model.generate(
        torch.tensor([prompt]),
        cache=cache,
        max_new_tokens=NEW_WINDOWS * window,
        min_new_tokens=NEW_WINDOWS * window,
        do_sample=False,
        sleep_passes=passes,
    )[0].tolist()
    return {
        "depth": passes,
        "window": window,
        "prompt": prompt,
        "answers": answers,
        "generated": sequence[first:],
        "reports": [sleep.to_dict() for sleep in cache.reports],
        "said": [str(sleep) for sleep in cache.reports],
    }


def table(result: dict[str, Any]) -> Any:
    """Accuracy by depth as a rich table, floor and baseline below it."""
    from rich.table import Table

    shown = Table(title=f"Rule 110, seed {result['runs'][0]['seed']}: accuracy by sleep depth")
    for column in ("depth N", "exact", "95 % interval", "per label", "ms per example"):
        shown.add_column(column, justify="right")
    for depth, accuracy in result["accuracy"].items():
        low, high = result["runs"][0]["interval"][depth]
        shown.add_row(
            depth,
            f"{accuracy:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{result['per_label'][depth]:.3f}",
            f"{1000 * result['seconds_per_example'][depth]:.2f}",
            style="bold" if int(depth) == result["best_depth"] else None,
        )
    shown.add_row("floor", f"{result['floor']:.3f}", "", f"{result['floor_per_label']:.3f}", "")
    return shown


def words(result: dict[str, Any]) -> list[str]:
    """What the numbers mean, paragraph by paragraph; for the terminal and for results.md."""
    trained = ", ".join(str(depth) for depth in result["runs"][0]["trained_depths"])
    best = str(result["best_depth"])
    return [
        f"One checkpoint, trained with its sleep depth drawn from {trained}: exact accuracy "
        f"{result['accuracy']['1']:.3f} at depth 1, at best {result['accuracy'][best]:.3f} "
        f"(depth {best}). Always guessing the most frequent label scores {result['floor']:.3f}.",
        depth_report.baseline_words(result) if result["baseline"] else NO_BASELINE,
        f"{result['seconds']:.0f} s in all, {result['seconds_training']:.0f} s of them training.",
    ]


def written(generation: dict[str, Any]) -> list[str]:
    """What the model wrote across windows, and what each sleep reported, line by line."""
    window, answers = generation["window"], generation["answers"]
    tokens = generation["prompt"] + generation["generated"]
    windows = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    answered = generation["generated"][: len(answers)]
    verdict = "right" if answered == answers else f"wrong, {answers} would be right"
    return [
        f"The same model writing on at depth {generation['depth']}, windows of {window} tokens:",
        "  " + " ".join("".join(str(token) for token in part) for part in windows),
        f"  After the separator (2) comes its answer, {answered}: {verdict}. What follows was "
        "never trained; it is there to show the sleeps.",
        *(f"  sleep {number}: {said}" for number, said in enumerate(generation["said"], 1)),
    ]


def markdown(result: dict[str, Any]) -> str:
    """The demo's page."""
    lines = [
        f"# Accuracy against sleep depth, seed {result['runs'][0]['seed']}",
        "",
        "![Exact accuracy against sleep depth](accuracy.png)",
        "",
    ]
    for paragraph in words(result):
        lines += [paragraph, ""]
    # The baseline is in words() already.
    lines += [depth_report.markdown({**result, "baseline": None})]
    if result["baseline"]:
        lines += [f"Baseline: `{result['baseline']['command']}`", ""]
    if result["generation"]:
        lines += ["```", *written(result["generation"]), "```", ""]
    return "\n".join(lines)


def figure(result: dict[str, Any]) -> Figure:
    """As for `bench depth`, with the baseline."""
    return depth_report.figure(result)
