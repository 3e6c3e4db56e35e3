"""A dream, where it comes from, and every check that it went through.

Two kinds, never mixed. An acquisition dream says an experience in another form, to be learned from.
A retention dream is a free sample of the model before sleep, on which it is to stay as it is: the
old solver's samples of Shin et al. (arXiv 1705.08690).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.validation import check_choice, check_count

ACQUISITION, RETENTION = "acquisition", "retention"
KINDS = (ACQUISITION, RETENTION)
# What every dream of a kind must have passed before it may be kept.
REQUIRED = {
    ACQUISITION: ("form", "length", "words", "facts", "novel", "grounded", "unique"),
    RETENTION: ("length", "unique"),
}
# How the id of a dream begins, so that it is known for one wherever it is stored.
MARK = "dream-"


@dataclass(frozen=True)
class Check:
    """One check of a dream: whether it passed, what was measured if anything, what it says."""

    name: str
    passed: bool
    value: float | None = None
    says: str = ""


@dataclass(frozen=True)
class Source:
    """An experience to dream of: its id, its text, and the facts it states, where known.

    Raises ValueError for an empty id or text, and for the id of a dream: none is dreamed upon.
    """

    id: str
    text: str
    facts: tuple[Fact, ...] = ()

    def __post_init__(self) -> None:
        for name in ("id", "text"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} of a source must have words in it, got {value!r}")
        if self.id.startswith(MARK):
            raise ValueError(f"sources must be experiences, got the dream {self.id!r}")


@dataclass(frozen=True)
class Dream:
    """What a model wrote asleep.

    kind: one of `KINDS`. form: of acquisition, one of `forms.FORMS`; of retention, "free" or
    "turn". text: the statement, the answer or the sample; question: what the answer is to.
    ids, start: tokens to train on, of which those from `start` on are predicted, without the
    source. sources: ids of the experiences that it was conditioned on, none for retention.
    weights: the digest of the weights that wrote it. seed, number: of the call that made it, and
    its place in it. generation: always 1. score: of its selection, None before.

    Raises ValueError for a dream without provenance or without a check.
    """

    kind: str
    form: str
    text: str
    ids: tuple[int, ...]
    start: int
    sources: tuple[str, ...]
    weights: str
    seed: int
    number: int
    checks: tuple[Check, ...]
    question: str | None = None
    score: float | None = None
    generation: int = field(default=1)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_count("number", self.number, 0)
        check_count("start", self.start, 0, len(self.ids))
        if self.generation != 1:
            raise ValueError(
                f"generation must be 1, as no dream is dreamed upon, got {self.generation!r}"
            )
        if not self.weights:
            raise ValueError("weights must be the digest of those that wrote the dream, got none")
        if (self.kind == ACQUISITION) != bool(self.sources):
            raise ValueError(
                f"sources must be ids for {ACQUISITION} and none for {RETENTION}, got "
                f"{self.sources!r} for {self.kind}"
            )
        if any(source.startswith(MARK) for source in self.sources):
            raise ValueError(f"sources must be experiences, got a dream in {self.sources!r}")
        names = [check.name for check in self.checks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"checks must be one or more, each once, got {names!r}")

    @property
    def id(self) -> str:
        """Of what was written, by which weights, from what: `MARK` and 16 hexadecimal digits."""
        made_from = [
            self.kind, self.form, self.question, self.text, list(self.ids), list(self.sources),
            self.weights, self.seed, self.number,
        ]  # fmt: skip
        return MARK + hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]

    @property
    def kept(self) -> bool:
        """Whether it passed all that its kind requires, and whatever was checked besides."""
        passed = {check.name for check in self.checks if check.passed}
        return len(passed) == len(self.checks) and passed.issuperset(REQUIRED[self.kind])

    @property
    def why(self) -> str:
        """Which check rejected it, and what that says; empty for one that is kept."""
        for check in self.checks:
            if not check.passed:
                return f"{check.name}: {check.says}" if check.says else check.name
        return "" if self.kept else "not all checks were made"

    def checked(self, check: Check) -> Dream:
        """The same with one more check."""
        return replace(self, checks=(*self.checks, check))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with what follows from the rest: `id`, `kept`, `why`."""
        return {"id": self.id, **asdict(self), "kept": self.kept, "why": self.why}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Dream:
        """The dream of `to_dict`; ValueError if it is not the one that its id names."""
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list | tuple) else v for k, v in data.items()
        }
        wanted = given.pop("id")
        del given["kept"], given["why"]
        dream = cls(**{**given, "checks": tuple(Check(**check) for check in given["checks"])})
        if dream.id != wanted:
            raise ValueError(f"dream must be the one of its id {wanted!r}, got {dream.id!r}")
        return dream


def check_sources(sources: Sequence[Source], earlier: Iterable[Dream] = ()) -> None:
    """Raise ValueError unless all are experiences, each id once, and none the text of a dream."""
    texts = {" ".join(dream.text.split()) for dream in earlier}
    for source in sources:
        if not isinstance(source, Source):
            got = f"the dream {source.id!r}" if isinstance(source, Dream) else repr(source)
            raise ValueError(f"sources must be experiences, each a Source, got {got}")
        if " ".join(source.text.split()) in texts:
            raise ValueError(f"sources must be experiences, got the text of a dream as {source.id}")
    ids = [source.id for source in sources]
    if len(set(ids)) < len(ids):
        raise ValueError(f"sources must have ids of their own, got {sorted(ids)!r}")


def counts(dreams: Iterable[Dream]) -> dict[str, Any]:
    """By kind: how many were `made`, `kept`, and `rejected` by which check.

    A dream counts as rejected by the first check that it failed, and one whose checks are not all
    made yet as `unfinished`, so the numbers of a kind add up to `made`.
    """
    found: dict[str, Any] = {}
    for dream in dreams:
        own = found.setdefault(
            dream.kind, {"made": 0, "kept": 0, "unfinished": 0, "rejected": Counter()}
        )
        own["made"] += 1
        failed = next((check.name for check in dream.checks if not check.passed), None)
        if failed is not None:
            own["rejected"][failed] += 1
        else:
            own["kept" if dream.kept else "unfinished"] += 1
    return {kind: {**own, "rejected": dict(own["rejected"])} for kind, own in found.items()}
