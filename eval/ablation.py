"""Variants of one run side by side: what does each change do to accuracy, over the same seeds?

Every variant is trained with every seed and asked at the same depths, on the same test examples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.depth import parse_depths
from hybrid_sleep.eval.plots import GREY, STYLES, new_figure
from hybrid_sleep.eval.variants import (
    device_of,
    parse_seeds,
    parse_variant,
    runs_of,
    train_and_measure,
)
from hybrid_sleep.support.provenance import describe, provenance
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

def run(
    config: str | os.PathLike,
    variants: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    seeds: str = "0,1,2",
    depths: str = "1-4",
    count: int = 2000,
    jobs: int = 1,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train every variant of `config` with every seed, and measure each at every depth.

    `variants` are texts that `parse_variant` reads; the first is what the others are compared with.
    An earlier training in a run's folder is replaced. Interrupted after the first row, it returns
    what it has, with `complete` False; rows that `out` has from the same code, machine, config and
    first weights are kept. Raises ValueError or FileNotFoundError before anything is trained (see
    `runs_of`).
    """
    depths = parse_depths(depths)
    check_count("count", count)
    variants = [parse_variant(text) for text in variants]
    runs = runs_of(config, overrides, variants, parse_seeds(seeds))
    first = next(iter(runs.values()))
    device = device_of(first)
    task = first.load_task()
    majority = task.majority()
    result = {
        "benchmark": "ablation",
        "config": Path(config).name,
        "task": {"name": task.name, "params": task.params},
        "floor": majority.exact,
        "floor_per_label": majority.per_label,
        "depths": depths,
        "examples": count,
        "clock": "processor" if device == "cpu" else "wall",
        "changes": {name: list(changes) for name, changes in variants},
        "rows": [],
        "command": command,
        "provenance": provenance(device),
    }
    return train_and_measure(
        result,
        runs,
        dict.fromkeys(result["changes"], depths),
        count,
        jobs=jobs,
        finish=summarise,
        out=out,
        progress=progress,
    )


def summarise(result: dict[str, Any]) -> None:
    """Put `variants` into `result`: mean, spread and difference to the first one, by depth.

    `behind` is what a variant lacks to the first one with the same seed: mean, lowest, highest.
    """
    by_name = {
        name: {row["seed"]: row for row in result["rows"] if row["variant"] == name}
        for name in result["changes"]
    }
    first = by_name[next(iter(by_name))]
    result["variants"] = {}
    for name, rows in by_name.items():
        if not rows:
            continue
        shared = [seed for seed in rows if seed in first]
        variant = {
            "seeds": list(rows),
            "steps": mean(row["steps"] for row in rows.values()),
            "seconds": mean(row["seconds"] for row in rows.values()),
            "exact": {},
            "per_label": {},
            "spread": {},
            "behind": {},
        }
        for depth in map(str, result["depths"]):
            exact = [row["exact"][depth] for row in rows.values()]
            gaps = [first[seed]["exact"][depth] - rows[seed]["exact"][depth] for seed in shared]
            variant["exact"][depth] = mean(exact)
            variant["per_label"][depth] = mean(row["per_label"][depth] for row in rows.values())
            variant["spread"][depth] = [min(exact), max(exact)]
            variant["behind"][depth] = [mean(gaps), min(gaps), max(gaps)] if gaps else None
        result["variants"][name] = variant


def best_depth(variant: dict[str, Any]) -> str:
    """The smallest depth with the highest mean of `exact`."""
    return max(sorted(variant["exact"], key=int), key=lambda depth: variant["exact"][depth])


