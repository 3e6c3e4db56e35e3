"""The gate of every parametric sleep: what must hold afterwards, and the way back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from hybrid_sleep.sleep.weights import rollback, snapshot
from hybrid_sleep.validation import check_number


@dataclass(frozen=True)
class Measured:
    """What was measured of a model, shares of 1 unless said; None where it was not.

    recall: facts answered in words used for edits; paraphrase: in held-out words; negation: facts
    whose object completes their negation as well. locality: things that the pristine model knew
    and this one still says. perplexity_ratio: on ordinary text, to the pristine model; calibration:
    by how much its expected calibration error there is above that of the pristine model. acquired:
    held-out questions about an experience that are answered without it. mean_loss, median_loss: of
    the tokens of an experience (nats), without any context; neither is judged. The mean can fall
    while recall falls, the median hardly does (arXiv 2605.24657).
    """

    recall: float | None = None
    paraphrase: float | None = None
    negation: float | None = None
    locality: float | None = None
    perplexity_ratio: float | None = None
    calibration: float | None = None
    acquired: float | None = None
    mean_loss: float | None = None
    median_loss: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Plain data for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Thresholds:
    """The least recall, paraphrase, locality and acquired, the largest negation, perplexity ratio
    and calibration.

    Calibration is bounded by how far it may rise above the pristine model's: an error that one
    model has from the start another never reaches, and a rise over the last sleep alone would let
    ten of them add up. None asks for nothing. Raises ValueError for a bound that is no share, or a
    ratio below 1.
    """

    recall: float | None = 0.95
    paraphrase: float | None = 0.85
    negation: float | None = 0.5
    locality: float | None = 0.97
    perplexity_ratio: float | None = 1.03
    calibration: float | None = 0.05
    acquired: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and f.name == "perplexity_ratio":
                check_number(f.name, value, least=1)
            elif value is not None and check_number(f.name, value, least=0) > 1:
                raise ValueError(f"{f.name} must be at most 1, got {value!r}")


LOWER_IS_BETTER = ("negation", "perplexity_ratio", "calibration")
# What a larger weight of preserved keys costs, rather than mends.
OF_FACTS = ("recall", "paraphrase")
# What a sleep is for: no better than before is not enough.
OWED = ("acquired",)


@dataclass(frozen=True)
class Verdict:
    """Whether a sleep may keep what it did; `failures` name what speaks against it.

    missed: measures that miss their thresholds, those that are no failure, as they were no better
    before, among them.
    """

    before: Measured
    after: Measured
    failures: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Nothing speaks against it."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "failures": list(self.failures),
        }


def judge(before: Measured, after: Measured, thresholds: Thresholds) -> Verdict:
    """A measure fails that misses its threshold and is worse than before.

    One that missed it before already must not keep a sleep from mending the others; but what was
    to be acquired has to be.
    """
    failures, missed = [], []
    for f in fields(thresholds):
        bound, new, old = (getattr(x, f.name) for x in (thresholds, after, before))
        if bound is None or new is None:
            continue
        sign = -1 if f.name in LOWER_IS_BETTER else 1
        if sign * new >= sign * bound:
            continue
        missed.append(f.name)
        if old is None or f.name in OWED or sign * new < sign * old:
            word = "above" if sign < 0 else "below"
            was = "" if old is None else f", {old:.3f} before"
            failures.append(f"{f.name.replace('_', ' ')} {new:.3f} is {word} {bound:g}{was}")
    return Verdict(before, after, tuple(failures), tuple(missed))


class Trial:
    """A change of the weights that may still be taken back; `keep()` makes it stay."""

    def __init__(self) -> None:
        self.kept = False

    def keep(self) -> None:
        """Let the weights stay as they are at the end of the block."""
        self.kept = True


@contextmanager
def trial(model: nn.Module, names: Collection[str]) -> Iterator[Trial]:
    """Change the parameters `names` of `model` inside of the block.

    Unless `keep()` was called they are then what they were before, bit for bit, also after an
    exception or Ctrl-C.
    """
    before, change = snapshot(model, names), Trial()
    try:
        yield change
    finally:
        if not change.kept:
            rollback(model, before)
