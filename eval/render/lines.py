"""A line over seeds: means, with bars from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybrid_sleep.eval.measure.statistics import Seeds
from hybrid_sleep.support.plots import STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def seeds_line(
    axes: Axes, places: Sequence[int], shares: Sequence[Seeds], index: int, of: int, label: str
) -> None:
    """Line `index` of `of` at `places`, each moved by its `shift`."""
    color, marker, line = STYLES[index % len(STYLES)]
    aside = shift(index, of)
    axes.errorbar(
        [place + aside for place in places], [share.mean for share in shares],
        yerr=[
            [share.mean - share.lowest for share in shares],
            [share.highest - share.mean for share in shares],
        ],
        color=color, marker=marker, linestyle=line, markersize=7, linewidth=2, capsize=3,
        label=label,
    )  # fmt: skip


def shift(index: int, of: int) -> float:
    """How far mark `index` of `of` stands aside, so that their bars do not hide each other."""
    return 0.05 * (index - (of - 1) / 2)
