"""Where does depth win? Difficulty x sleep depth x compute, every cell trained for itself.

All models of a map have the same parameters and the same cost awake. Those of one compute take the
same FLOPs to train, so a deeper sleep is paid for with fewer steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.depth import parse_depths
from hybrid_sleep.eval.plots import GREY, STYLES
from hybrid_sleep.eval.statistics import over_seeds
from hybrid_sleep.eval.variants import (
    cost_of,
    device_of,
    one_stage,
    parse_seeds,
    runs_of,
    train_and_measure,
)
from hybrid_sleep.support.provenance import describe, provenance
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL_WITHIN = 0.02  # of questions right


def parse_compute(text: str) -> list[float]:
    """Multiples of a run's compute, from text such as `1,3`; ValueError for anything else."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0 or max(found) == float("inf") or len(set(found)) < len(found):
        raise ValueError(f"compute={text!r}; allowed: different numbers above 0, such as 1,3")
    return sorted(found)


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """Key and values of `key=[value, ...]`; ValueError for anything else."""
    from hybrid_sleep.training.parsing import parse_overrides

    ((key, values),) = parse_overrides([text])
    if not isinstance(values, list) or len({str(value) for value in values}) < max(1, len(values)):
        raise ValueError(f"vary={text!r}; allowed: such as task.params.steps=[2,4,6]")
    return key, values


