"""The processes that train together, and what they tell each other."""

from __future__ import annotations

from typing import Any

import torch


def ranks() -> int:
    """How many processes train together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def over_ranks(values: torch.Tensor, how: str) -> torch.Tensor:
    """`values` (on the CPU), over all ranks reduced by `how` ("SUM", "MAX"); a collective call."""
    if ranks() == 1:
        return values
    group = torch.distributed
    device = "cpu" if "gloo" in group.get_backend() else torch.cuda.current_device()
    values = values.to(device)
    group.all_reduce(values, getattr(group.ReduceOp, how))
    return values.cpu()


def of_all_ranks(value: Any) -> list[Any]:
    """The `value` of every rank, in their order; a collective call."""
    if ranks() == 1:
        return [value]
    values = [None] * ranks()
    torch.distributed.all_gather_object(values, value)
    return values
