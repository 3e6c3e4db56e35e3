"""`hybrid-sleep demo`: train a small model here, evaluate it at several depths, let it write on.

Everything measured is in results.json; results.md and accuracy.png are made from it alone.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hybrid_sleep.eval import results
from hybrid_sleep.eval.measure.accuracy import SPLIT, measure_depth
from hybrid_sleep.eval.measure.depth import (
    Baseline,
    DepthResult,
    MeasuredRun,
    TaskRecord,
    baseline_of,
)
from hybrid_sleep.eval.render import demo as render
from hybrid_sleep.eval.studies.comparison import Comparison
from hybrid_sleep.eval.tasks import IGNORED, Task
from hybrid_sleep.support.progress import progress_bar
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.training.weights import load_model
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from hybrid_sleep.training import RunConfig

RECIPE = "circuit_cpu.yaml"
BASELINE = "depth_demo"
DEPTHS = range(1, 7)
EXAMPLES = 500
NEW_WINDOWS = 3
THREADS = 2  # more would wait for each other: matrices are small


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the model wrote behind `prompt`, in tokens, sleeping at every full window.

    depth: of its sleeps; window: tokens of one. question: the one that ends the prompt, in words,
    with what is right; answer: that as a token. reports, said: each sleep's record, as data and in
    words.
    """

    depth: int
    window: int
    question: str
    prompt: list[int]
    answer: int
    generated: list[int]
    reports: list[dict[str, Any]]
    said: list[str]


@dataclass(kw_only=True)
class DemoResult(DepthResult):
    """A depth result of the demo's one model, with how it was trained and what it wrote.

    repeated: accuracy on the hardest questions of the baseline's other form, each window written as
    often as the deepest sleep would read it; by seed, none where it is not installed.
    """

    benchmark: ClassVar[str] = "demo"
    config: dict[str, Any]
    repeated: list[float] = field(default_factory=list)
    generation: Generation | None
    seconds: float
    seconds_training: float


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
    task, compared = run.load_task(), comparison()
    base = None if compared is None else baseline(run, compared)
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
        model = load_model(model_dir)
        with progress_bar("measure") as progress:
            measured = measure_depth(model, task, DEPTHS, EXAMPLES, progress=progress)
        result = DemoResult(
            task=TaskRecord.of(task),
            examples=EXAMPLES,
            split=SPLIT,
            eval_seed=0,
            runs=[MeasuredRun.of(model_dir, run, measured)],
            baseline=base,
            config=run.to_dict(),
            repeated=[] if compared is None else on_hardest(compared, "repeated"),
            generation=None,
            seconds=time.perf_counter() - began,
            seconds_training=trained - began,
            command=command,
            provenance=provenance(),
        )
        paths = results.save(result, out)
        saved = f"the accuracies in {paths[0]}"
        console.print(render.table(result))
        result.generation = generate(model, task, result.best_depth)
        result.seconds = time.perf_counter() - began
        paths = results.save(result, out)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"kept {saved}") from None
    for line in (*render.words(result), *render.written(result.generation)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print("wrote " + ", ".join(str(path) for path in paths), markup=False, soft_wrap=True)
    return paths[0]


def recipe(seed: int, output_dir: Path) -> RunConfig:
    """The demo's training run, from the packaged configs, on both cores where there are two."""
    from hybrid_sleep.training import load_run_config

    changes = {"train.seed": seed, "output_dir": str(output_dir)}
    changes["train.threads"] = min(THREADS, os.cpu_count() or 1)
    with as_file(files("hybrid_sleep.configs") / "runs" / RECIPE) as path:
        return load_run_config(path, changes)


def comparison() -> Comparison | None:
    """The committed comparison of the recipe with N = 1; None if it is not installed."""
    file = files("hybrid_sleep.eval") / "results" / BASELINE / "results.json"
    if not file.is_file():
        return None
    with as_file(file) as path:
        found: Comparison = results.read(path, Comparison)
        return found


def baseline(run: RunConfig, compared: Comparison) -> Baseline:
    """The same model trained at N = 1 alone for the same FLOPs, of a comparison."""
    models = list(compared.trials("once").values())
    return baseline_of(models, 1, run, f"eval/results/{BASELINE}", compared)


def on_hardest(compared: Comparison, variant: str) -> list[float]:
    """What the trials of a variant get right of the hardest questions, where it is compared."""
    (one,) = (known for known in compared.variants if known.name == variant)
    return [*compared.shares(one, one.compared_at, max(compared.questions)).values]


def generate(model: Any, task: Task, passes: int) -> Generation:
    """Let `model` answer one test question and write on over several windows, sleeping by itself.

    The prompt is everything before the first label. Only labels were ever supervised, so only the
    first token means anything; what follows shows the sleeps.
    """
    import torch

    from hybrid_sleep import SleepCache

    # The first example that begins with one of the hardest questions.
    hardest = max(task.floor())
    example = next(
        example
        for example in task.examples(SPLIT, 0)
        if example["meta"]["difficulty"][0] == hardest
    )
    first = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
    prompt, answer = example["input_ids"][:first], example["labels"][first]
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
    questions = len(example["meta"]["difficulty"])
    return Generation(
        depth=passes,
        window=window,
        # Descriptions end with the questions, a line each.
        question=task.describe(example).splitlines()[-questions],
        prompt=prompt,
        answer=answer,
        generated=sequence[first:],
        reports=[sleep.to_dict() for sleep in cache.reports],
        said=[str(sleep) for sleep in cache.reports],
    )
