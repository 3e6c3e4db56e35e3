"""Training of models that sleep: `python -m hybrid_sleep.training CONFIG`."""

from __future__ import annotations

import importlib

_exports = {
    "RunConfig": "config",
    "load_run_config": "config",
    "MarkSupervised": "data",
    "DepthPolicy": "depth",
    "parse_depth": "depth",
    "FitRecord": "loop",
    "StepRecord": "loop",
    "fit": "loop",
    "MuonAdamW": "optimizer",
    "optimizer_for": "optimizer",
    "parameter_groups": "optimizer",
    "SleepTrainer": "trainer",
    "TrainResult": "run",
    "train": "run",
}
__all__ = list(_exports)


def __getattr__(name: str):
    if name in _exports:
        return getattr(importlib.import_module(f"hybrid_sleep.training.{_exports[name]}"), name)
    raise AttributeError(f"module 'hybrid_sleep.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_exports])