def words(result: dict[str, Any]) -> list[str]:
    """What the seeds say about every variant against the first, each asked at its best depth."""
    variants = result["variants"]
    name = next(iter(result["changes"]))
    if name not in variants:
        return []
    at = best_depth(variants[name])
    lines = []
    for other, variant in variants.items():
        gap = variant["behind"][at]
        if other == name or gap is None:
            continue
        middle, low, high = gap
        verdict = "the seeds do not agree"
        if low > 0 or high < 0:
            verdict = f"{name} is {'ahead' if low > 0 else 'behind'} with every seed"
        lines.append(
            f"{name} against {other} at depth {at}, seed by seed: {middle:+.3f} of exact accuracy "
            f"({low:+.3f} to {high:+.3f}); {verdict}."
        )
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table of an ablation, what the seeds say, the floor, and where it came from."""
    depths = [str(depth) for depth in result["depths"]]
    head = ["variant", "steps", f"{result['clock']} s", *(f"N = {depth}" for depth in depths)]
    lines = [f"| {' | '.join(head)} |", "|:---|" + "---:|" * (len(head) - 1)]
    for name, variant in result["variants"].items():
        cells = [name, f"{variant['steps']:.0f}", f"{variant['seconds']:.0f}"]
        for depth in depths:
            low, high = variant["spread"][depth]
            exact = f"{variant['exact'][depth]:.3f}"
            strong = f"**{exact}**" if depth == best_depth(variant) else exact
            cells.append(f"{strong} ({low:.3f} to {high:.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    params = ", ".join(f"{name}={value}" for name, value in result["task"]["params"].items())
    seeds = sorted({row["seed"] for row in result["rows"]})
    lines += [
        "",
        "Exact accuracy by sleep depth N: mean over seeds "
        f"{', '.join(map(str, seeds))} (lowest to highest). "
        f"Task: {result['task']['name']} ({params}); {result['examples']} test examples. Floor "
        f"(always the most frequent label): {result['floor']:.4f}. Steps and {result['clock']} "
        "seconds are of one training, all its stages.",
        "",
        *(f"- {text}" for text in words(result)),
        "",
        f"Variants of {result['config']}:",
        "",
    ]
    for name, changes in result["changes"].items():
        lines.append(f"- {name}: " + (", ".join(f"`{c}`" for c in changes) or "as it is"))
    if not result["complete"]:
        lines += ["", f"Not complete ({result['ended']}); the same call goes on."]
    lines += ["", describe(result["provenance"])]
    if result["command"]:
        lines += ["", f"`{result['command']}`"]
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any]) -> Figure:
    """Accuracy against depth, a line a variant with bars from the lowest seed to the highest."""
    figure, axes = new_figure(f"{result['task']['name']}: {len(result['variants'])} variants")
    depths = result["depths"]
    axes.axhline(result["floor"], color=GREY, linestyle=(0, (4, 3)), linewidth=1.6)
    axes.annotate(
        f"floor {100 * result['floor']:.1f} %", (1, result["floor"]),
        xycoords=("axes fraction", "data"), xytext=(0, -5), textcoords="offset points",
        ha="right", va="top", fontsize=11, color=GREY,
    )  # fmt: skip
    for index, (name, variant) in enumerate(result["variants"].items()):
        color, marker, line = STYLES[index % len(STYLES)]
        exact = [variant["exact"][str(depth)] for depth in depths]
        ends = [variant["spread"][str(depth)] for depth in depths]
        # Side by side, or the bars would hide each other.
        shift = 0.05 * (index - (len(result["variants"]) - 1) / 2)
        axes.errorbar(
            [depth + shift for depth in depths], exact, color=color, marker=marker, linestyle=line,
            yerr=[
                [value - low for value, (low, _) in zip(exact, ends, strict=True)],
                [high - value for value, (_, high) in zip(exact, ends, strict=True)],
            ],
            markersize=7, linewidth=2, capsize=3, label=name,
        )  # fmt: skip
    axes.set_ylim(0, 1.04)
    axes.set_xticks(depths)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("sleep depth N (passes over each window)", fontsize=13)
    axes.set_ylabel("every label right", fontsize=13)
    figure.legend(fontsize=11, frameon=False, loc="outside lower center", ncols=2)
    return figure
