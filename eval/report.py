"""A result as three files: results.json, results.md and a figure, the last two from the first."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from hybrid_sleep.eval.plots import save_figure
from hybrid_sleep.io import write_json_atomic, write_text_atomic

# Each module has `markdown(result) -> str` and `figure(result)`; the name is the figure's file.
BENCHMARKS = {
    "depth": ("hybrid_sleep.eval.depth_report", "accuracy.png"),
    "demo": ("hybrid_sleep.eval.demo", "accuracy.png"),
    "generation": ("hybrid_sleep.eval.benchmarks.generation", "generation.png"),
    "cost": ("hybrid_sleep.eval.benchmarks.cost_report", "cost.png"),
    "kernels": ("hybrid_sleep.kernels.benchmarks.report", "kernels.png"),
    "base": ("hybrid_sleep.kernels.benchmarks.report", "base.png"),
    "fallback": ("hybrid_sleep.kernels.benchmarks.fallback", "fallback.png"),
    "sleep": ("hybrid_sleep.eval.benchmarks.sleep", "sleep.png"),
    "training": ("hybrid_sleep.eval.benchmarks.training_report", "training.png"),
    "ablation": ("hybrid_sleep.eval.ablation", "accuracy.png"),
    "harness": ("hybrid_sleep.eval.harness.report", "accuracy.png"),
    "map": ("hybrid_sleep.eval.depth_map", "map.png"),
    "suite": ("hybrid_sleep.eval.suite_report", "accuracy.png"),
}


def save(result: dict[str, Any], out: str | os.PathLike) -> list[Path]:
    """Write results.json, results.md and the figure into `out`, each atomically; their paths."""
    path = Path(out) / "results.json"
    write_json_atomic(path, result)
    return [path, *render(path)]


def render(path: str | os.PathLike) -> list[Path]:
    """Rebuild table and figure beside a results.json; their paths.

    Raises ValueError if the file is not the result of a benchmark this version knows.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    kind = result.get("benchmark") if isinstance(result, dict) else None
    if kind not in BENCHMARKS:
        raise ValueError(f"{path}: benchmark={kind!r}; allowed: {', '.join(BENCHMARKS)}")
    module_name, figure_name = BENCHMARKS[kind]
    module = importlib.import_module(module_name)
    table, figure = path.with_name("results.md"), path.with_name(figure_name)
    write_text_atomic(table, module.markdown(result))
    save_figure(module.figure(result), figure)
    return [table, figure]
