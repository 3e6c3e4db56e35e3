"""Runs to compare: every variant with every seed, trained, measured, its compute counted.

Variants of one seed share more than luck: the data, often the first weights and the checkpoint that
they start from. So seeds are compared in pairs.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval import flops
from hybrid_sleep.eval.depth import measure_depth
from hybrid_sleep.eval.tasks.base import IGNORED
from hybrid_sleep.support.io import keyed
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.training.weights import load_model

if TYPE_CHECKING:
    from hybrid_sleep.training import RunConfig

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
OPENING, CLOSING = "[{(", "]})"
SEED = "{seed}"


def parse_variant(text: str) -> tuple[str, list[str]]:
    """Name and overrides of `NAME:key=value,key=value`; a name alone changes nothing.

    A comma inside brackets or quotes belongs to the value. ValueError for anything else.
    """
    name, _, rest = text.partition(":")
    if not NAME.fullmatch(name):
        raise ValueError(
            f"variant {text!r}; allowed: NAME:key=value,key=value, the name of letters, digits "
            "and any of _.-"
        )
    parts, depth, quote = [""], 0, ""
    for sign in rest:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        depth += 0 if quote else (sign in OPENING) - (sign in CLOSING)
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    changes = [part.strip() for part in parts] if rest.strip() else []
    if depth or quote or not all("=" in change for change in changes):
        raise ValueError(f"variant {text!r}; allowed: NAME:key=value,key=value, brackets closed")
    return name, changes


def parse_seeds(text: str) -> list[int]:
    """Seeds from text such as `0,1,2`; ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"seeds={text!r}; allowed: such as 0,1,2, each once")
    return [int(part) for part in parts]


def runs_of(
    config: str | os.PathLike,
    overrides: Sequence[str],
    variants: Sequence[tuple[str, Sequence[str] | Mapping[str, Any]]],
    seeds: Sequence[int],
    *,
    one_task: bool = True,
) -> dict[tuple[str, int], RunConfig]:
    """The run of every variant and seed, each with a folder of its own in the config's output_dir.

    What a variant changes are texts, in which `{seed}` stands for the seed, or values by key.
    Raises ValueError if a name comes twice and, naming the variant, for an impossible run or (with
    `one_task`) one that does not learn the task of the others.
    """
    from hybrid_sleep.training import load_run_config
    from hybrid_sleep.training.parsing import parse_overrides

    names = [name for name, _ in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"variants={names}; allowed: one or more, with different names")
    runs: dict[tuple[str, int], RunConfig] = {}
    for seed in seeds:
        for name, changes in variants:
            texts = changes if not isinstance(changes, Mapping) else []
            texts = [text.replace(SEED, str(seed)) for text in (*overrides, *texts)]
            try:
                given = dict(parse_overrides(texts))
                given |= changes if isinstance(changes, Mapping) else {}
                out = Path(load_run_config(config, given).output_dir) / name / f"seed{seed}"
                given |= {"train.seed": seed, "output_dir": str(out)}
                run = load_run_config(config, given)
                others = next(iter(runs.values()), run).task
                if run.task is None or (one_task and run.task != others):
                    raise ValueError(f"task={run.task}; allowed: one task for all variants")
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"variant {name!r}: {error}") from error
            runs[name, seed] = run
    return runs


