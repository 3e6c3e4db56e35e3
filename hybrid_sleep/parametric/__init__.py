"""Parametric sleep: what was learned moves into the slow weights, behind a gate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Names are loaded when asked for: a store of facts is read without torch.
_exports = {
    "CachedContext": "experience.context",
    "EditOptions": "edit",
    "Fact": "facts",
    "FactStore": "store",
    "Imitation": "experience.imitation",
    "Limits": "pressure",
    "Memory": "memory",
    "MemoryOptions": "options",
    "Record": "record",
    "Relation": "facts",
    "Schedule": "schedule",
    "StudyOptions": "experience.options",
    "TargetOptions": "targets",
    "Thresholds": "gate",
    "check_facts": "facts",
    "parse_fact": "facts",
}
__all__ = [*_exports]

if TYPE_CHECKING:
    from hybrid_sleep.parametric.edit import EditOptions as EditOptions
    from hybrid_sleep.parametric.experience.context import CachedContext as CachedContext
    from hybrid_sleep.parametric.experience.imitation import Imitation as Imitation
    from hybrid_sleep.parametric.experience.options import StudyOptions as StudyOptions
    from hybrid_sleep.parametric.facts import Fact as Fact
    from hybrid_sleep.parametric.facts import Relation as Relation
    from hybrid_sleep.parametric.facts import check_facts as check_facts
    from hybrid_sleep.parametric.facts import parse_fact as parse_fact
    from hybrid_sleep.parametric.gate import Thresholds as Thresholds
    from hybrid_sleep.parametric.memory import Memory as Memory
    from hybrid_sleep.parametric.options import MemoryOptions as MemoryOptions
    from hybrid_sleep.parametric.pressure import Limits as Limits
    from hybrid_sleep.parametric.record import Record as Record
    from hybrid_sleep.parametric.schedule import Schedule as Schedule
    from hybrid_sleep.parametric.store import FactStore as FactStore
    from hybrid_sleep.parametric.targets import TargetOptions as TargetOptions
else:

    def __getattr__(name: str) -> Any:
        if name in _exports:
            return getattr(importlib.import_module(f"{__name__}.{_exports[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_exports])
