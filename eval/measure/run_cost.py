"""What a training run takes, counted from its config: steps, tokens, FLOPs, and its decoding."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.measure import flops
from hybrid_sleep.eval.tasks.base import IGNORED

if TYPE_CHECKING:
    from hybrid_sleep.training import RunConfig


def cost_of(run: RunConfig) -> dict[str, int]:
    """Steps, examples, tokens and FLOPs of training (see `flops`), all its stages together.

    Frozen weights are counted like others. `parameters` of its model; `wake_flops` of one decode
    step behind a window that is half full, and `memory_bytes` held with a full one, both after
    sleeping. The depths are those that its seed draws.
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


def sleeping_windows(task: Any, config: Any) -> int | None:
    """Windows of a training example that sleep, None for every full one (see `sleep_schedule`)."""
    if config.sleep_schedule == "every_window":
        return None
    (example,) = task.examples("train", 0, 1)
    first = next(t for t, label in enumerate(example["labels"]) if label != IGNORED)
    return first // config.window


def one_stage(run: RunConfig) -> RunConfig:
    """`run` if it is trained in one go; ValueError otherwise, as its steps cannot be fitted."""
    if run.stages:
        raise ValueError(
            "stages must be empty where steps are fitted to equal compute, got "
            f"{len(run.stages)}; hybrid-sleep bench ablate --variant compares such runs"
        )
    return run
