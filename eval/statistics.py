"""Intervals of what is measured a few times."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

Z95 = 1.959963984540054
# Two-sided 95 % quantiles of Student's t for 1, 2, 3... degrees of freedom.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share seen in `count` independent trials."""
    centre = share + Z95**2 / (2 * count)
    spread = Z95 * sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    # At 0 and 1 the bound is exact; rounding must not push it outside.
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def over_seeds(shares: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of shares, one a seed, by Student's t, cut at 0 and 1.

    None for one seed, which says nothing about others. Three seeds make it wide, as it should be.
    """
    count = len(shares)
    if count < 2:
        return None
    t = T95[count - 2] if count - 1 <= len(T95) else Z95 + 2.4 / (count - 1)
    reach = t * stdev(shares) / sqrt(count)
    return max(0.0, mean(shares) - reach), min(1.0, mean(shares) + reach)
