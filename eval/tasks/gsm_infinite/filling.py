"""Which rooms a few lengths of sentence can fill."""

from __future__ import annotations

from functools import lru_cache

TOLERANCE = 20  # a problem lacks at most one part in so many of its target
ROOMY = 256  # here a few sentences of any task's lengths reach every room


def slack(length: int, shortest: int) -> int:
    """How many tokens may lack of `length`: 5 %, and fewer than the `shortest` sentence has."""
    return min(length // TOLERANCE, shortest - 1)


@lru_cache(maxsize=1 << 14)
def fillable(room: int, left: int, costs: tuple[int, ...]) -> bool:
    """Whether sentences of `costs` tokens, any number of each, leave at most `left` of `room`."""
    if room <= left or room >= ROOMY:
        return room >= 0
    return any(fillable(room - cost, left, costs) for cost in costs if cost <= room)
