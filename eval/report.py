"""A result as three files: results.json, results.md and a figure, the last two from the first."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from hybrid_sleep.eval.plots import save_figure
from hybrid_sleep.support.io import read_json, unreadable, write_json_atomic, write_text_atomic

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
    # As it comes back from the file, of which table and figure are made.
    return [path, *_draw(read_json(path), path)]


def render(path: str | os.PathLike) -> list[Path]:
    """Rebuild table and figure beside a results.json; their paths.

    Raises OSError or ValueError if the file cannot be read, is damaged, or is not the result of a
    benchmark this version knows.
    """
    path = Path(path)
    result = read_json(path)
    kind = result.get("benchmark")
    if not isinstance(kind, str) or kind not in BENCHMARKS:
        raise ValueError(f"{path}: benchmark={kind!r}; allowed: {', '.join(BENCHMARKS)}")
    try:
        return _draw(result, path)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"it is no result that this version can show ({type(error).__name__}: {error})"
        raise unreadable(path, what) from error


def _draw(result: dict[str, Any], path: Path) -> list[Path]:
    module_name, figure_name = BENCHMARKS[result["benchmark"]]
    module = importlib.import_module(module_name)
    table, figure = path.with_name("results.md"), path.with_name(figure_name)
    write_text_atomic(table, module.markdown(result))
    save_figure(module.figure(result), figure)
    return [table, figure]
