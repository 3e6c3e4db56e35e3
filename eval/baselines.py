"""What a sleeping model is compared with: other ways to spend the same compute, or the same tokens.

A run of depth N costs more than the same run at N = 1. What else could that compute have bought?
More steps, more layers, wider ones, the layers looped over at wake, or no eviction at all. Each is
a variant of the run (see `eval.variants`), its steps chosen so that training takes as many FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.variants import cost_of, sleeping_windows
from hybrid_sleep.sleep.options import SCHEDULES

if TYPE_CHECKING:
    from hybrid_sleep import HybridSleepConfig
    from hybrid_sleep.training import RunConfig

REFERENCE = "sleep"
EQUAL_WITHIN = 0.1  # more steps or fewer than this share apart are runs of their own
OTHER = {
    "state_space": {"gated_deltanet": "mamba2", "mamba2": "gated_deltanet"},
    "eviction": {"hard": "sliding", "sliding": "hard"},
    "sleep_attention": {"causal": "bidirectional", "bidirectional": "causal"},
    "sleep_schedule": dict(zip(SCHEDULES, reversed(SCHEDULES), strict=True)),
}


@dataclass(frozen=True)
class Variant:
    """A run beside the reference: its name, in words, what it changes, and where it is asked.

    Compared at the depth `asked`, which is decided by the training and not by what turns out best.
    equal: "compute", "tokens" or "both", what its training has in common with the reference's.
    tied: the depth of each difficulty, where training ties them.
    """

    name: str
    label: str
    changes: dict[str, Any]
    depths: list[int]
    asked: int
    role: str
    equal: str
    tied: dict[int, int] = field(default_factory=dict)


def baselines_of(run: RunConfig, names: Sequence[str]) -> list[Variant]:
    """The baselines `names` (of `BASELINES`) of `run`, each at equal compute and at equal tokens.

    One run serves both where its steps differ by less than a tenth. Raises ValueError for a name
    that is none, and for a run that never sleeps deeper than once, to which all would be equal.
    """
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"baseline={name!r}; allowed: {', '.join(BASELINES)}, all or none")
    if names and run.sleep_passes.deepest == 1:
        raise ValueError(
            "sleep_passes=1 makes a run that is its own baseline; allowed: one that sleeps"
        )
    reference, config = cost_of(run), run.model_config()
    once = cost_of(_changed(run, {"sleep_passes": 1}))
    ratio = reference["training_flops"] / once["training_flops"]
    variants = []
    for name in names:
        label, change = BASELINES[name]
        changes = {"sleep_passes": 1, "model.sleep_passes": 1, **change(config, run, ratio)}
        cost = cost_of(_changed(run, changes))
        steps = round(
            run.train.steps * reference["training_flops"] / cost["training_flops"]
        )
        longer = {**changes, "train.steps": max(1, steps)}
        longer["train.warmup"] = min(run.train.warmup, longer["train.steps"])
        if abs(steps / run.train.steps - 1) < EQUAL_WITHIN:
            variants.append(Variant(name, label, longer, [1], 1, "baseline", "both"))
        else:
            variants.append(Variant(name, label, longer, [1], 1, "baseline", "compute"))
            same = f"{name}_tokens"
            variants.append(Variant(same, label, changes, [1], 1, "baseline", "tokens"))
    return variants


def asked_at(run: RunConfig, depths: Sequence[int]) -> int:
    """Where a run is compared: the deepest of `depths` that it trained at, else the shallowest."""
    return max((d for d in depths if d in run.sleep_passes.depths()), default=min(depths))


def _changed(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    from hybrid_sleep.training.config import run_config
    from hybrid_sleep.training.schema import set_key

    content = run.to_dict()
    for key, value in changes.items():
        set_key(content, key, value)
    return run_config(content)


def _same(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    return {}


def _repeated(config: HybridSleepConfig, ratio: float) -> dict[str, Any]:
    times = max(2, round(ratio))
    return {
        "model.num_hidden_layers": times * config.num_hidden_layers,
        "model.layer_types": times * list(config.layer_types),
        "model.intermediate_size": times * config.mlp_widths,
        "model.loop": None,
    }


def _deeper(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    changes = _repeated(config, ratio)
    if config.distinct_layers is not None:
        changes["model.distinct_layers"] = None
    return changes


def _looped(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    distinct = config.distinct_layers or config.num_hidden_layers
    return {**_repeated(config, ratio), "model.distinct_layers": distinct}


def _wider(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    """More heads of the same size: products, which are most of the FLOPs, grow as their square."""
    group = config.num_attention_heads // config.num_key_value_heads
    groups = max(1, round(config.num_key_value_heads * sqrt(ratio)))
    shared = config.linear_num_value_heads // config.linear_num_key_heads
    linear = max(1, round(config.linear_num_key_heads * sqrt(ratio)))
    return {
        "model.hidden_size": round(config.hidden_size * sqrt(ratio) / 2) * 2,
        "model.intermediate_size": [round(width * sqrt(ratio)) for width in config.mlp_widths],
        "model.num_attention_heads": groups * group,
        "model.num_key_value_heads": groups,
        "model.head_dim": config.head_dim,
        "model.linear_num_key_heads": linear,
        "model.linear_num_value_heads": linear * shared,
    }


def _full_cache(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    """A window that is never full before the end: nothing is evicted, nothing sleeps."""
    return {"model.window": run.load_task().length, "train.windows": None}


Change = Callable[["HybridSleepConfig", "RunConfig", float], dict[str, Any]]
BASELINES: dict[str, tuple[str, Change]] = {
    "once": ("N = 1", _same),
    "deeper": ("N = 1, deeper", _deeper),
    "wider": ("N = 1, wider", _wider),
    "looped": ("N = 1, layers looped at wake", _looped),
    "full_cache": ("N = 1, whole KV cache kept", _full_cache),
}


def ablations_of(run: RunConfig, names: Sequence[str], depths: list[int]) -> list[Variant]:
    """Variants of `run` that change one decision each, `names` of `ABLATIONS`, same steps.

    Raises ValueError for a name that is none, and for one that would change nothing of this run.
    """
    variants = []
    for name in names:
        if name not in ABLATIONS:
            raise ValueError(f"ablation={name!r}; allowed: {', '.join(ABLATIONS)}")
        found = ABLATIONS[name](run, run.model_config())
        for suffix, (label, changes) in found.items():
            full = f"{name}_{suffix}" if suffix else name
            tied = changes.get("sleep_passes")
            tied = tied.get("by_difficulty", {}) if isinstance(tied, dict) else {}
            asked = asked_at(run if not tied else _changed(run, changes), depths)
            variants.append(
                Variant(full, label, changes, depths, asked, "ablation", "tokens", dict(tied))
            )
    return variants


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
            f"ablation='schedule': labels of task {task.name!r} lie in its last window, which "
            "never sleeps, so both schedules are the same run; allowed: a task with labels in "
            "windows that sleep"
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
            f"ablation='loop': layer_types={config.layer_types} leave no other range; allowed: "
            "more layers"
        )
    return found


def _depth(run: RunConfig, config: HybridSleepConfig) -> Found:
    deepest, third = run.sleep_passes.deepest, max(1, run.train.steps // 3)
    if deepest == 1:
        raise ValueError("ablation='depth': sleep_passes=1; allowed: a run that sleeps")
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
            f"ablation='difficulty': task {task.name!r} has {task.difficulty}={levels}, N up to "
            f"{deepest}; allowed: two or more, and a run that sleeps"
        )
    depths = {
        level: 1 + round(rank * (deepest - 1) / (len(levels) - 1))
        for rank, level in enumerate(levels)
    }
    shown = ", ".join(f"{level}: {depth}" for level, depth in depths.items())
    label = f"N tied to {task.difficulty} ({shown})"
    return {"": (label, {"sleep_passes": {"by_difficulty": depths}})}


ABLATIONS: dict[str, Callable[[RunConfig, HybridSleepConfig], Found]] = {
    "state_space": _other("state_space", "{} layers"),
    "eviction": _other("eviction", "{} eviction"),
    "loop": _loop,
    "schedule": _schedule,
    "attention": _other("sleep_attention", "{} attention in passes 2 to N"),
    "depth": _depth,
    "difficulty": _difficulty,
}
