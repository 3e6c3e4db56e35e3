"""What of a buffer a sleep is over: neither known already nor noise, and of no source too much."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_sleep.parametric.experience.experience import Kept, check_share
from hybrid_sleep.validation import check_count, check_number

BAND = (20.0, 95.0)


@dataclass(frozen=True)
class Candidate:
    """What of an experience decides whether it is chosen."""

    id: int
    source: str
    kind: str
    tokens: int
    percentile: float


@dataclass(frozen=True)
class Chosen:
    """Experiences for a sleep, their weights in the mean of the loss, and why others are not there.

    weights: one for each, for sum(w l) / sum(w). tokens: of all. left_out: how many, by reason.
    """

    experiences: tuple[Kept, ...]
    weights: tuple[float, ...]
    tokens: int
    left_out: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without what the experiences say."""
        return {
            "ids": [kept.id for kept in self.experiences],
            "kinds": dict(Counter(kept.experience.kind for kept in self.experiences)),
            "tokens": self.tokens,
            "left_out": self.left_out,
        }


def percentiles(values: Sequence[float]) -> list[float]:
    """Of each value the share below it and half of that equal to it, times 100."""
    ranked, counts = sorted(values), Counter(values)
    below: dict[float, int] = {}
    for place, value in enumerate(ranked):
        below.setdefault(value, place)
    return [100 * (below[value] + counts[value] / 2) / len(values) for value in values]


def choose(
    candidates: Sequence[Candidate],
    tokens: int,
    *,
    seed: int = 0,
    band: tuple[float, float] = BAND,
    share: float = 0.5,
    known: Callable[[int], bool] = lambda number: False,
) -> tuple[list[int], dict[str, int]]:
    """Ids of at most `tokens` tokens in all, in a random order by `seed`; and how many are not.

    band: percentiles of surprise within which an experience is learned from. What is below is known
    already, what is above is mostly noise; a correction always is within: it surprises because the
    model was wrong. share: of `tokens` that a source may have, or an equal part where there are so
    few sources that they could not fill them. known: whether one says what was chosen before.

    Raises ValueError for what is out of range.
    """
    check_count("tokens", tokens)
    check_share(share)
    low, high = band
    if not check_number("band[0]", low, least=0) <= check_number("band[1]", high) <= 100:
        raise ValueError(f"band must be two rising percentiles of 0 to 100, got {band!r}")
    left_out: Counter[str] = Counter()
    within = []
    for one in sorted(candidates, key=lambda x: x.id):
        if one.kind != "correction" and one.percentile < low:
            left_out["known already"] += 1
        elif one.kind != "correction" and one.percentile > high:
            left_out["too surprising"] += 1
        else:
            within.append(one)
    cap = tokens * max(share, 1 / max(1, len({one.source for one in within})))
    random.Random(seed).shuffle(within)
    taken: list[int] = []
    by_source: Counter[str] = Counter()
    for one in within:
        if by_source.total() + one.tokens > tokens:
            left_out["more than the tokens"] += 1
        elif by_source[one.source] + one.tokens > cap:
            left_out["more than the share of its source"] += 1
        elif known(one.id):
            left_out["a duplicate"] += 1
        else:
            taken.append(one.id)
            by_source[one.source] += one.tokens
    return taken, dict(left_out)
