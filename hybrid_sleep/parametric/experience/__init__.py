"""What a model experienced: kept safely until a sleep, and then erased."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Names are loaded when asked for: the store of facts has the tables, and needs no more of it.
_exports = {
    "Buffer": "buffer",
    "Canary": "canaries",
    "Experience": "experience",
    "Limits": "experience",
    "Secrets": "canaries",
    "exposure": "canaries",
}
__all__ = [*_exports]

if TYPE_CHECKING:
    from hybrid_sleep.parametric.experience.buffer import Buffer as Buffer
    from hybrid_sleep.parametric.experience.canaries import Canary as Canary
    from hybrid_sleep.parametric.experience.canaries import Secrets as Secrets
    from hybrid_sleep.parametric.experience.canaries import exposure as exposure
    from hybrid_sleep.parametric.experience.experience import Experience as Experience
    from hybrid_sleep.parametric.experience.experience import Limits as Limits
else:

    def __getattr__(name: str) -> Any:
        if name in _exports:
            return getattr(importlib.import_module(f"{__name__}.{_exports[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_exports])
