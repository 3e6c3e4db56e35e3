"""What the steps of one sleep hand to each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid_sleep.parametric.edit import Edit, Item
from hybrid_sleep.parametric.gate import Measured, Verdict
from hybrid_sleep.parametric.probes import Audit
from hybrid_sleep.parametric.record import Record

if TYPE_CHECKING:
    from hybrid_sleep.parametric.memory import Memory

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Attempt:
    """The joint solution at `strength` times the weight, how facts test with it, and the verdict.

    edit: None where no fact is left.
    """

    strength: float
    edit: Edit | None
    results: dict[int, Audit]
    verdict: Verdict


@dataclass
class Night:
    """One sleep of `memory` in the making.

    items: the facts to write, with their ids. results: of the last audit of each. retired: facts
    that are given up for the cap, quarantined: those that cannot be written, with the reason.
    attempts: at the strengths that were tried, and which of them is chosen.
    """

    memory: Memory
    progress: Progress | None = None
    began: float = field(default_factory=time.perf_counter)
    record: Record = field(default_factory=lambda: Record("sleep"))
    items: list[Item] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)
    retired: dict[int, str] = field(default_factory=dict)
    quarantined: dict[int, str] = field(default_factory=dict)
    results: dict[int, Audit] = field(default_factory=dict)
    before: Measured = field(default_factory=Measured)
    attempts: list[Attempt] = field(default_factory=list)
    chosen: Attempt | None = None

    def told(self, step: str) -> Callable[[int, int], None] | None:
        """`progress` of one step."""
        progress = self.progress
        return None if progress is None else lambda done, of: progress(step, done, of)

    @property
    def live(self) -> list[Item]:
        """Items that are neither retired nor quarantined by now."""
        return [x for x in self.items if x[0] not in self.retired and x[0] not in self.quarantined]
