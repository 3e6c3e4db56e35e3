"""Accuracy of one model on the test examples of its task, at fixed sleep depths or at its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hybrid_sleep.eval.tasks import Task
from hybrid_sleep.eval.tasks.accuracy import Accuracy, Auto, check_depths, measure_accuracy
from hybrid_sleep.validation import check_count

SPLIT = "test"
TOLERANCES = (0.3, 0.1, 0.03)


def measure_depth(
    model: Any,
    task: Task,
    depths: Iterable[int] = range(1, 9),
    count: int = 2000,
    seed: int = 0,
    batch_size: int = 250,
    progress: Callable[[int, int], None] | None = None,
    split: str = SPLIT,
) -> dict[int, Accuracy]:
    """Accuracy of `model` on `count` examples of `task` at each depth, in ascending order.

    The examples are those of (`split`, `seed`), the same at every depth. `progress(done, total)` is
    called after every forward; the units are passes over an example. The model is put in eval
    mode and left as it was found. Raises ValueError for depths that are not distinct integers of
    at least 1, or a count or batch size below 1.
    """
    depths = check_depths(depths)
    batches = _batches(task, split, count, seed, batch_size)
    done, total = 0, count * sum(depths)

    def step(passes: int) -> None:
        nonlocal done
        done += passes
        if progress is not None:
            progress(done, total)

    # The first call pays for allocations and caches that belong to no depth.
    measure_accuracy(model, task, batches[:1], [1])
    return measure_accuracy(model, task, batches, depths, progress=step)


def measure_auto(
    model: Any,
    task: Task,
    tolerances: Sequence[float] = TOLERANCES,
    *,
    max_passes: int,
    count: int = 2000,
    seed: int = 0,
    batch_size: int = 250,
) -> dict[float, Accuracy]:
    """Accuracy with `passes="auto"` at each tolerance, on the examples of `measure_depth`.

    A row's sleep ends with the pass that changes its fast weights by less than the tolerance
    (relative), at the latest after `max_passes` passes. Raises ValueError for a model none of whose
    looped layers has fast weights.
    """
    batches = _batches(task, SPLIT, count, seed, batch_size)
    depths = [Auto(tolerance, max_passes) for tolerance in tolerances]
    measured = measure_accuracy(model, task, batches, depths)
    return {depth.tolerance: measured[depth] for depth in depths}


def _batches(
    task: Task, split: str, count: int, seed: int, batch_size: int
) -> list[list[dict[str, Any]]]:
    check_count("count", count)
    check_count("batch_size", batch_size)
    check_count("seed", seed, 0)
    examples = list(task.examples(split, seed, count))
    return [examples[start : start + batch_size] for start in range(0, count, batch_size)]
