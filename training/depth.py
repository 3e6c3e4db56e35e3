"""How deep to sleep at each training step: a fixed depth, or one drawn at random."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_sleep.configuration import check_count

FORMS = "an integer >= 1, {uniform: [low, high]} or {choice: {depth: weight, ...}}"


class DepthPolicy(ABC):
    """A distribution over sleep depths (`sleep_passes`, N >= 1).

    `draw(seed, step)` depends on nothing but its arguments and the policy, so that every rank and
    every resumed run trains a step at the same depth.
    """

    def draw(self, seed: int, step: int) -> int:
        """The depth of training step `step` (0 for the first)."""
        u = _uniform(seed, step)
        total = 0.0
        depths = self.probabilities()
        for depth, probability in depths.items():
            total += probability
            if u < total:
                return depth
        return depth  # `total` may end a rounding error below 1

    @abstractmethod
    def probabilities(self) -> dict[int, float]:
        """Probability of each depth, ascending; they sum to 1."""

    @abstractmethod
    def to_config(self) -> Any:
        """What `parse_depth` turns back into this policy."""

    @property
    def deepest(self) -> int:
        """The largest depth that is ever drawn."""
        return max(self.probabilities())

    @property
    def mean(self) -> float:
        """The expected depth: the average passes over a sleeping window."""
        return sum(depth * share for depth, share in self.probabilities().items())


@dataclass(frozen=True)
class Fixed(DepthPolicy):
    """Always `passes` >= 1."""

    passes: int

    def __post_init__(self) -> None:
        check_count("sleep_passes", self.passes)

    def probabilities(self) -> dict[int, float]:
        return {self.passes: 1.0}

    def to_config(self) -> int:
        return self.passes


@dataclass(frozen=True)
class Uniform(DepthPolicy):
    """Each of `low`..`high` (both included, 1 <= low <= high) equally often."""

    low: int
    high: int

    def __post_init__(self) -> None:
        check_count("sleep_passes.uniform low", self.low)
        check_count("sleep_passes.uniform high", self.high, minimum=self.low)

    def probabilities(self) -> dict[int, float]:
        depths = range(self.low, self.high + 1)
        return {depth: 1 / len(depths) for depth in depths}

    def to_config(self) -> dict[str, list[int]]:
        return {"uniform": [self.low, self.high]}


@dataclass(frozen=True)
class Choice(DepthPolicy):
    """`weights`: depth (>= 1) and its weight (> 0), pairs; weights need not sum to 1."""

    weights: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("sleep_passes.choice is empty; allowed: at least one depth: weight")
        for depth, weight in self.weights:
            check_count("sleep_passes.choice depth", depth)
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight <= 0:
                raise ValueError(
                    f"sleep_passes.choice weight of depth {depth} is {weight!r}; allowed: a finite "
                    "number > 0 (leave a depth out to never draw it)"
                )
        object.__setattr__(self, "weights", tuple(sorted(self.weights)))

    def probabilities(self) -> dict[int, float]:
        total = sum(weight for _, weight in self.weights)
        return {depth: weight / total for depth, weight in self.weights}

    def to_config(self) -> dict[str, dict[int, float]]:
        return {"choice": dict(self.weights)}


def parse_depth(value: Any) -> DepthPolicy:
    """The policy a run config names: `2`, `{uniform: [1, 4]}` or `{choice: {1: 0.25, 4: 0.75}}`.

    A policy is returned as it is. Raises ValueError naming the key, its value and what is allowed.
    """
    if isinstance(value, DepthPolicy):
        return value
    if not isinstance(value, Mapping):
        if isinstance(value, int):
            return Fixed(value)
        raise ValueError(f"sleep_passes={value!r}; allowed: {FORMS}")
    if len(value) != 1 or next(iter(value)) not in ("uniform", "choice"):
        raise ValueError(f"sleep_passes={dict(value)!r}; allowed: {FORMS}")
    ((kind, detail),) = value.items()
    if kind == "uniform":
        if not isinstance(detail, (list, tuple)) or len(detail) != 2:
            raise ValueError(f"sleep_passes.uniform={detail!r}; allowed: [low, high]")
        return Uniform(*detail)
    if not isinstance(detail, Mapping):
        raise ValueError(f"sleep_passes.choice={detail!r}; allowed: {{depth: weight, ...}}")
    return Choice(tuple(detail.items()))


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) for (seed, step), the same on every machine and in every version."""
    digest = hashlib.blake2b(f"depth {seed} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53
