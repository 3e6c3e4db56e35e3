"""Accuracy where each row of a batch sleeps as deep as its own fast weights still move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_sleep.eval.depth import SPLIT
from hybrid_sleep.eval.tasks import Task
from hybrid_sleep.eval.tasks.accuracy import Auto, measure_accuracy
from hybrid_sleep.support.io import keyed
from hybrid_sleep.validation import check_count

TOLERANCES = (0.3, 0.1, 0.03)


def measure_adaptive(
    model: Any,
    task: Task,
    tolerances: Sequence[float] = TOLERANCES,
    *,
    deepest: int,
    count: int = 2000,
    seed: int = 0,
    batch_size: int = 250,
) -> list[dict[str, Any]]:
    """`passes="auto"` at each tolerance: `per_question`, `by_difficulty` and mean `passes`.

    A row's sleep ends with the pass that changes its fast weights by less than `tolerance`
    (relative), at the latest after `deepest` passes. The examples are those of `measure_depth`.
    Raises ValueError for a model none of whose looped layers has fast weights.
    """
    check_count("count", count)
    check_count("batch_size", batch_size)
    examples = list(task.examples(SPLIT, seed, count))
    batches = [examples[start : start + batch_size] for start in range(0, count, batch_size)]
    depths = [Auto(tolerance, deepest) for tolerance in tolerances]
    measured = measure_accuracy(model, task, batches, depths)
    return [
        {
            "tolerance": depth.tolerance,
            "per_question": accuracy.per_question,
            "by_difficulty": keyed(accuracy.by_difficulty),
            "passes": accuracy.passes,
        }
        for depth, accuracy in measured.items()
    ]
