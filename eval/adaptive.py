"""Accuracy where each row of a batch sleeps as deep as its own fast weights still move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_sleep.eval.depth import SPLIT
from hybrid_sleep.eval.tasks import Task
from hybrid_sleep.support.io import keyed

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
    import torch

    from hybrid_sleep.sleep.algorithm import check_passes

    check_passes("auto", model.config)
    examples = list(task.examples(SPLIT, seed, count))
    device = next(model.parameters()).device
    tokens = torch.tensor([example["input_ids"] for example in examples]).to(device)
    training = model.training
    model.eval()
    found = []
    try:
        for tolerance in tolerances:
            chosen, passes = [], []
            for rows in tokens.split(batch_size):
                guesses, depths = _read(model, rows[:, :-1], tolerance, deepest)
                chosen.append(torch.nn.functional.pad(guesses, (1, 0), value=-1))
                passes += depths
            score = task.score(torch.cat(chosen).cpu(), examples)
            found.append(
                {
                    "tolerance": tolerance,
                    "per_question": score["per_question"],
                    "by_difficulty": keyed(score["by_difficulty"]),
                    "passes": sum(passes) / len(passes) if passes else 1.0,
                }
            )
    finally:
        model.train(training)
    return found


def _read(model: Any, tokens: Any, tolerance: float, deepest: int) -> tuple[Any, list[int]]:
    """The choices behind each of `tokens` [B, T], and how deep each row slept at each boundary."""
    import torch

    from hybrid_sleep import SleepCache

    cache, guesses, depths = SleepCache(model.config), [], []
    with torch.no_grad():
        for part in tokens.split(model.config.window, dim=1):
            if guesses:
                report = model.sleep(cache, passes="auto", tol=tolerance, max_passes=deepest)
                depths += report.passes_by_row
            guesses.append(model(part, cache=cache).logits.argmax(-1))
    return torch.cat(guesses, dim=1), depths
