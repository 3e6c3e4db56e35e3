"""What a training run takes, counted from its config: steps, tokens, FLOPs, and its decoding."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.measure import flops
from hybrid_sleep.eval.tasks.base import IGNORED

if TYPE_CHECKING:
    from hybrid_sleep import HybridSleepConfig
    from hybrid_sleep.eval.tasks import Task
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
    from hybrid_sleep.training.depth import depths_of
    from hybrid_sleep.training.schedules import parse_windows

    config, task = run.model_config(), run.load_task()
    windows = None if run.train.windows is None else parse_windows(run.train.windows)
    steps, seed, own = run.train.steps, run.train.seed, config.window
    policy = run.sleep_passes
    drawn = Counter(
        (
            policy.draw(seed, step),
            policy.asked(seed, step),
            own if windows is None else windows.at(step),
        )
        for step in range(steps)
    )
    training = rows = tokens = 0
    for (depth, asked, window), times in drawn.items():
        config.window = window
        tasks = [task if levels is None else task.only(*levels) for levels in asked]
        # Groups of shorter examples go on to the end of the longest.
        columns = max(one.length for one in tasks)
        # Logits are those that labels need.
        logits = columns - min(first_label(one) for one in tasks) + 1
        for one, N in zip(tasks, depths_of(depth), strict=True):
            rows += times
            tokens += times * columns
            sleeps = sleeping_windows(one, config)
            each = flops.training_flops(config, columns, N, sleeps, logits=logits)
            training += times * each
        readers = depths_of(depth, task.together)
        if len(readers) > 1 and _share_first_window(run, config, tasks):
            training -= times * 3 * flops.shared_flops(config, readers) // task.together
    size = run.train.batch_size
    return {
        "steps": steps,
        "examples": rows * size,
        "tokens": tokens * size,
        "training_flops": training * size,
    }


def _share_first_window(run: RunConfig, config: HybridSleepConfig, tasks: list[Task]) -> bool:
    """Whether a step reads the first window of its groups once; see `shares_first_window`."""
    from hybrid_sleep.sleep.checkpointing import parse_granularity

    granularity: Any = run.train.activation_checkpointing
    examples = [next(task.examples("train", 0, 1)) for task in tasks]
    first = [example["input_ids"][: config.window] for example in examples]
    return (
        all(sleeping_windows(task, config) != 0 for task in tasks)
        and all(task.length > config.window for task in tasks)
        and first.count(first[0]) == len(first)
        and config.attention_dropout == 0
        and run.train.backprop_passes is None
        and run.train.backprop_windows is None
        and not parse_granularity(granularity, config.num_hidden_layers).window
    )


def sleeping_windows(task: Any, config: Any) -> int | None:
    """Windows of a training example that sleep, None for every full one (see `sleep_schedule`)."""
    if config.sleep_schedule == "every_window":
        return None
    return first_label(task) // config.window


def first_label(task: Any) -> int:
    """The column of an example's first label, which all examples of a task share."""
    (example,) = task.examples("train", 0, 1)
    return next(t for t, label in enumerate(example["labels"]) if label != IGNORED)


def one_stage(run: RunConfig) -> RunConfig:
    """`run` if it is trained in one go; ValueError otherwise, as its steps cannot be fitted."""
    if run.stages:
        raise ValueError(
            "stages must be empty where steps are fitted to equal compute, got "
            f"{len(run.stages)}; hybrid-sleep bench ablate --variant compares such runs"
        )
    return run
