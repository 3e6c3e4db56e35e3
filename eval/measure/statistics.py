"""Shares that are measured a few times: their intervals, and what counts as a difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

CONFIDENCE = 0.95
Z95 = 1.959963984540054  # the normal distribution's two-sided 95 % quantile
# Two accuracies that differ by less are called the same, whatever their seeds say.
NO_DIFFERENCE = 0.02


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share seen in `count` independent trials."""
    from scipy.stats import binomtest

    found = binomtest(round(share * count), count).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def over_seeds(shares: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of shares, one a seed, by Student's t, cut at 0 and 1.

    None for one seed, which says nothing about others. Three seeds make it wide, as it should be.
    """
    from scipy.stats import t

    count = len(shares)
    if count < 2:
        return None
    reach = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stdev(shares) / sqrt(count)
    return max(0.0, mean(shares) - reach), min(1.0, mean(shares) + reach)


@dataclass(frozen=True)
class Seeds:
    """The same share for several seeds of a recipe, 0..1 each."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def highest(self) -> float:
        return max(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """See `over_seeds`."""
        return over_seeds(self.values)


@dataclass(frozen=True)
class Gap:
    """How much more one model scores than another, seed by seed: what seeds share, such as data
    and first weights, drops out of it."""

    mean: float
    lowest: float
    highest: float

    @classmethod
    def between(cls, one: Mapping[int, float], other: Mapping[int, float]) -> Gap | None:
        """That of `one` to `other`, both by seed; None if no seed is in both."""
        gaps = [share - other[seed] for seed, share in one.items() if seed in other]
        return cls(mean(gaps), min(gaps), max(gaps)) if gaps else None

    @property
    def agreed(self) -> bool:
        """Whether every seed says the same of who is ahead."""
        return self.lowest > 0 or self.highest < 0

    @property
    def small(self) -> bool:
        """Whether it is below `NO_DIFFERENCE` for every seed."""
        return max(-self.lowest, self.highest) < NO_DIFFERENCE


def best_depth(accuracy: Mapping[int, float]) -> int:
    """The smallest depth with the highest accuracy."""
    return max(sorted(accuracy), key=lambda depth: accuracy[depth])


def over_questions(shares: Mapping[int, float], questions: Mapping[int, int]) -> float:
    """The share of all questions, from that of each difficulty and how many there were of it."""
    total = sum(questions.values())
    return sum(shares[level] * count for level, count in questions.items()) / total
