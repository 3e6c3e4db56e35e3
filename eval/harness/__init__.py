"""lm-evaluation-harness on models that sleep, and our tasks in it: `hybrid-sleep eval --tasks`.

Needs the package lm_eval (the extra `eval`), which is imported when something here is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid_sleep.eval.harness.tasks import task_manager

__all__ = ["HybridSleepLM", "task_manager"]


def __getattr__(name: str) -> Any:
    if name == "HybridSleepLM":
        return importlib.import_module("hybrid_sleep.eval.harness.model").language_model()
    if name == "task_manager":
        return importlib.import_module("hybrid_sleep.eval.harness.tasks").task_manager
    raise AttributeError(f"module 'hybrid_sleep.eval.harness' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
