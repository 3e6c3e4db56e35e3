"""What a model experienced, and what of it is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrid_sleep.parametric.experience.schema import KINDS
from hybrid_sleep.validation import check_choice, check_count, check_number

# Weight in the mean of the loss, sum(w l) / sum(w).
IMPORTANCE = {"text": 1.0, "exchange": 1.0, "correction": 1.5}


@dataclass(frozen=True)
class Experience:
    """Something that was read, said or corrected, to be learned from in a sleep.

    source: whose it is, such as a user or a session; what is erased together. text: what is to be
    learned; of an exchange the answer to `prompt`, of a correction the right answer to it.
    rejected: of a correction, the answer that was wrong. kind: "text", "exchange" or "correction".
    provenance: where it comes from, plain data for JSON. consent: whether it may be kept and
    learned from. weights: digest (SHA-256) of the model's weights at that time.

    Raises ValueError for parts that do not belong to the kind, and for what is no plain data.
    """

    source: str
    text: str
    weights: str
    kind: str = "text"
    prompt: str = ""
    rejected: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    consent: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        for name in ("source", "text", "prompt", "rejected"):
            value = getattr(self, name)
            wanted = {"source", "text"}
            wanted |= {"text": set(), "exchange": {"prompt"}}.get(self.kind, {"prompt", "rejected"})
            if not isinstance(value, str) or bool(value.strip()) != (name in wanted):
                what = "words" if name in wanted else "empty"
                raise ValueError(f"{name} of kind {self.kind!r} must be {what}, got {value!r}")
        if self.rejected and self.rejected.strip() == self.text.strip():
            raise ValueError(f"rejected must be another answer than text, got {self.rejected!r}")
        if not (isinstance(self.weights, str) and re.fullmatch("[0-9a-f]{64}", self.weights)):
            raise ValueError(
                f"weights must be the SHA-256 digest of a model's weights, got {self.weights!r}"
            )
        try:
            plain = isinstance(self.provenance, Mapping) and all(
                isinstance(key, str) for key in self.provenance
            )
            json.dumps(dict(self.provenance), allow_nan=False)
        except (TypeError, ValueError):
            plain = False
        if not plain:
            raise ValueError(
                f"provenance must be a dict of plain data for JSON, got {self.provenance!r}"
            )


@dataclass(frozen=True)
class Kept:
    """An experience in a buffer, without its secrets.

    ids: token ids of prompt and text, those from `start` on are targets; the rejected answer is
    not among them. surprise: mean loss per token (nats). percentile: of its surprise among all that
    wait, 50 where it alone is; None once it was slept over. importance: its weight in a mean of
    losses. commit: of the sleep that it was used in.
    """

    id: int
    experience: Experience
    ids: tuple[int, ...]
    start: int
    state: str
    created: str
    surprise: float
    percentile: float | None
    importance: float
    commit: int | None = None


@dataclass(frozen=True)
class Limits:
    """How much a buffer keeps: `rows` experiences of `bytes` in all, encrypted.

    share: of either that one source may take. Raises ValueError for what is out of range.
    """

    rows: int = 10_000
    bytes: int = 64 << 20
    share: float = 0.5

    def __post_init__(self) -> None:
        check_count("rows", self.rows)
        check_count("bytes", self.bytes)
        check_share(self.share)

    @property
    def rows_of_one(self) -> int:
        """Experiences that one source may have."""
        return max(1, int(self.share * self.rows))

    @property
    def bytes_of_one(self) -> int:
        """Bytes that one source may take."""
        return int(self.share * self.bytes)


def check_share(share: float) -> float:
    """Return `share` if it is above 0 and at most 1, else raise ValueError."""
    if check_number("share", share, above=0) > 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share!r}")
    return share
