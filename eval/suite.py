"""Is sleeping deeper worth it? A run and its baselines, trained with several seeds and measured.

`bench depth CONFIG`: the run of a config, beside what the same compute and the same tokens buy at
N = 1 (`eval.baselines`), by difficulty, with what no memory at all would score.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from hybrid_sleep.eval.adaptive import TOLERANCES, measure_adaptive
from hybrid_sleep.eval.baselines import (
    ABLATIONS,
    BASELINES,
    REFERENCE,
    Variant,
    ablations_of,
    asked_at,
    baselines_of,
)
from hybrid_sleep.eval.depth import parse_depths
from hybrid_sleep.eval.statistics import over_seeds
from hybrid_sleep.eval.variants import (
    device_of,
    one_stage,
    parse_seeds,
    runs_of,
    train_and_measure,
)
from hybrid_sleep.support.io import keyed
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.resume import Row
from hybrid_sleep.validation import check_count

ADAPTIVE = "adaptive"
FEWEST_SEEDS = 3


def parse_names(what: str, text: str, allowed: Sequence[str]) -> list[str]:
    """Names from text such as `a,b`, `all` or `none`; ValueError listing what is allowed."""
    if text in ("all", "none"):
        return list(allowed) if text == "all" else []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed or names.count(name) > 1:
            raise ValueError(
                f"{what}={text!r}; allowed: all, none, or some of {', '.join(allowed)}, each once"
            )
    return names


def variants_of(
    run: Any, depths: list[int], baselines: Sequence[str], ablations: Sequence[str]
) -> list[Variant]:
    """The reference, its baselines and its ablations, in this order."""
    policy = run.sleep_passes
    drawn = ", ".join(map(str, policy.depths()))
    label = f"sleep, N = {drawn}" + (" in training" if len(policy.depths()) > 1 else "")
    tied = policy.to_config()
    tied = tied.get("by_difficulty", {}) if isinstance(tied, dict) else {}
    changed = [name for name in ablations if name != ADAPTIVE]
    return [
        Variant(REFERENCE, label, {}, depths, asked_at(run, depths), "reference", "both", tied),
        *baselines_of(run, baselines),
        *ablations_of(run, changed, depths),
    ]


def _applicable(run: Any, names: list[str], depths: list[int]) -> tuple[list[str], dict[str, str]]:
    """Those of `names` that change something of `run`, and why the others do not."""
    kept, left_out = [], {}
    for name in names:
        try:
            ablations_of(run, [name] if name != ADAPTIVE else [], depths)
            kept.append(name)
        except ValueError as error:
            left_out[name] = str(error)
    return kept, left_out


def run(
    config: str | os.PathLike,
    *,
    overrides: Sequence[str] = (),
    seeds: str = "0,1,2",
    depths: str | None = None,
    count: int = 2000,
    baselines: str = "all",
    ablations: str = "none",
    jobs: int = 1,
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train and measure the run of `config`, its baselines and its ablations with every seed.

    depths: where the reference and its ablations are asked (default: 1 to the deepest in training);
    baselines are asked at 1. baselines, ablations: names (`parse_names`); of "all" ablations those
    that would change nothing of this run are left out, and `left_out` says why. jobs: trainings
    side by side. Interrupted after the first row, it returns what it has, with `complete` False;
    rows that `out` has from the same code, machine and config are kept. Raises ValueError or
    FileNotFoundError before anything is trained, also for fewer than 3 seeds.
    """
    from hybrid_sleep.training import load_run_config

    numbers = parse_seeds(seeds)
    if len(numbers) < FEWEST_SEEDS:
        raise ValueError(f"seeds={seeds!r}; allowed: at least {FEWEST_SEEDS}, such as 0,1,2")
    check_count("count", count)
    asked = parse_names("ablations", ablations, (*ABLATIONS, ADAPTIVE))
    compared = parse_names("baselines", baselines, tuple(BASELINES))
    first = one_stage(load_run_config(config, [*overrides, f"train.seed={numbers[0]}"]))
    levels = list(range(1, first.sleep_passes.deepest + 1))
    levels = levels if depths is None else parse_depths(depths)
    left_out: dict[str, str] = {}
    if ablations == "all":
        asked, left_out = _applicable(first, asked, levels)
    variants = variants_of(first, levels, compared, asked)
    runs = runs_of(config, overrides, [(v.name, v.changes) for v in variants], numbers)
    task, device = first.load_task(), device_of(first)
    result = {
        "benchmark": "suite",
        "config": Path(config).name,
        "overrides": list(overrides),
        "task": {"name": task.name, "params": task.params, "difficulty": task.difficulty},
        "floor": {"by_difficulty": keyed(task.floor()), "chance": task.chance()},
        "depths": levels,
        "examples": count,
        "seeds": numbers,
        "split": "test",
        "clock": "processor" if device == "cpu" else "wall",
        "plan": {v.name: {**vars(v), "tied": keyed(v.tied)} for v in variants},
        "left_out": left_out,
        "rows": [],
        "command": command,
        "provenance": provenance(device),
    }
    extra = None
    if ADAPTIVE in asked:
        extra = partial(_adaptive, deepest=max(levels), count=count)
    return train_and_measure(
        result,
        runs,
        {v.name: v.depths for v in variants},
        count,
        jobs=jobs,
        minutes=minutes,
        out=out,
        extra=extra,
        finish=summarise,
        progress=progress,
    )


