"""The benchmark of nights in a row: facts and experience by day, a full sleep each night.

A model of the small world learns a few facts at wake and is told a few others, which are kept as
experience; the night is over both. After every night all facts and all that was ever told are asked
again, and what else may drift is measured: locality, perplexity, bytes and seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from hybrid_sleep.eval.nights.course import (
    STUDY,
    Course,
    Evening,
    options,
    subject,
    told_facts,
)
from hybrid_sleep.eval.results import AnswersRow, Result
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.validation import check_count

# What a record says, beside what was measured independently.
COMPARED = ("locality", "perplexity_ratio")


@dataclass(frozen=True, kw_only=True)
class NightsRow(AnswersRow):
    """All nights of one seed. facts, told: a day. settings: of the memory."""

    seed: int
    nights: int
    facts: int
    told: int
    settings: dict[str, Any]
    parameters: int
    evenings: list[Evening]

    @property
    def unreported(self) -> float:
        """The largest difference between locality or perplexity ratio as a night's record has it
        and as it was measured afterwards."""
        gaps = [0.0]
        for evening in self.evenings:
            for name in COMPARED:
                said = evening.reported.get(name)
                if said is not None:
                    gaps.append(abs(said - getattr(evening.facts, name)))
        return max(gaps)


@dataclass(kw_only=True)
class NightsResult(Result):
    """All seeds."""

    benchmark: ClassVar[str] = "nights"
    rows: list[NightsRow]


def run(
    *,
    nights: int = 10,
    facts: int = 2,
    told: int = 3,
    seeds: Sequence[int] = (0, 1, 2),
    study: StudyOptions = STUDY,
    jobs: int = 1,
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NightsResult:
    """`nights` nights, before each of which `facts` facts are learned and `told` others are told.

    A later call with the same `out` goes on. Other arguments as in `resume.collect`. Raises
    ValueError for numbers that cannot be.
    """
    for name, number in (("nights", nights), ("facts", facts), ("told", told)):
        check_count(name, number)
    for seed in seeds:
        check_count("seeds", seed, minimum=0)
        told_facts(subject(seed, nights * facts), nights * told)
    planned = [
        {
            "seed": seed,
            "nights": nights,
            "facts": facts,
            "told": told,
            "settings": options(study, seed).to_dict(),
        }
        for seed in seeds
    ]
    header = NightsResult(rows=[], command=command, provenance=provenance("cpu"))
    with TemporaryDirectory() as folder:
        content = collect(
            header.content(), planned, partial(measure_row, Path(folder)), jobs=jobs,
            minutes=minutes, out=out, anywhere=True, progress=progress,
        )  # fmt: skip
    return NightsResult.from_content(content)


def measure_row(folder: Path, key: Row) -> Row:
    """What a `NightsRow` says beside its key; `folder`: for files of this run alone."""
    with TemporaryDirectory(dir=folder) as own:
        return Course(key, Path(own) / "memory").run()
