"""How deep to sleep at each training step: a fixed depth, or one drawn at random."""

from __future__ import annotations

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_sleep.training.schedules import check_starts, stage_at
from hybrid_sleep.validation import check_count, check_number

FORMS = (
    "an integer of at least 1, {uniform: [low, high]}, {choice: {depth: weight, ...}}, "
    "{lognormal_poisson: {mean: m, sigma: s, max: n}}, {by_difficulty: {difficulty: depth, ...}}, "
    "{at_once: {depth: difficulties, ...}} or {stages: {0: policy, step: policy, ...}}"
)
MAX_SIGMA = 4
DEEPEST = 2000  # of a range that is drawn from: a depth's probability is worked out for each


Difficulties = tuple[int, ...]
Drawn = int | tuple[int, ...]  # the depth of a step, or of each group of its rows


class DepthPolicy(ABC):
    """A distribution over sleep depths (`sleep_passes`, N >= 1), or one for each stage of a run.

    `draw(seed, step)` depends on nothing but its arguments and the policy, so that every rank and
    every resumed run trains a step at the same depth.
    """

    def draw(self, seed: int, step: int) -> Drawn:
        """The depth of training step `step` (0 for the first).

        A tuple: one depth for each group of its rows, as a model's forward takes them.
        """
        u = _uniform(seed, step)
        total = 0.0
        depths = self.at(step).probabilities()
        for depth, probability in depths.items():
            total += probability
            if u < total:
                return depth
        return depth  # `total` may end a rounding error below 1

    def at(self, step: int) -> DepthPolicy:
        """The policy that training step `step` draws from."""
        return self

    def asked(self, seed: int, step: int) -> tuple[Difficulties | None, ...]:
        """The difficulties of training step `step`, for each group of its rows; None: any."""
        return (None,)

    def difficulties(self) -> tuple[tuple[Difficulties, ...], ...]:
        """All that `asked` ever gives, each once, where it does not give None."""
        return ()

    @abstractmethod
    def probabilities(self) -> dict[int, float]:
        """Probability of each depth (in the last stage), ascending; they sum to 1."""

    def depths(self) -> tuple[int, ...]:
        """Every depth that is ever drawn (in any stage), ascending."""
        return tuple(self.probabilities())

    @abstractmethod
    def to_config(self) -> Any:
        """What `parse_depth` turns back into this policy."""

    @property
    def deepest(self) -> int:
        """The largest depth that is ever drawn."""
        return self.depths()[-1]

    @property
    def mean(self) -> float:
        """The expected depth (in the last stage): the average passes over a sleeping window."""
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
        _check_deepest("uniform high", self.high)

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
            raise ValueError("sleep_passes.choice must have a depth: weight at least, got none")
        for depth, weight in self.weights:
            check_count("sleep_passes.choice depth", depth)
            check_number(f"sleep_passes.choice weight of depth {depth}", weight, above=0)
        object.__setattr__(self, "weights", tuple(sorted(self.weights)))

    def probabilities(self) -> dict[int, float]:
        total = sum(weight for _, weight in self.weights)
        return {depth: weight / total for depth, weight in self.weights}

    def to_config(self) -> dict[str, dict[int, float]]:
        return {"choice": dict(self.weights)}


@dataclass(frozen=True)
class ByDifficulty(DepthPolicy):
    """`depths_of`: pairs of difficulty and depth (>= 1). A step has examples of one difficulty.

    Difficulties are drawn equally often. What a difficulty is, the task says: steps, hops, op.
    """

    depths_of: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.depths_of:
            raise ValueError(
                "sleep_passes.by_difficulty must have a difficulty: depth at least, got none"
            )
        for difficulty, depth in self.depths_of:
            check_count("sleep_passes.by_difficulty difficulty", difficulty, minimum=0)
            check_count(f"sleep_passes.by_difficulty depth of {difficulty}", depth)
        object.__setattr__(self, "depths_of", tuple(sorted(self.depths_of)))

    def asked(self, seed: int, step: int) -> tuple[Difficulties | None, ...]:
        return ((self._pair(seed, step)[0],),)

    def difficulties(self) -> tuple[tuple[Difficulties, ...], ...]:
        return tuple(((difficulty,),) for difficulty, _ in self.depths_of)

    def draw(self, seed: int, step: int) -> int:
        return self._pair(seed, step)[1]

    def _pair(self, seed: int, step: int) -> tuple[int, int]:
        return self.depths_of[int(_uniform(seed, step) * len(self.depths_of))]

    def probabilities(self) -> dict[int, float]:
        return _shares([depth for _, depth in self.depths_of])

    def to_config(self) -> dict[str, dict[int, int]]:
        return {"by_difficulty": dict(self.depths_of)}


