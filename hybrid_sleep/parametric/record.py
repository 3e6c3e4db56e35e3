"""The record of what was done to the weights: to be read by a person, and kept with the commit."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 3
OUTCOMES = ("committed", "rolled back", "nothing to do")


@dataclass
class Record:
    """One change of the slow weights, or an attempt at one.

    kind: "wake", "sleep", "experience", "nap", "forget", "undo". outcome: one of `OUTCOMES`, and
    why. read: what it worked on, in counts. changed: how much, by site: the norm of the change in
    norms of the weight. gate: measured before and after, and the failures, of what stands for it
    and of every strength that was `tried`. dropped: what was left out, with the reason. ids: of the
    facts, or experiences, that a sleep was over. notes: what a reader must know to judge the
    numbers.
    """

    kind: str
    outcome: str = "committed"
    why: str = ""
    read: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, float] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    commit: int | None = None
    seconds: float = 0.0
    time: float = field(default_factory=time.time)

    @property
    def ended(self) -> str:
        """The outcome, and why where that is said."""
        return f"{self.outcome}: {self.why}" if self.why else self.outcome

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        number = "" if self.commit is None else f" (commit {self.commit})"
        head = f"{self.kind}: {self.outcome}{number}, {self.seconds:.1f} s"
        lines = [head + (f"; {self.why}" if self.why else "")]
        if self.read:
            lines.append("read: " + ", ".join(f"{n} {k}" for k, n in self.read.items()))
        if self.changed:
            ranked = sorted(self.changed.items(), key=lambda pair: -pair[1])
            parts = [f"{site} by {100 * share:.2f} %" for site, share in ranked[:SHOWN]]
            if len(ranked) > SHOWN:
                parts.append(f"{len(ranked) - SHOWN} others by less")
            lines.append("changed: " + ", ".join(parts))
        before, after = self.gate.get("before", {}), self.gate.get("after", {})
        for name, new in after.items():
            if new is not None:
                old = before.get(name)
                was = "" if old is None else f"{old:.3f} -> "
                lines.append(f"{name.replace('_', ' ')}: {was}{new:.3f}")
        # A sleep over facts tries its weight of preserved keys, one over experience its change.
        lines += [
            f"failed at {tried[name]:g} times the {what}: {failure}"
            for tried in self.gate.get("tried", [])
            for name, what in (("strength", "weight"), ("scale", "change"))
            if name in tried
            for failure in tried["failures"]
        ]
        lines += [f"left out: {fact}: {why}" for fact, why in self.dropped.items()]
        return "\n".join(lines + self.notes)
