"""Causal language models that interleave attention with state-space layers, and sleep."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    # A checkout keeps kernels/, training/, eval/ and configs/ beside this package, not inside it.
    __path__.append(str(_root))

# Names are loaded when asked for: printing the command line's help should not wait for torch.
_exports = {
    "HybridSleepConfig": "configuration",
    "HybridSleepModel": "modeling",
    "HybridSleepForCausalLM": "modeling",
    "SleepCache": "sleep.cache",
    "SleepReport": "sleep.report",
}
__all__ = ["__version__", *_exports]


def __getattr__(name: str):
    if name in _exports:
        return getattr(importlib.import_module(f"hybrid_sleep.{_exports[name]}"), name)
    raise AttributeError(f"module 'hybrid_sleep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_exports])


if "transformers" in sys.modules:
    # Someone may reach for AutoModelForCausalLM next, without asking this package for a name.
    importlib.import_module("hybrid_sleep.modeling")