@dataclass(frozen=True)
class AtOnce(DepthPolicy):
    """A step has groups of rows, each with a depth (>= 1), with the same contexts one below other.

    `asked_at`: pairs of depth and the difficulties that a group is asked for; a depth may have
    several groups. So every pass has a loss of its own, which says what it should know by then;
    where the groups begin with the same window, its passes run once for all of them.
    """

    asked_at: tuple[tuple[int, Difficulties], ...]

    def __post_init__(self) -> None:
        if not self.asked_at:
            raise ValueError("sleep_passes.at_once must have a depth: difficulties, got none")
        pairs = []
        for depth, difficulties in self.asked_at:
            check_count("sleep_passes.at_once depth", depth)
            if not difficulties or len({*difficulties}) < len(difficulties):
                raise ValueError(
                    f"sleep_passes.at_once difficulties of depth {depth} must be one or several "
                    f"different ones, got {list(difficulties)}"
                )
            for difficulty in difficulties:
                check_count(f"sleep_passes.at_once difficulty of depth {depth}", difficulty, 0)
            pairs.append((depth, tuple(sorted(difficulties))))
        object.__setattr__(self, "asked_at", tuple(sorted(pairs)))

    def draw(self, seed: int, step: int) -> Drawn:
        depths = tuple(depth for depth, _ in self.asked_at)
        return depths if len(depths) > 1 else depths[0]

    def asked(self, seed: int, step: int) -> tuple[Difficulties, ...]:
        return tuple(difficulties for _, difficulties in self.asked_at)

    def difficulties(self) -> tuple[tuple[Difficulties, ...], ...]:
        return (self.asked(0, 0),)

    def probabilities(self) -> dict[int, float]:
        return _shares([depth for depth, _ in self.asked_at])

    def to_config(self) -> dict[str, dict[int, Any]]:
        groups: dict[int, list[list[int]]] = {}
        for depth, asked in self.asked_at:
            groups.setdefault(depth, []).append(list(asked))
        return {"at_once": {depth: _shortest(asked) for depth, asked in groups.items()}}


@dataclass(frozen=True)
class LognormalPoisson(DepthPolicy):
    """Depth 1 + Poisson(rate), rate ~ LogNormal(ln(target - 1) - sigma^2 / 2, sigma).

    The sampler of recurrent-depth training (Geiping et al., arXiv 2502.05171), whose median lies
    below its mean and whose tail is long. `target` (1 < target <= highest) is its mean depth before
    depths above `highest` are left out and the rest scaled to sum to 1; `mean` is the one after.
    0 <= sigma <= 4; at 0 the rate is constant.
    """

    target: float
    sigma: float
    highest: int

    def __post_init__(self) -> None:
        check_count("sleep_passes.lognormal_poisson max", self.highest)
        _check_deepest("lognormal_poisson max", self.highest)
        check_number("sleep_passes.lognormal_poisson mean", self.target, above=1)
        check_number("sleep_passes.lognormal_poisson sigma", self.sigma, least=0)
        for name, value, most in (
            ("mean", self.target, self.highest), ("sigma", self.sigma, MAX_SIGMA)
        ):  # fmt: skip
            if value > most:
                raise ValueError(
                    f"sleep_passes.lognormal_poisson {name} must be at most {most}, got {value!r}"
                )

    def probabilities(self) -> dict[int, float]:
        shares = _lognormal_poisson(self.target, self.sigma, self.highest)
        return dict(enumerate(shares, start=1))

    def to_config(self) -> dict[str, dict[str, float]]:
        detail = {"mean": self.target, "sigma": self.sigma, "max": self.highest}
        return {"lognormal_poisson": detail}


@dataclass(frozen=True)
class Stages(DepthPolicy):
    """A curriculum: `stages` of (first step, policy), the first at step 0.

    `probabilities` and `mean` are the last stage's; `depths` and `deepest` cover all of them.
    """

    stages: tuple[tuple[int, DepthPolicy], ...]

    def __post_init__(self) -> None:
        check_starts("sleep_passes.stages", (start for start, _ in self.stages))
        for start, policy in self.stages:
            if isinstance(policy, Stages):
                raise ValueError(
                    f"sleep_passes.stages at step {start} must be another policy, got stages again"
                )

    def at(self, step: int) -> DepthPolicy:
        return stage_at(self.stages, step)

    def draw(self, seed: int, step: int) -> Drawn:
        return self.at(step).draw(seed, step)

    def asked(self, seed: int, step: int) -> tuple[Difficulties | None, ...]:
        return self.at(step).asked(seed, step)

    def difficulties(self) -> tuple[tuple[Difficulties, ...], ...]:
        return tuple({d: None for _, policy in self.stages for d in policy.difficulties()})

    def probabilities(self) -> dict[int, float]:
        return self.stages[-1][1].probabilities()

    def depths(self) -> tuple[int, ...]:
        return tuple(sorted({depth for _, policy in self.stages for depth in policy.depths()}))

    def to_config(self) -> dict[str, dict[int, Any]]:
        return {"stages": {start: policy.to_config() for start, policy in self.stages}}


def parse_depth(value: Any) -> DepthPolicy:
    """The policy a run config names, one of `FORMS`, such as `2` or `{uniform: [1, 4]}`.

    A policy is returned as it is. Raises ValueError naming the key, its value and what is allowed.
    """
    if isinstance(value, DepthPolicy):
        return value
    if isinstance(value, int):
        return Fixed(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"sleep_passes must be {FORMS}, got {value!r}")
    if len(value) != 1 or next(iter(value)) not in _PARSERS:
        raise ValueError(f"sleep_passes must be {FORMS}, got {dict(value)!r}")
    ((kind, detail),) = value.items()
    return _PARSERS[kind](detail)