def train_and_measure(
    result: dict[str, Any],
    runs: Mapping[tuple[str, int], RunConfig],
    depths: Mapping[str, Sequence[int]],
    count: int,
    *,
    jobs: int = 1,
    out: Path | None = None,
    minutes: float | None = None,
    extra: Callable[[Any, Any, str], Row] | None = None,
    finish: Callable[[dict[str, Any]], None],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fill `result["rows"]` (see `collect`): each run trained, and asked at its variant's `depths`.

    An earlier training in a run's folder is replaced. Rows that `out` has from the same code,
    machine, config and first weights are kept. jobs: trainings side by side, each in a process.
    extra(model, task, variant): what else to put into a row.
    """
    wanted = [
        {
            "variant": name,
            "seed": seed,
            "depths": list(depths[name]),
            "examples": count,
            "config": run.to_dict(),
            "first_weights": None if run.init is None else _digest(run.init.checkpoint),
        }
        for (name, seed), run in runs.items()
    ]
    return collect(
        result,
        wanted,
        partial(_measure, dict(runs), extra),
        jobs=jobs,
        minutes=minutes,
        finish=finish,
        out=out,
        progress=progress,
    )


def _measure(
    runs: dict[tuple[str, int], RunConfig],
    extra: Callable[[Any, Any, str], Row] | None,
    names: Row,
) -> Row:
    from hybrid_sleep.training import train
    from hybrid_sleep.training.run import threads

    run = runs[names["variant"], names["seed"]]
    device, task = device_of(run), run.load_task()
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    trained = train(run, overwrite=True, progress=False)
    seconds = clock() - began
    depths = names["depths"]
    with threads(run.train.threads):
        model = load_model(trained.model_dir, device)
        measured = measure_depth(model, task, depths, names["examples"])
        more = {} if extra is None else extra(model, task, names["variant"])
    shares = ("exact", "per_question", "per_label", "by_difficulty")
    return {
        "steps": trained.steps,
        "seconds": seconds,
        **{name: keyed(getattr(measured, name)) for name in shares},
        "questions": keyed(measured.questions),
        "seconds_per_example": keyed({d: s / measured.count for d, s in measured.seconds.items()}),
        "cost": cost_of(run),
        **more,
    }


def cost_of(run: RunConfig) -> dict[str, int]:
    """What a training run takes, counted: steps, examples, tokens, FLOPs (see `eval.flops`).

    All its stages together, frozen weights counted like others. `parameters` of its model;
    `wake_flops` of one token behind a window that is half full, and `memory_bytes` held in a full
    one, both after sleeping. The depths are those that its seed draws.
    """
    parts = [_training_cost(stage) for stage in run.stage_runs()]
    config, task = run.model_config(), run.load_task()
    held = min(config.window, task.length)
    return {
        **{name: sum(part[name] for part in parts) for name in parts[0]},
        "parameters": flops.parameters(config),
        "wake_flops": flops.token_flops(config, held // 2),
        "memory_bytes": flops.cache_bytes(config, held, slept=held < task.length),
    }


def _training_cost(run: RunConfig) -> dict[str, int]:
    from hybrid_sleep.training.schedules import parse_windows

    config, task = run.model_config(), run.load_task()
    windows = None if run.train.windows is None else parse_windows(run.train.windows)
    steps, seed, own = run.train.steps, run.train.seed, config.window
    drawn = Counter(
        (run.sleep_passes.draw(seed, step), own if windows is None else windows.at(step))
        for step in range(steps)
    )
    training = 0
    for (depth, window), times in drawn.items():
        config.window = window
        sleeps = sleeping_windows(task, config)
        training += times * flops.training_flops(config, task.length, depth, sleeps)
    return {
        "steps": steps,
        "examples": steps * run.train.batch_size,
        "tokens": steps * run.train.batch_size * task.length,
        "training_flops": training * run.train.batch_size,
    }


def one_stage(run: RunConfig) -> RunConfig:
    """`run` if it is trained in one go; ValueError otherwise, as its steps cannot be fitted."""
    if run.stages:
        raise ValueError(
            f"a run of {len(run.stages)} stages, each with steps of its own, which cannot be "
            "fitted to equal compute; allowed: a run without stages, or hybrid-sleep bench ablate"
        )
    return run


def sleeping_windows(task: Any, config: Any) -> int | None:
    """Windows of a training example that sleep, None for every full one (see `sleep_schedule`)."""
    if config.sleep_schedule == "every_window":
        return None
    (example,) = task.examples("train", 0, 1)
    first = next(t for t, label in enumerate(example["labels"]) if label != IGNORED)
    return first // config.window


def device_of(run: RunConfig) -> str:
    """Where `run` trains: `cuda` or `cpu`."""
    import torch

    return "cuda" if run.train.device == "auto" and torch.cuda.is_available() else "cpu"


def _digest(checkpoint: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
