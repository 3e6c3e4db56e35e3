"""What a model keeps while it learns task after task, from one matrix of scores.

`R[i][j]` is the score on task j after i tasks were learned, row 0 before any; higher is better.
Tasks are counted from 0 in code, so task j is learned in row j + 1. T is the number of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

# A share of almost nothing says nothing.
LEAST_LEARNED = 0.01


@dataclass(frozen=True)
class Scores:
    """The matrix R, `[T + 1][T]` with T >= 2, all finite; ValueError otherwise."""

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        tasks = len(self.rows) - 1
        if tasks < 2:
            raise ValueError(
                "rows must be one before any task and one behind each of at least 2, got "
                f"{len(self.rows)}"
            )
        for i, row in enumerate(self.rows):
            _check(f"rows[{i}]", row, tasks)

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> Scores:
        """From any sequences of numbers."""
        return cls(tuple(tuple(row) for row in rows))

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.rows) - 1

    @property
    def learned(self) -> list[float]:
        """Of every task, right behind it."""
        return [self.rows[j + 1][j] for j in range(self.tasks)]

    @property
    def average(self) -> float:
        """ACC, the mean of the last row (Lopez-Paz and Ranzato, arXiv 1706.08840, Eq. 2)."""
        return mean(self.rows[-1])

    @property
    def learning(self) -> float:
        """Learning accuracy: the mean over tasks right behind each (arXiv 1810.11910).

        It is what plasticity is compared by.
        """
        return mean(self.learned)

    @property
    def backward_transfer(self) -> float:
        """BWT: what was learned later did to earlier tasks, the last task aside; < 0 is forgetting
        (arXiv 1706.08840, Eq. 3).
        """
        pairs = zip(self.rows[-1][:-1], self.learned[:-1], strict=True)
        return mean(last - first for last, first in pairs)

    def forward_transfer(self, floor: Sequence[float]) -> float:
        """FWT: how much better than `floor` a task goes right before it is learned, the first task
        aside (arXiv 1706.08840, Eq. 4).

        floor: `[T]`, of a model that knows nothing, such as one that was just initialised.
        """
        _check("floor", floor, self.tasks)
        return mean(self.rows[j][j] - floor[j] for j in range(1, self.tasks))

    @property
    def forgetting_from_best(self) -> float:
        """The best score that a task ever had, from the row behind it to the last but one, minus
        its last, the last task aside (Chaudhry et al., arXiv 1801.10112).

        Maximum minus last, as in mammoth; < 0 where the last is the best.
        """
        last = self.rows[-1]
        return mean(
            max(row[j] for row in self.rows[j + 1 : -1]) - last[j] for j in range(self.tasks - 1)
        )

    @property
    def forgetting_from_learned(self) -> float:
        """The score right behind a task minus its last, the last task aside: Avalanche's
        forgetting, and minus BWT.
        """
        return -self.backward_transfer

    def intransigence(self, joint: Sequence[float]) -> float:
        """How much less than a model that learned jointly a model scores right behind each task
        (arXiv 1801.10112).

        joint: `[T]`, on task j of a model trained on tasks 0 to j together.
        """
        _check("joint", joint, self.tasks)
        return mean(best - own for best, own in zip(joint, self.learned, strict=True))

    def retention(self, floor: Sequence[float] | None = None) -> list[float | None]:
        """Of each task the share of what was learned that is left at the end.

        floor: `[T]`, what nobody had to learn, taken off both; None: 0. None stands for a task of
        which less than `LEAST_LEARNED` was learned.
        """
        floor = [0.0] * self.tasks if floor is None else floor
        _check("floor", floor, self.tasks)
        return [
            (last - least) / (first - least) if first - least >= LEAST_LEARNED else None
            for last, first, least in zip(self.rows[-1], self.learned, floor, strict=True)
        ]

    def minimum(self, during: Sequence[Sequence[float]]) -> float:
        """min-ACC: the lowest score that a task had at any time after it was learned, the last
        task aside (De Lange et al., arXiv 2205.13452).

        during: of every task, or of all but the last, its scores at moments within later sleeps;
        the rows behind them count as well. Measured between sleeps alone, the gap is not seen.
        """
        if len(during) not in (self.tasks - 1, self.tasks):
            raise ValueError(
                f"during must be of {self.tasks - 1} tasks, or {self.tasks} with the last, got "
                f"{len(during)}"
            )
        for j, scores in enumerate(during):
            _check(f"during[{j}]", scores, len(scores))
        return mean(
            min([*during[j], *(row[j] for row in self.rows[j + 2 :])])
            for j in range(self.tasks - 1)
        )

    def worst_case(self, during: Sequence[Sequence[float]]) -> float:
        """WC-ACC: `1/T * score of the last task + (1 - 1/T) * min-ACC` (arXiv 2205.13452).

        during: see `minimum`.
        """
        share = 1 / self.tasks
        return share * self.rows[-1][-1] + (1 - share) * self.minimum(during)

    def summary(
        self,
        *,
        floor: Sequence[float] | None = None,
        joint: Sequence[float] | None = None,
        during: Sequence[Sequence[float]] | None = None,
    ) -> dict[str, Any]:
        """All of them, by name; those that need what was not given are left out."""
        found: dict[str, Any] = {
            "average": self.average,
            "learning": self.learning,
            "backward_transfer": self.backward_transfer,
            "forgetting_from_best": self.forgetting_from_best,
            "forgetting_from_learned": self.forgetting_from_learned,
            "retention": self.retention(floor),
        }
        if floor is not None:
            found["forward_transfer"] = self.forward_transfer(floor)
        if joint is not None:
            found["intransigence"] = self.intransigence(joint)
        if during is not None:
            found["minimum"] = self.minimum(during)
            found["worst_case"] = self.worst_case(during)
        return found


def _check(name: str, scores: Sequence[float], count: int) -> None:
    """Raise ValueError naming `name` unless it is `count` finite numbers."""
    numbers = all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in scores
    )
    if len(scores) != count or not numbers:
        raise ValueError(f"{name} must be {count} finite numbers, got {list(scores)!r}")
