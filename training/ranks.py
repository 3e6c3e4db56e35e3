"""The processes that train together, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


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


def add_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values`, summed over all ranks in place, on the device they are on; a collective call."""
    if ranks() > 1:
        torch.distributed.all_reduce(values)
    return values


def of_all_ranks(value: Any) -> list[Any]:
    """The `value` of every rank, in their order; a collective call."""
    if ranks() == 1:
        return [value]
    values = [None] * ranks()
    torch.distributed.all_gather_object(values, value)
    return values


def of_first(work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What `work(*args, **kwargs)` returns in the first process, in all of them; a collective call.

    The others do nothing meanwhile. A ValueError, OSError or ImportError that it raises is raised
    in all.
    """
    if ranks() == 1:
        return work(*args, **kwargs)
    answer: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = work(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            answer[1] = error
    torch.distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
