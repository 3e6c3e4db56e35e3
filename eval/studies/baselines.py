"""What a sleeping model is compared with: other ways to spend the same compute, or the same tokens.

A run of depth N costs more than the same run at N = 1. What else could that compute have bought?
More steps, more looks at each window, more layers, wider ones, the layers looped over in decoding,
or no eviction at all. And what of a sleep is it that helps: that hidden states go from pass to
pass, or fast weights, or that all passes share their weights? Each is a variant of the run, its
steps chosen so that training takes as many FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.measure.run_cost import cost_of
from hybrid_sleep.eval.studies.variants import Equal, Variant, compared_at, tied_depths

if TYPE_CHECKING:
    from hybrid_sleep import HybridSleepConfig
    from hybrid_sleep.training import RunConfig

SAME_STEPS = 0.1  # runs whose steps differ by a smaller share are one, at equal compute and tokens


def baselines_of(
    run: RunConfig, names: Sequence[str], depths: Sequence[int] | None = None
) -> list[Variant]:
    """The baselines `names` (of `BASELINES`) of `run`, each at equal compute and at equal tokens.

    One run serves both where its steps differ by less than a tenth. Those that sleep as deep as the
    run itself are measured at `depths` (None: 1 to its deepest), the others at 1. Raises ValueError
    for an unknown name, for a run that never sleeps deeper than once, to which all would be equal,
    and for a run that is a baseline already.
    """
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {name!r}")
    if names and run.sleep_passes.deepest == 1:
        raise ValueError(
            "sleep_passes must be above 1 in a run that is compared with baselines, got 1"
        )
    reference, config = cost_of(run), run.model_config()
    once = cost_of(changed(run, {"sleep_passes": 1}))
    ratio = reference["training_flops"] / once["training_flops"]
    levels = list(depths or range(1, run.sleep_passes.deepest + 1))
    variants = []
    for name in names:
        if name in ASLEEP:
            variants.append(_sleeping(run, name, levels))
            continue
        label, makes = BASELINES[name]
        changes = {"sleep_passes": 1, "model.sleep_passes": 1, **makes(config, run, ratio)}
        cost = cost_of(changed(run, changes))
        steps = round(
            run.train.steps * reference["training_flops"] / cost["training_flops"]
        )
        longer = {**changes, "train.steps": max(1, steps)}
        longer["train.warmup"] = min(run.train.warmup, longer["train.steps"])
        plans: list[tuple[str, dict[str, Any], Equal]]
        if abs(steps / run.train.steps - 1) < SAME_STEPS:
            plans = [(name, longer, "both")]
        else:
            plans = [(name, longer, "compute"), (f"{name}_tokens", changes, "tokens")]
        for full, change, equal in plans:
            variants.append(
                Variant(
                    name=full, label=label, changes=change, depths=[1], compared_at=1,
                    role="baseline", equal=equal,
                )  # fmt: skip
            )
    return variants


def _sleeping(run: RunConfig, name: str, depths: list[int]) -> Variant:
    """The run, as deep, whose passes hand on less or share no weights: as many FLOPs and tokens."""
    config = run.model_config()
    for key, tied in (("sleep_carry", "both"), ("distinct_passes", 1)):
        if getattr(config, key) != tied:
            raise ValueError(
                f"model.{key} must be {tied!r} in a run that is compared with {name!r}, got "
                f"{getattr(config, key)!r}"
            )
    label, makes = BASELINES[name]
    return Variant(
        name=name, label=label, changes=makes(config, run, 1.0), depths=depths,
        compared_at=compared_at(run, depths), role="baseline", equal="both", tied=tied_depths(run),
    )  # fmt: skip


def changed(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """`run` with other values, by dotted key."""
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


def _more_layers(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
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


def _repeated_window(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    """Each window as often as the deepest sleep would read it, in one pass."""
    assert run.task is not None
    own = run.load_task().window
    if run.task.repeats > 1 or config.window != own or run.train.windows is not None:
        raise ValueError(
            f"baseline 'repeated' must have a run whose windows are the task's, of {own} tokens, "
            f"written once, got model.window={config.window}, task.repeats={run.task.repeats}, "
            f"train.windows={run.train.windows}"
        )
    times = run.sleep_passes.deepest
    return {"task.repeats": times, "model.window": times * own}


def _written_once(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    return {"model.sleep_carry": "hidden_states"}


def _read_anew(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    return {"model.sleep_carry": "fast_weights"}


def _untied(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    return {"model.distinct_passes": run.sleep_passes.deepest}


def _full_cache(config: HybridSleepConfig, run: RunConfig, ratio: float) -> dict[str, Any]:
    """A window that is never full before the end: nothing is evicted, nothing sleeps."""
    return {"model.window": run.load_task().length, "train.windows": None}


Change = Callable[["HybridSleepConfig", "RunConfig", float], dict[str, Any]]
BASELINES: dict[str, tuple[str, Change]] = {
    "once": ("N = 1", _same),
    "repeated": ("N = 1, each window written N times", _repeated_window),
    "h_carried": ("h carried, S reset before each pass", _written_once),
    "S_carried": ("S carried, h reset before each pass", _read_anew),
    "untied": ("each pass with weights of its own", _untied),
    "deeper": ("N = 1, more layers", _more_layers),
    "wider": ("N = 1, wider", _wider),
    "looped": ("N = 1, layers looped in decoding", _looped),
    "full_cache": ("N = 1, whole KV cache kept", _full_cache),
}
# Those that sleep as deep as the run.
ASLEEP = ("h_carried", "S_carried", "untied")
