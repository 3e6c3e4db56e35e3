"""Causal language models that interleave attention with state-space layers, and sleep."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent


class _Beside:
    """Finds the four folders of a checkout that lie beside this package and install inside it."""

    names = frozenset(f"{__name__}.{top}" for top in ("kernels", "training", "eval", "configs"))

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(_root)]) if name in cls.names else None


if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    # First, before an editable installation of another checkout answers for these names.
    sys.meta_path.insert(0, _Beside)

# Names are loaded when asked for: printing the command line's help should not wait for torch.
_exports = {
    "HybridSleepConfig": "configuration",
    "HybridSleepModel": "modeling",
    "HybridSleepForCausalLM": "modeling",
    "SleepCache": "sleep.cache",
    "SleepReport": "sleep.report",
}
__all__ = ["__version__", *_exports]

if TYPE_CHECKING:
    from hybrid_sleep.configuration import HybridSleepConfig as HybridSleepConfig
    from hybrid_sleep.modeling import HybridSleepForCausalLM as HybridSleepForCausalLM
    from hybrid_sleep.modeling import HybridSleepModel as HybridSleepModel
    from hybrid_sleep.sleep.cache import SleepCache as SleepCache
    from hybrid_sleep.sleep.report import SleepReport as SleepReport
else:

    def __getattr__(name: str) -> Any:
        if name in _exports:
            return getattr(importlib.import_module(f"hybrid_sleep.{_exports[name]}"), name)
        raise AttributeError(f"module 'hybrid_sleep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_exports])


if "transformers" in sys.modules:
    # Someone may reach for AutoModelForCausalLM next, without asking this package for a name.
    importlib.import_module("hybrid_sleep.modeling")
