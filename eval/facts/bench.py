"""The benchmark of facts in the weights: learned one by one, kept by sleep, changed, reopened.

Every arm learns the same facts in the same order, is measured on the way, sleeps, and is measured
again, always against the pristine model. Baselines learn all facts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from hybrid_sleep.eval.facts.arms import ARMS, BASELINES
from hybrid_sleep.eval.facts.course import Course, baseline_row, night_options
from hybrid_sleep.eval.facts.measured import Change, Point
from hybrid_sleep.eval.facts.subjects import WORLD, digest_of, settings_of, subject_of
from hybrid_sleep.eval.results import AnswersRow, Result
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.validation import check_choice, check_count

ENOUGH = 0.9  # recall, at the threshold


@dataclass(frozen=True, kw_only=True)
class Slept:
    """The share of facts answered behind `windows` of other text, each slept over with `passes`."""

    windows: int
    passes: int
    answered: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FactsRow(AnswersRow):
    """One arm on one seed and order of facts.

    settings: what it was run with. known: things that the pristine model knows, of `asked`.
    setup_seconds: until the first fact could be learned. wake: from no facts on; sleeps: a cycle
    each; second: after new facts, after the update and the deletion, after the next sleep; changes:
    of the facts updated and deleted. reopened: whether the weights came back from the disk bit for
    bit (None where it was not tried). learn_seconds: of each fact of the first wave.
    """

    model: str
    digest: str
    arm: str
    seed: int
    order: int
    facts: int
    points: list[int]
    second_wave: bool
    settings: dict[str, Any]
    known: int
    asked: int
    setup_seconds: float
    wake: list[Point]
    sleeps: list[Point] = field(default_factory=list)
    second: list[Point] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    slept: list[Slept] = field(default_factory=list)
    reopened: bool | None = None
    learn_seconds: list[float] = field(default_factory=list)

    def threshold(self, *kinds: str) -> int:
        """The largest number of facts at which recall, or the share of `kinds` of text, was 0.9 or
        more at wake; 0 if at none."""
        taught = [p for p in self.wake if p.facts]
        shares = [(p.facts, p.share(*kinds) if kinds else p.recall) for p in taught]
        return max((k for k, share in shares if share is not None and share >= ENOUGH), default=0)


@dataclass(kw_only=True)
class FactsResult(Result):
    """All arms on all seeds and orders. model: "world" or the name of a real one."""

    benchmark: ClassVar[str] = "facts"
    model: str
    facts: int
    points: list[int]
    rows: list[FactsRow]

    def of(self, arm: str) -> list[FactsRow]:
        """The rows of an arm."""
        return [row for row in self.rows if row.arm == arm]


def default_points(model: str, facts: int) -> list[int]:
    """After how many facts the wake curve is measured: few of them where it takes minutes."""
    if model != WORLD:
        return sorted({1, min(8, facts), facts})
    doubled = [2**i for i in range(facts.bit_length())]
    return sorted({*(k for k in doubled if k < facts), facts})


def run(
    model: str = WORLD,
    *,
    name: str | None = None,
    facts: int = 40,
    seeds: Sequence[int] = (0, 1, 2),
    orders: int = 1,
    arms: Sequence[str] = (*ARMS, *BASELINES),
    points: Sequence[int] | None = None,
    second_wave: bool = True,
    jobs: int = 1,
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FactsResult:
    """Run `arms` on every seed and order; a later call with the same `out` goes on.

    model: "world" or the folder of a causal model, called `name` in the result. seeds: of the
    world's model and of the order of facts. orders: of the same facts, for each seed. points: after
    how many facts the wake curve is measured. second_wave: whether arms that have one go on after
    their sleep. minutes: stop before a row that might take longer. Raises ValueError for numbers or
    arms that cannot be.
    """
    check_count("facts", facts, minimum=2)
    check_count("orders", orders)
    for seed in seeds:
        check_count("seeds", seed, minimum=0)
    for arm in arms:
        check_choice("arms", arm, (*ARMS, *BASELINES))
    points = sorted({*(points or default_points(model, facts))})
    for point in points:
        check_count("points", point, maximum=facts)
    digest = digest_of(model)
    planned = [
        {
            "model": name or Path(model).name,
            "digest": digest,
            "arm": arm,
            "seed": seed,
            "order": order,
            "facts": facts,
            "points": points,
            "second_wave": second_wave and arm in ARMS and ARMS[arm].whole,
            "settings": _settings(model, arm),
        }
        for seed in seeds
        for order in range(orders)
        for arm in arms
    ]
    header = FactsResult(
        model=name or Path(model).name,
        facts=facts,
        points=points,
        rows=[],
        command=command,
        provenance=provenance("cpu"),
    )
    with TemporaryDirectory() as folder:
        content = collect(
            header.content(),
            planned,
            partial(measure_row, model, Path(folder)),
            jobs=jobs,
            minutes=minutes,
            out=out,
            anywhere=True,
            progress=progress,
        )
    return FactsResult.from_content(content)


def _settings(model: str, arm: str) -> dict[str, Any]:
    settings = settings_of(model)
    if arm in ARMS:
        return ARMS[arm].options(settings).to_dict()
    if arm in ("night", "asked"):
        return night_options(settings).to_dict()
    fine_tuning = settings.fine_tuning
    rates = {"fine-tuning": fine_tuning, "page": fine_tuning, "lora": settings.lora}
    return {"rate": rates[arm]} if arm in rates else {}


def measure_row(model: str, folder: Path, key: Row) -> Row:
    """What a `FactsRow` says beside its key; `folder`: for files of this run alone."""
    subject = subject_of(model, key["seed"], key["order"], key["facts"])
    if key["arm"] not in ARMS:
        return baseline_row(key, subject, settings_of(model))
    with TemporaryDirectory(dir=folder) as own:
        shared = folder / f"pristine-{key['seed']}"
        return Course(key, subject, Path(own), shared).run()
