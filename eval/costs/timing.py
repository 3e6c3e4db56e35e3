"""Clocks of a device, and what is kept of repeated measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_sleep.kernels.benchmarks.timing import median_and_quartiles

# On a CPU the processor time of one thread, which other programs lengthen less than elapsed time.
CLOCK = {"cpu": "cpu_seconds", "cuda": "wall_seconds"}


@dataclass
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    quartiles: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Those of `values`."""
        return cls(*median_and_quartiles(list(values)))


def synchronise(device: Any) -> None:
    """Wait until `device` has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(work: Callable[[], Any], device: Any) -> float:
    """Seconds from the start of `work` until `device` has finished it."""
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def stopwatch(device: Any) -> Callable[[], float]:
    """A clock in seconds: processor time on a CPU; on a GPU elapsed time, all work finished."""
    if torch.device(device).type == "cpu":
        return time.process_time

    def now() -> float:
        synchronise(device)
        return time.perf_counter()

    return now
