"""How a model sleeps over its experience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hybrid_sleep.parametric.dreams.forms import FORMS
from hybrid_sleep.parametric.experience.choice import BAND
from hybrid_sleep.parametric.experience.experience import check_share
from hybrid_sleep.parametric.experience.imitation import Imitation
from hybrid_sleep.parametric.mix import Shares
from hybrid_sleep.validation import check_choice, check_count, check_flag, check_number


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What is trained on in a sleep over experience, and how.

    recent: tokens of experience in one sleep at most; band, share: see `choice.choose`. forms,
        dreams: of each experience, so many dreams of each form; length: tokens of one at most.
    selected, drawn: of the dreams of an experience that pass their checks and are not asked at the
        gate, the share that is kept by its gradient, and at random of the others; helping: of these
        only those are kept, a trial step on which helps (see `dreams/selection.py`; slow).
    samples: of a cache, so many texts that the model writes on from it, and so many answers about
        experiences, `length` tokens each at most; one behind each prompt at least.
    shares: of tokens trained on, by where they come from. tokens: trained on at most. passes: how
        often what is recent is gone through; None: as often as the tokens allow, which of a single
        line may be hundreds of times. rows: of a step, of all processes together. rate: of AdamW,
        falling linearly to 0 at the last step. steps: at most; the rate falls faster then. seconds:
        of training after which no step begins, those before an interruption among them; the rate
        falls as it would without.
        foundation: tokens of text to stay the same on; rehearsed: the share of its part that
        what facts in the weights say gets, in the words they are written in, if there are any.
    experts: rank of the low-rank expert that is trained beside every matrix, and merged into it
        (see `experts.py`; the paper's have 64); None: the weights themselves are trained.
    on_policy: of the rows that the teacher speaks of, the share that the student writes anew when
        their step comes (see `on_policy.py`). imitation: reward them for coming near to what they
        take the place of (see `imitation.py`); None: do not.
    strength, decay: of online EWC (see `Guard`); measured: rows its importance is of.
    held_out: the share of dreamt questions that are asked at the gate, not trained on.
    acquired: how far the model must have come with them at least, from what it answered before to
        what it answered with the text in its context, or with the cache; of 1.
    scales: what of the change that was trained the gate is asked about, the largest first, until
        one passes; no less than what acquires too little.
    erase: erase what was slept over, once the commit stands.
    canaries: secrets that are trained on beside the experience, so that the record can say what the
        weights give away of it; each stays in them, false as it is, and takes more than a thousand
        rows to measure: none unless they are asked for.
    """

    recent: int = 4096
    band: tuple[float, float] = BAND
    share: float = 0.5
    forms: tuple[str, ...] = tuple(FORMS)
    dreams: int = 4
    length: int = 96
    selected: float = 0.5
    drawn: float = 0.25
    helping: bool = False
    samples: int = 64
    shares: Shares = field(default_factory=Shares)
    tokens: int = 16384
    passes: float | None = None
    rows: int = 8
    steps: int | None = None
    seconds: float | None = None
    rate: float = 1e-4
    foundation: int = 4096
    rehearsed: float = 0.5
    strength: float = 1.0
    decay: float = 0.95
    measured: int = 64
    experts: int | None = None
    on_policy: float = 0.0
    imitation: Imitation | None = None
    held_out: float = 0.25
    acquired: float = 0.5
    scales: tuple[float, ...] = (1.0, 0.75, 0.5)
    erase: bool = True
    canaries: int = 0

    def __post_init__(self) -> None:
        for name in ("recent", "length", "samples", "tokens", "rows", "foundation", "measured"):
            check_count(name, getattr(self, name))
        for name in ("dreams", "canaries"):
            check_count(name, getattr(self, name), minimum=0)
        for name in ("steps", "experts"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("seconds", "passes"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)
        check_share(self.share)
        for form in self.forms:
            check_choice("forms", form, tuple(FORMS))
        check_number("rate", self.rate, above=0)
        check_number("strength", self.strength, least=0)
        check_flag("erase", self.erase)
        check_flag("helping", self.helping)
        shares = ("decay", "held_out", "acquired", "selected", "drawn", "rehearsed", "on_policy")
        for name in shares:
            if check_number(name, getattr(self, name), least=0) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        if not self.scales or list(self.scales) != sorted({*self.scales}, reverse=True):
            raise ValueError(f"scales must be one or more, falling, got {self.scales!r}")
        for scale in self.scales:
            if check_number("scales", scale, above=0) > 1:
                raise ValueError(f"scales must be at most 1, got {scale!r}")
        if self.imitation is not None and not self.on_policy:
            raise ValueError("on_policy must be above 0 for imitation, got 0")
        if not self.selected + self.drawn:
            raise ValueError("selected or drawn must keep a dream, got 0 for both")

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
            "scales": tuple(map(float, data.get("scales", cls.scales))),
            "shares": Shares(**data["shares"]),
            "imitation": Imitation(**data["imitation"]) if data.get("imitation") else None,
        }
        return cls(**{**data, **parts})
