"""Trees of tensors: what passes between blocks, passes and sleeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch


def map_tensors(work: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`tree` with each tensor x replaced by `work(x, its counterparts in others)`.

    Trees are mappings, named tuples and dataclasses; a counterpart that is missing is None.
    """
    if isinstance(tree, torch.Tensor):
        return work(tree, *others)
    if isinstance(tree, Mapping):
        return {
            key: map_tensors(work, part, *((o or {}).get(key) for o in others))
            for key, part in tree.items()
        }
    if is_dataclass(tree) or isinstance(tree, tuple):
        names = tree._fields if isinstance(tree, tuple) else [f.name for f in fields(tree)]
        parts = {
            name: map_tensors(work, getattr(tree, name), *(getattr(o, name, None) for o in others))
            for name in names
        }
        return replace(tree, **parts) if is_dataclass(tree) else type(tree)(**parts)
    return tree