def run(
    config: str | os.PathLike,
    vary: str,
    *,
    overrides: Sequence[str] = (),
    depths: str = "1,2,4",
    compute: str = "1,3",
    seeds: str = "0,1,2",
    count: int = 2000,
    jobs: int = 1,
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train a model for every value of `vary`, depth, multiple of compute and seed; ask each at it.

    vary: `key=[values]`, what makes the task harder. One compute is the FLOPs of the config's own
    run, as it stands, with the first value; other cells take as many steps as come nearest to it,
    or to the multiple. Rows that `out` has from the same code, machine and config are kept. Raises
    ValueError or FileNotFoundError before anything is trained.
    """
    from hybrid_sleep.training import load_run_config
    from hybrid_sleep.training.parsing import parse_overrides

    key, values = parse_vary(vary)
    levels, multiples = parse_depths(depths), parse_compute(compute)
    numbers = parse_seeds(seeds)
    check_count("count", count)
    given = dict(parse_overrides(overrides))
    base = one_stage(load_run_config(config, {**given, key: values[0]}))
    unit = cost_of(base)["training_flops"]
    cells, variants = {}, []
    for value in values:
        for depth in levels:
            changes = {key: value, "sleep_passes": depth, "model.sleep_passes": depth}
            single = {"train.steps": 1, "train.warmup": 0}
            once = load_run_config(config, {**given, **changes, **single})
            step = cost_of(once)["training_flops"]
            for multiple in multiples:
                steps = max(1, round(multiple * unit / step))
                name = re.sub(r"[^\w.-]+", "_", f"{key.rpartition('.')[2]}{value}").strip("_")
                name = f"{name}-N{depth}-C{multiple:g}"
                warmup = {"train.steps": steps, "train.warmup": min(base.train.warmup, steps)}
                variants.append((name, {**changes, **warmup}))
                cells[name] = {"value": str(value), "depth": depth, "compute": multiple}
    runs = runs_of(config, overrides, variants, numbers, one_task=False)
    floors = {
        cells[name]["value"]: run.load_task().floor()
        for (name, seed), run in runs.items()
        if seed == numbers[0]
    }
    result = {
        "benchmark": "map",
        "config": Path(config).name,
        "overrides": list(overrides),
        "task": {"name": base.task.name, "params": base.task.params},
        "vary": {"key": key, "values": [str(value) for value in values]},
        "floors": {v: mean(by.values()) for v, by in floors.items()},
        "depths": levels,
        "compute": multiples,
        "flops": unit,
        "examples": count,
        "seeds": numbers,
        "clock": "processor" if device_of(base) == "cpu" else "wall",
        "cells": cells,
        "rows": [],
        "command": command,
        "provenance": provenance(device_of(base)),
    }
    return train_and_measure(
        result,
        runs,
        {name: [cell["depth"]] for name, cell in cells.items()},
        count,
        jobs=jobs,
        minutes=minutes,
        out=out,
        finish=summarise,
        progress=progress,
    )


def summarise(result: dict[str, Any]) -> None:
    """Put `grid` into `result`: a list of what was measured, by value, compute and depth.

    Each has `mean`, `interval` and `seeds` of the share of questions right, `steps`, `seconds`, and
    `ahead`: what it has more than the smallest depth of the same value and compute, seed by seed
    (mean, lowest, highest; None for that depth itself).
    """
    found: dict[tuple[str, float, int], dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        cell = result["cells"][row["variant"]]
        place = (cell["value"], cell["compute"], cell["depth"])
        found.setdefault(place, {})[row["seed"]] = row
    result["grid"] = []
    for value in result["vary"]["values"]:
        for multiple in result["compute"]:
            first = _shares(found.get((value, multiple, result["depths"][0]), {}))
            for depth in result["depths"]:
                rows = found.get((value, multiple, depth), {})
                if not rows:
                    continue
                shares = _shares(rows)
                gaps = [shares[seed] - first[seed] for seed in shares if seed in first]
                if depth == result["depths"][0]:
                    gaps = []
                interval = over_seeds(list(shares.values()))
                result["grid"].append(
                    {
                        "value": value,
                        "compute": multiple,
                        "depth": depth,
                        "mean": mean(shares.values()),
                        "interval": None if interval is None else list(interval),
                        "seeds": list(shares.values()),
                        "steps": round(mean(row["steps"] for row in rows.values())),
                        "seconds": mean(row["seconds"] for row in rows.values()),
                        "ahead": [mean(gaps), min(gaps), max(gaps)] if gaps else None,
                    }
                )


def _shares(rows: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Shares of questions right by seed, each at the one depth that was asked."""
    return {seed: next(iter(row["per_question"].values())) for seed, row in rows.items()}


def verdicts(result: dict[str, Any]) -> list[str]:
    """For each value and compute, which depth is best, and whether the seeds agree on it."""
    lines = []
    key, first = result["vary"]["key"].rpartition(".")[2], result["depths"][0]
    for value in result["vary"]["values"]:
        for multiple in result["compute"]:
            cells = [
                c for c in result["grid"] if (c["value"], c["compute"]) == (value, multiple)
            ]
            if len(cells) < 2:
                continue
            best = max(cells, key=lambda cell: cell["mean"])
            place = f"{key} = {value}, {multiple:g}x compute: "
            near = [c["depth"] for c in cells if c["mean"] > best["mean"] - EQUAL_WITHIN]
            if len(near) > 1 and first in near:
                depths = " and ".join(f"N = {depth}" for depth in near)
                lines.append(f"{place}{depths} are within {EQUAL_WITHIN:g} ({best['mean']:.3f}).")
                continue
            if best["depth"] == first:
                others = [cell for cell in cells if cell is not best]
                sure = all(c["ahead"][2] < 0 for c in others)
                how = "with every seed" if sure else "but not with every seed"
                lines.append(f"{place}N = {first} is best ({best['mean']:.3f}), {how}.")
                continue
            gap, low, high = best["ahead"]
            how = "with every seed" if low > 0 else "but the seeds do not agree"
            lines.append(
                f"{place}N = {best['depth']} is best ({best['mean']:.3f}), {gap:+.3f} over "
                f"N = {first} ({low:+.3f} to {high:+.3f}), {how}."
            )
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table of a map, who is best where, floors, and where it came from."""
    key, depths = result["vary"]["key"].rpartition(".")[2], result["depths"]
    head = [key, "floor", "compute", *(f"N = {depth}" for depth in depths), "steps"]
    lines = [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
    for value in result["vary"]["values"]:
        for multiple in result["compute"]:
            cells = {
                c["depth"]: c
                for c in result["grid"]
                if (c["value"], c["compute"]) == (value, multiple)
            }
            if not cells:
                continue
            best = max(cell["mean"] for cell in cells.values())
            row = [value, f"{result['floors'][value]:.3f}", f"{multiple:g}x"]
            for depth in depths:
                row.append(_cell(cells[depth], best) if depth in cells else "")
            row.append(" / ".join(str(cells[d]["steps"]) if d in cells else "" for d in depths))
            lines.append(f"| {' | '.join(row)} |")
    fixed = {k: v for k, v in result["task"]["params"].items() if k != key}
    params = ", ".join(f"{name}={value}" for name, value in fixed.items())
    grid = result["grid"]
    longest = max((cell["seconds"] for cell in grid), default=0.0)
    lines += [
        "",
        "Share of questions right, each model asked at the depth it was trained at: mean over "
        f"seeds {', '.join(map(str, result['seeds']))} (lowest to highest), best in bold; "
        f"{result['examples']} test examples. In a row all trainings take the same FLOPs, "
        f"{result['flops']:.3g} at 1x, so deeper sleep has fewer steps (last column, in the order "
        "of N); parameters and the cost of a token awake are the same everywhere. "
        f"Task: {result['task']['name']} ({params}); the longest training took {longest:.0f} "
        f"{result['clock']} seconds.",
        "",
        *(f"- {line}" for line in verdicts(result)),
    ]
    if not result["complete"]:
        lines += ["", f"Not complete ({result['ended']}); the same call goes on."]
    lines += ["", describe(result["provenance"])]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any], best: float) -> str:
    shown = f"{cell['mean']:.3f}"
    shown = f"**{shown}**" if cell["mean"] == best else shown
    return f"{shown} ({min(cell['seeds']):.3f} to {max(cell['seeds']):.3f})"


def figure(result: dict[str, Any]) -> Figure:
    """Accuracy against difficulty, a line for each depth and a panel for each compute."""
    from hybrid_sleep.eval.plots import new_panels

    values, key = result["vary"]["values"], result["vary"]["key"].rpartition(".")[2]
    titles = [f"{result['task']['name']}, compute x {c:g}" for c in result["compute"]]
    figure, panels = new_panels(titles)
    for axes, multiple in zip(panels, result["compute"], strict=True):
        axes.plot(
            range(len(values)), [result["floors"][value] for value in values], color=GREY,
            linestyle=(0, (4, 3)), linewidth=1.6, label="floor",
        )  # fmt: skip
        for index, depth in enumerate(result["depths"]):
            color, marker, line = STYLES[index % len(STYLES)]
            cells = [
                c for c in result["grid"] if (c["compute"], c["depth"]) == (multiple, depth)
            ]
            if not cells:
                continue
            # Side by side, or the bars would hide each other.
            shift = 0.06 * (index - (len(result["depths"]) - 1) / 2)
            axes.errorbar(
                [values.index(cell["value"]) + shift for cell in cells],
                [cell["mean"] for cell in cells],
                yerr=[
                    [cell["mean"] - min(cell["seeds"]) for cell in cells],
                    [max(cell["seeds"]) - cell["mean"] for cell in cells],
                ],
                color=color, marker=marker, linestyle=line, markersize=7, linewidth=2, capsize=3,
                label=f"N = {depth}",
            )  # fmt: skip
        axes.set_ylim(0, 1.04)
        axes.set_xticks(range(len(values)), values)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_ylabel("right", fontsize=13)
    panels[-1].set_xlabel(key, fontsize=13)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=11, frameon=False, loc="outside lower center", ncols=4
    )
    return figure