def depths_of(drawn: Drawn, together: int = 1) -> tuple[int, ...]:
    """The depth of each group of a step's rows; `together` groups have each that was drawn."""
    depths = (drawn,) if isinstance(drawn, int) else drawn
    return tuple(depth for depth in depths for _ in range(together))


def _shares(depths: list[int]) -> dict[int, float]:
    """How often each depth occurs, ascending, of all."""
    return {depth: depths.count(depth) / len(depths) for depth in sorted(set(depths))}


def in_words(depth: Drawn) -> str:
    """A depth that `draw` gave, `4` or `1, 2, 4 at once`."""
    if isinstance(depth, int):
        return f"{depth}"
    return f"{', '.join(map(str, dict.fromkeys(depth)))} at once"


def _parse_uniform(detail: Any) -> Uniform:
    if not isinstance(detail, (list, tuple)) or len(detail) != 2:
        raise ValueError(f"sleep_passes.uniform must be [low, high], got {detail!r}")
    return Uniform(*detail)


def _parse_choice(detail: Any) -> Choice:
    if not isinstance(detail, Mapping):
        raise ValueError(f"sleep_passes.choice must be {{depth: weight, ...}}, got {detail!r}")
    return Choice(tuple(detail.items()))


def _parse_by_difficulty(detail: Any) -> ByDifficulty:
    if not isinstance(detail, Mapping):
        raise ValueError(
            f"sleep_passes.by_difficulty must be {{difficulty: depth, ...}}, got {detail!r}"
        )
    return ByDifficulty(tuple(detail.items()))


def _parse_at_once(detail: Any) -> AtOnce:
    if not isinstance(detail, Mapping):
        raise ValueError(
            "sleep_passes.at_once must be {depth: difficulty, a list of them or of lists, ...}, "
            f"got {detail!r}"
        )
    pairs = []
    for depth, asked in detail.items():
        groups = asked if _listed(asked) and any(map(_listed, asked)) else [asked]
        pairs += [(depth, tuple(group) if _listed(group) else (group,)) for group in groups]
    return AtOnce(tuple(pairs))


def _listed(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _shortest(groups: list[list[int]]) -> int | list[int] | list[list[int]]:
    """What `_parse_at_once` reads as these groups of one depth."""
    if len(groups) > 1:
        return groups
    return groups[0][0] if len(groups[0]) == 1 else groups[0]


def _parse_lognormal_poisson(detail: Any) -> LognormalPoisson:
    if not isinstance(detail, Mapping) or set(detail) != {"mean", "sigma", "max"}:
        raise ValueError(
            "sleep_passes.lognormal_poisson must be {mean: m, sigma: s, max: n}, got "
            f"{detail!r}"
        )
    return LognormalPoisson(detail["mean"], detail["sigma"], detail["max"])


def _parse_stages(detail: Any) -> Stages:
    if not isinstance(detail, Mapping):
        raise ValueError(f"sleep_passes.stages must be {{0: policy, step: policy}}, got {detail!r}")
    stages = []
    for start, value in detail.items():
        try:
            stages.append((start, parse_depth(value)))
        except ValueError as error:
            raise ValueError(f"sleep_passes.stages at step {start}: {error}") from None
    return Stages(tuple(stages))


_PARSERS = {
    "uniform": _parse_uniform,
    "choice": _parse_choice,
    "by_difficulty": _parse_by_difficulty,
    "at_once": _parse_at_once,
    "lognormal_poisson": _parse_lognormal_poisson,
    "stages": _parse_stages,
}


@functools.lru_cache(maxsize=32)
def _lognormal_poisson(target: float, sigma: float, highest: int) -> tuple[float, ...]:
    """Probabilities of the depths 1..highest: a trapezoidal sum over the normal variable.

    The integrand and all its derivatives vanish at both ends, so the error falls exponentially with
    the number of points in its narrowest part, which is 1 / (sigma sqrt(highest)) wide.
    """
    per_unit = max(32, math.ceil(2 * sigma * math.sqrt(highest)))
    end = 9 * per_unit  # beyond 9 lie 2e-19 of the normal distribution
    points = [i / per_unit for i in range(-end, end + 1)]
    if sigma == 0:
        points = [0.0]
    logs = [math.log(target - 1) - sigma**2 / 2 + sigma * z for z in points]
    weights = [math.exp(-z * z / 2) for z in points]
    shares = []
    for count in range(highest):
        constant = math.lgamma(count + 1)
        terms = (
            weight * math.exp(count * log - math.exp(log) - constant)
            for log, weight in zip(logs, weights, strict=True)
        )
        shares.append(math.fsum(terms))
    total = math.fsum(shares)
    return tuple(share / total for share in shares)


def _check_deepest(name: str, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"sleep_passes.{name} must be at most {DEEPEST}, got {depth}")


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) for (seed, step), the same on every machine and in every version."""
    digest = hashlib.blake2b(f"depth {seed} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53
