"""Variants of a run that change one decision each: what is the decision worth?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.measure.run_cost import sleeping_windows
from hybrid_sleep.eval.studies.baselines import changed
from hybrid_sleep.eval.studies.variants import Variant, compared_at, tied_depths
from hybrid_sleep.sleep.options import SCHEDULES

if TYPE_CHECKING:
    from hybrid_sleep import HybridSleepConfig
    from hybrid_sleep.training import RunConfig

OTHER = {
    "state_space": {"gated_deltanet": "mamba2", "mamba2": "gated_deltanet"},
    "eviction": {"hard": "sliding", "sliding": "hard"},
    "sleep_attention": {"causal": "bidirectional", "bidirectional": "causal"},
    "sleep_schedule": dict(zip(SCHEDULES, reversed(SCHEDULES), strict=True)),
}
SLOWLY = (1e-4, 1e-3)  # time steps of layers that keep a window through a sleep


def ablations_of(run: RunConfig, names: Sequence[str], depths: list[int]) -> list[Variant]:
    """Variants of `run` that change one decision each, `names` of `ABLATIONS`, same steps.

    Raises ValueError for an unknown name, and for one that would change nothing of this run.
    """
    variants = []
    for name in names:
        if name not in ABLATIONS:
            raise ValueError(f"ablation must be one of {', '.join(ABLATIONS)}, got {name!r}")
        for suffix, (label, changes) in ABLATIONS[name](run, run.model_config()).items():
            tied = tied_depths(changed(run, changes)) if "sleep_passes" in changes else {}
            at = compared_at(changed(run, changes) if tied else run, depths)
            variants.append(
                Variant(
                    name=f"{name}_{suffix}" if suffix else name, label=label, changes=changes,
                    depths=depths, compared_at=at, role="ablation", equal="tokens", tied=tied,
                )  # fmt: skip
            )
    return variants


def applicable(
    run: RunConfig, names: Sequence[str], depths: list[int]
) -> tuple[list[str], dict[str, str]]:
    """Those of `names` that change something of `run`, and why the others do not."""
    kept, left_out = [], {}
    for name in names:
        try:
            ablations_of(run, [name], depths)
            kept.append(name)
        except ValueError as error:
            left_out[name] = str(error)
    return kept, left_out


Found = dict[str, tuple[str, dict[str, Any]]]


def _other(key: str, words: str) -> Callable[[RunConfig, HybridSleepConfig], Found]:
    def change(run: RunConfig, config: HybridSleepConfig) -> Found:
        value = OTHER[key][getattr(config, key)]
        return {value: (words.format(value.replace("_", " ")), {f"model.{key}": value})}

    return change


def _schedule(run: RunConfig, config: HybridSleepConfig) -> Found:
    task = run.load_task()
    labelled = sleeping_windows(task, config)
    if labelled is not None and labelled >= (task.length - 1) // config.window:
        raise ValueError(
            "ablation 'schedule' must have a task with labels in windows that sleep, got "
            f"{task.name!r}, whose labels lie in its last window: both schedules are the same run"
        )
    return _other("sleep_schedule", "{} sleep")(run, config)


def _loop(run: RunConfig, config: HybridSleepConfig) -> Found:
    layers = config.num_hidden_layers
    half, quarter = layers // 2, layers // 4
    ranges = [(half, layers), (0, half), (quarter, layers - quarter)]
    found = {
        f"{start}_{end}": (f"loop over layers {start} to {end - 1}", {"model.loop": [start, end]})
        for start, end in ranges
        if start < end
        and (start, end) != config.loop_range
        and "linear_attention" in config.layer_types[start:end]
    }
    if not found:
        raise ValueError(
            "ablation 'loop' must have layers that leave another range, got "
            f"layer_types={config.layer_types}"
        )
    return found


def _depth(run: RunConfig, config: HybridSleepConfig) -> Found:
    deepest, third = run.sleep_passes.deepest, max(1, run.train.steps // 3)
    if deepest == 1:
        raise ValueError("ablation 'depth' must have a run that sleeps, got sleep_passes=1")
    choices: dict[str, tuple[str, Any]] = {
        "fixed": (f"always N = {deepest}", deepest),
        "drawn": (f"N drawn from 1 to {deepest}", {"uniform": [1, deepest]}),
        "growing": (
            f"N = 1, then 1 to {deepest}, then {deepest}",
            {"stages": {0: 1, third: {"uniform": [1, deepest]}, 2 * third: deepest}},
        ),
    }
    own = run.sleep_passes.to_config()
    return {
        name: (label, {"sleep_passes": policy})
        for name, (label, policy) in choices.items()
        if policy != own and not (name == "growing" and run.train.steps < 3)
    }


def _difficulty(run: RunConfig, config: HybridSleepConfig) -> Found:
    task = run.load_task()
    levels = list(task.floor())
    deepest = run.sleep_passes.deepest
    if len(levels) < 2 or deepest == 1:
        raise ValueError(
            "ablation 'difficulty' must have two or more difficulties and a run that sleeps, got "
            f"{task.name!r} with {task.difficulty}={levels}, N up to {deepest}"
        )
    depths = {
        level: 1 + round(rank * (deepest - 1) / (len(levels) - 1))
        for rank, level in enumerate(levels)
    }
    shown = ", ".join(f"{level}: {depth}" for level, depth in depths.items())
    label = f"N tied to {task.difficulty} ({shown})"
    return {"": (label, {"sleep_passes": {"by_difficulty": depths}})}


def _forgetting(run: RunConfig, config: HybridSleepConfig) -> Found:
    """Time steps of new layers as by default, and smaller ones where the run has those."""
    default = (type(config).time_step_min, type(config).time_step_max)
    own = (config.time_step_min, config.time_step_max)
    name, (low, high) = ("slow", SLOWLY) if own == default else ("default", default)
    label = f"time steps of {low:g} to {high:g} at first"
    return {name: (label, {"model.time_step_min": low, "model.time_step_max": high})}


ABLATIONS: dict[str, Callable[[RunConfig, HybridSleepConfig], Found]] = {
    "state_space": _other("state_space", "{} layers"),
    "eviction": _other("eviction", "{} eviction"),
    "loop": _loop,
    "schedule": _schedule,
    "attention": _other("sleep_attention", "{} attention in passes 2 to N"),
    "depth": _depth,
    "difficulty": _difficulty,
    "forgetting": _forgetting,
}
