"""The scores in a result of lm-eval, each with its interval and what guesses score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_sleep.eval.measure.statistics import Z95, wilson


def scores(
    found: Any,
    floor: Mapping[str, float] | None = None,
    majority: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Each metric of each task in lm-eval's result, and the questions of ours by difficulty.

    floor, majority: of a task of ours, its floor by difficulty (as a text) and its majority by
    metric.
    """
    scores, by_difficulty = [], None
    for name, values in found["results"].items():
        for key, value in values.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or isinstance(value, str):
                continue
            samples = [s[metric] for s in found["samples"].get(name, []) if s["filter"] == kept]
            stderr = values.get(f"{metric}_stderr,{kept}")
            stderr = None if stderr is None or isinstance(stderr, str) else _finite(stderr)
            counts = [x for sample in samples if isinstance(sample, list) for x in sample]
            if counts and metric == "per_question":
                by_difficulty = _by_difficulty(counts)
            if counts:
                stderr = _stderr_of_share(samples)
                samples = [s[0][1] if len(s) == 1 and s[0][2] == 1 else s for s in samples]
            value = _finite(value)
            scores.append(
                {
                    "name": name,
                    "metric": metric,
                    "filter": kept,
                    "value": value,
                    "stderr": stderr,
                    "interval": _interval(value, stderr, samples),
                    "floor": _floor_of(metric, floor or {}, by_difficulty),
                    "majority": (majority or {}).get(metric),
                    "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
                    "documents": values.get("sample_len"),
                    "num_fewshot": found["n-shot"].get(name),
                    "version": found["versions"].get(name),
                }
            )
    return {"scores": scores, "by_difficulty": by_difficulty}


def _by_difficulty(counts: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    levels = sorted({level for level, _, _ in counts})
    of = {level: sum(n for at, _, n in counts if at == level) for level in levels}
    right = {level: sum(r for at, r, _ in counts if at == level) for level in levels}
    return {
        str(level): {"share": right[level] / of[level], "questions": of[level]} for level in levels
    }


def _stderr_of_share(samples: Sequence[Sequence[Sequence[Any]]]) -> float | None:
    """Standard error of (all right) / (all asked) where the examples alone are independent."""
    pairs = [(sum(r for _, r, _ in s), sum(n for _, _, n in s)) for s in samples]
    if len(pairs) < 2:
        return None
    total = sum(n for _, n in pairs)
    share = sum(r for r, _ in pairs) / total
    spread = sum((r - share * n) ** 2 for r, n in pairs) * len(pairs) / (len(pairs) - 1)
    return math.sqrt(spread) / total


def _interval(
    value: float | None, stderr: float | None, samples: Sequence[Any]
) -> list[float] | None:
    """95 %: Wilson's where documents are right or wrong, else from the standard error."""
    if value is None:
        return None
    if samples and all(isinstance(s, (int, float)) and s in (0, 1) for s in samples):
        return list(wilson(value, len(samples)))
    return None if stderr is None else [value - Z95 * stderr, value + Z95 * stderr]


def _floor_of(metric: str, floor: Mapping[str, float], by_difficulty: Any) -> float | None:
    """The floor of all questions: that of each difficulty, as often as it was asked."""
    if metric != "per_question" or not by_difficulty or not by_difficulty.keys() <= floor.keys():
        return None
    asked = {level: part["questions"] for level, part in by_difficulty.items()}
    return sum(floor[level] * n for level, n in asked.items()) / sum(asked.values())


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
