"""When to sleep: how far what was measured is from where facts or the model would suffer."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hybrid_sleep.validation import check_number


@dataclass(frozen=True)
class Limits:
    """The values at which each measure alone asks for a sleep.

    degraded: share of the facts in the weights that an audit found forgotten. load: facts in the
    weights as a share of their cap, below which a sleep prunes them. hours: since the last sleep.
    perplexity_ratio: to the pristine weights on ordinary text, above 1. locality: share of what the
    pristine model knew that it still knows, below 1. nap: the pressure, of 1 for a sleep, at which
    the newest facts are to be audited.

    Raises ValueError for a limit that nothing could stay under.
    """

    degraded: float = 0.1
    load: float = 1.0
    hours: float = 24.0
    perplexity_ratio: float = 1.03
    locality: float = 0.97
    nap: float = 0.5

    def __post_init__(self) -> None:
        for name in ("degraded", "load", "hours", "nap"):
            check_number(name, getattr(self, name), above=0)
        check_number("perplexity_ratio", self.perplexity_ratio, above=1)
        check_number("locality", self.locality, below=1)
        if self.nap > 1:
            raise ValueError(f"nap must be at most 1, where a sleep begins, got {self.nap!r}")


@dataclass(frozen=True)
class Measures:
    """What is known now, see `Limits`; None where it was not measured, which asks for nothing."""

    degraded: float | None = None
    load: float | None = None
    hours: float | None = None
    perplexity_ratio: float | None = None
    locality: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                check_number(field.name, value, least=0)


@dataclass(frozen=True)
class Pressure:
    """value: 1 or more asks for a sleep. driver: the measure it comes from, None if all are at
    rest. terms: that of each measure. advice: "sleep", "nap" or None."""

    value: float
    driver: str | None
    terms: dict[str, float]
    advice: str | None


def pressure(now: Measures, limits: Limits | None = None) -> Pressure:
    """How urgent a sleep is: the largest term, each 0 at rest and 1 at its limit.

    A sum of weighted terms, as in earlier systems, lets several that are harmless ask for a sleep,
    and one that is not wait for others; here each alone can.
    """
    limits = limits or Limits()
    # What is at rest when nothing was learned: 0, but for a ratio and a share that start from 1.
    rest = {"perplexity_ratio": 1.0, "locality": 1.0}
    terms = {}
    for field in fields(now):
        value, name = getattr(now, field.name), field.name
        start = rest.get(name, 0.0)
        part = 0.0 if value is None else (value - start) / (getattr(limits, name) - start)
        terms[name] = max(0.0, part)
    driver = max(terms, key=lambda name: terms[name])
    value = terms[driver]
    advice = "sleep" if value >= 1 else "nap" if value >= limits.nap else None
    return Pressure(value, driver if value else None, terms, advice)
