"""Seconds of calls that are interleaved, so that other load on the machine slows all of them.

Imports torch alone: `worker.py` loads this file together with the ops of another commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import quantiles
from typing import Any

import torch

Work = Callable[[], Any]
# Several times the largest L2 cache, so that no call finds its inputs there.
FLUSHED_BYTES = 256 * 2**20


def on_cpu(work: Work) -> float:
    """Seconds of one call, by a clock that only runs forward."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def timer(device: Any) -> Callable[[Work], float]:
    """What measures one call on `device`; on a GPU by its own events, from a cold L2 cache."""
    device = torch.device(device)
    if device.type != "cuda":
        return on_cpu
    unrelated = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def on_cuda(work: Work) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # While the device does this, the host gets ahead of it with the launches that follow.
            unrelated.zero_()
            start.record()
            work()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000

    return on_cuda


def interleaved(
    works: Mapping[str, Work],
    repeats: int,
    least_seconds: float,
    time_one: Callable[[Work], float] = on_cpu,
) -> dict[str, list[float]]:
    """At least `repeats` rounds, and more until `least_seconds` have passed; each round calls
    every one once, and the next round starts with the next one. Seconds by name, one per round."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rounds = 0
    end = time.perf_counter() + least_seconds
    while rounds < repeats or time.perf_counter() < end:
        first = rounds % max(1, len(names))
        for name in names[first:] + names[:first]:
            seconds[name].append(time_one(works[name]))
        rounds += 1
    return seconds


def median_and_quartiles(values: list[float]) -> tuple[float, list[float]]:
    """The median, and the first and third quartile."""
    if len(values) == 1:
        return values[0], [values[0], values[0]]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, [low, high]