def _adaptive(model: Any, task: Any, variant: str, *, deepest: int, count: int) -> Row:
    if variant != REFERENCE:
        return {}
    return {"adaptive": measure_adaptive(model, task, TOLERANCES, deepest=deepest, count=count)}


def summarise(result: dict[str, Any]) -> None:
    """Put `variants` into `result`: shares of questions right, over seeds, with 95 % intervals.

    `per_question` and `by_difficulty` have `mean`, `interval` (None for one seed) and `seeds`, by
    depth; `ahead` is what the reference has more than the variant, each asked at its own depth,
    seed by seed: mean, lowest, highest. `tied`: each difficulty at the depth it trained at.
    """
    result["variants"] = {}
    by_name = {
        name: {row["seed"]: row for row in result["rows"] if row["variant"] == name}
        for name in result["plan"]
    }
    for name, plan in result["plan"].items():
        rows = by_name[name]
        if not rows:
            continue
        levels = next(iter(rows.values()))["questions"]
        variant = {
            **{key: plan[key] for key in ("label", "role", "equal")},
            "asked": str(plan["asked"]),
            "seeds": list(rows),
            "seconds": mean(row["seconds"] for row in rows.values()),
            "cost": {
                key: mean(row["cost"][key] for row in rows.values())
                for key in next(iter(rows.values()))["cost"]
            },
            "per_question": {
                str(depth): _over([row["per_question"][str(depth)] for row in rows.values()])
                for depth in plan["depths"]
            },
            "by_difficulty": {
                str(depth): {
                    level: _over([r["by_difficulty"][str(depth)][level] for r in rows.values()])
                    for level in levels
                }
                for depth in plan["depths"]
            },
        }
        if plan["tied"] and all(str(d) in variant["by_difficulty"] for d in plan["tied"].values()):
            variant["tied"] = {
                level: variant["by_difficulty"][str(depth)][level]
                for level, depth in plan["tied"].items()
            }
        result["variants"][name] = variant
    if REFERENCE not in result["variants"]:
        return
    at = result["variants"][REFERENCE]["asked"]
    first = by_name[REFERENCE]
    for name, variant in result["variants"].items():
        own = variant["asked"]
        gaps = [
            first[seed]["per_question"][at] - row["per_question"][own]
            for seed, row in by_name[name].items()
            if seed in first
        ]
        variant["ahead"] = [mean(gaps), min(gaps), max(gaps)] if gaps else None
    adaptive = [row["adaptive"] for row in first.values() if "adaptive" in row]
    if adaptive:
        result["adaptive"] = [
            {
                "tolerance": same[0]["tolerance"],
                "passes": mean(one["passes"] for one in same),
                "per_question": _over([one["per_question"] for one in same]),
            }
            for same in zip(*adaptive, strict=True)
        ]
    result["floor_per_question"] = floor_of(result)


def _over(shares: list[float]) -> dict[str, Any]:
    interval = over_seeds(shares)
    return {
        "mean": mean(shares),
        "interval": None if interval is None else list(interval),
        "seeds": shares,
    }


def floor_of(result: dict[str, Any]) -> float:
    """The floor of the share of questions right: that of each difficulty, as often as it came."""
    counts = next(iter(result["rows"]))["questions"]
    floors = result["floor"]["by_difficulty"]
    return sum(floors[level] * n for level, n in counts.items()) / sum(counts.values())
