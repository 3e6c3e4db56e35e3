"""How a model sleeps over its experience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hybrid_sleep.parametric.dreams.forms import FORMS
from hybrid_sleep.parametric.experience.choice import BAND
from hybrid_sleep.parametric.experience.experience import check_share
from hybrid_sleep.parametric.mix import Shares
from hybrid_sleep.validation import check_choice, check_count, check_flag, check_number


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What is trained on in a sleep over experience, and how.

    recent: tokens of experience in one sleep at most; band, share: see `choice.choose`. forms,
        dreams: of each experience, so many dreams of each form; length: tokens of one at most.
    samples: of a cache, so many texts that the model writes on from it, `length` tokens each at
        most; one behind each prompt at least.
    shares: of tokens trained on, by where they come from. tokens: trained on in all; rows: of a
        step. rate: of AdamW, falling linearly. foundation: tokens of text to stay the same on.
    strength, decay: of online EWC (see `Guard`); measured: rows its importance is of.
    held_out: the share of dreamt questions that are asked at the gate, not trained on.
    acquired: how far the model must have come with them at least, from what it answered before to
        what it answered with the text in its context, or with the cache; of 1.
    erase: erase what was slept over, once the commit stands.
    """

    recent: int = 4096
    band: tuple[float, float] = BAND
    share: float = 0.5
    forms: tuple[str, ...] = tuple(FORMS)
    dreams: int = 4
    length: int = 96
    samples: int = 64
    shares: Shares = field(default_factory=Shares)
    tokens: int = 16384
    rows: int = 8
    rate: float = 1e-4
    foundation: int = 4096
    strength: float = 1.0
    decay: float = 0.95
    measured: int = 64
    held_out: float = 0.25
    acquired: float = 0.5
    erase: bool = True

    def __post_init__(self) -> None:
        for name in ("recent", "length", "samples", "tokens", "rows", "foundation", "measured"):
            check_count(name, getattr(self, name))
        check_count("dreams", self.dreams, minimum=0)
        check_share(self.share)
        for form in self.forms:
            check_choice("forms", form, tuple(FORMS))
        check_number("rate", self.rate, above=0)
        check_number("strength", self.strength, least=0)
        check_flag("erase", self.erase)
        for name in ("decay", "held_out", "acquired"):
            if check_number(name, getattr(self, name), least=0) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StudyOptions:
        """The options of `to_dict`."""
        low, high = data["band"]
        parts = {
            "band": (float(low), float(high)),
            "forms": tuple(data["forms"]),
            "shares": Shares(**data["shares"]),
        }
        return cls(**{**data, **parts})
