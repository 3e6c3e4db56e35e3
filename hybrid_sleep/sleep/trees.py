"""Trees of tensors: what passes between blocks, passes and sleeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def map_tensors(work: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`tree` with each tensor x replaced by `work(x, its counterparts in others)`.

    Trees are mappings and tuples, named or not; a counterpart that is missing is None, and leaves
    that are no tensors stay. `torch.utils._pytree` does the same, but it is private, and stops at
    trees whose structures differ, as those before and after the first pass do.
    """
    if isinstance(tree, torch.Tensor):
        return work(tree, *others)
    if isinstance(tree, Mapping):
        return {
            key: map_tensors(work, part, *((o or {}).get(key) for o in others))
            for key, part in tree.items()
        }
    if isinstance(tree, tuple):
        parts = [
            map_tensors(work, part, *(o[i] if o and i < len(o) else None for o in others))
            for i, part in enumerate(tree)
        ]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """All tensors of a tree, in order."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, tree)
    return found
