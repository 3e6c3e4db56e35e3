"""The benchmark of fast weights into slow ones: days are slept over, learned at night, and asked.

A small model of ours learns to answer from windows that it slept over. Then, for each day: it reads
a text and sleeps over it, which leaves a cache; every key is asked with an empty state and with the
cache; the night follows; the cache is deleted, and every key is asked again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch

from hybrid_sleep.eval.bridge.arms import ARMS, Night
from hybrid_sleep.eval.bridge.model import Training, accuracy, answered, trained_model
from hybrid_sleep.eval.bridge.texts import Day, Texts
from hybrid_sleep.eval.results import AnswersRow, Result
from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.validation import check_choice, check_count

SPLITS = ("test", "train")  # train: to choose settings on


@dataclass(frozen=True, kw_only=True)
class Course:
    """What an arm made of the days of a seed; accuracies, each by day.

    floor, ceiling: of the day's questions before its night, with an empty state and with the cache.
    kept: after it, with an empty state; last: after all nights. unrelated: on other texts read in
    context, before the first night and after each. nights: how each ended. seconds: of the nights.
    """

    arm: str
    floor: list[float]
    ceiling: list[float]
    kept: list[float]
    last: list[float]
    unrelated: list[float]
    nights: list[str]
    seconds: float

    def share(self, after: Sequence[float]) -> float | None:
        """How much of the gain that the caches gave is there in `after`; None where they gave none.

        Over all days together.
        """
        gain = sum(self.ceiling) - sum(self.floor)
        return (sum(after) - sum(self.floor)) / gain if gain > 0 else None


@dataclass(frozen=True, kw_only=True)
class BridgeRow(AnswersRow):
    """All arms on the model of one seed. parameters: how many it has; training_seconds: its own."""

    seed: int
    arms: list[str]
    vocab_size: int
    pairs: int
    days: int
    passes: int
    split: str
    training: dict[str, Any]
    night: dict[str, Any]
    parameters: int
    training_seconds: float
    courses: list[Course]


@dataclass(kw_only=True)
class BridgeResult(Result):
    """All seeds."""

    benchmark: ClassVar[str] = "bridge"
    rows: list[BridgeRow]

    def of(self, arm: str) -> list[Course]:
        """The courses of an arm, a seed each."""
        return [course for row in self.rows for course in row.courses if course.arm == arm]


def run(
    *,
    texts: Texts | None = None,
    days: int = 3,
    passes: int = 2,
    arms: Sequence[str] = tuple(ARMS),
    seeds: Sequence[int] = (0, 1, 2),
    split: str = "test",
    training: Training | None = None,
    night: Night | None = None,
    jobs: int = 1,
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BridgeResult:
    """Sleep over `days` texts, with `passes` passes, and learn them by every one of `arms`.

    split: of the days' texts; settings are to be chosen on "train". A later call with the same
    `out` goes on. Other arguments as in `resume.collect`. Raises ValueError for numbers or arms
    that cannot be.
    """
    texts = texts or Texts()
    check_count("days", days)
    check_count("passes", passes)
    check_choice("split", split, SPLITS)
    for arm in arms:
        check_choice("arms", arm, tuple(ARMS))
    for seed in seeds:
        check_count("seeds", seed, minimum=0)
        texts.days(seed, days, split)
    planned = [
        {
            "seed": seed,
            "arms": list(arms),
            "vocab_size": texts.vocab_size,
            "pairs": texts.pairs,
            "days": days,
            "passes": passes,
            "split": split,
            "training": asdict(training or Training()),
            "night": asdict(night or Night()),
        }
        for seed in seeds
    ]
    header = BridgeResult(rows=[], command=command, provenance=provenance("cpu"))
    with TemporaryDirectory() as folder:
        content = collect(
            header.content(), planned, partial(measure_row, Path(folder)), jobs=jobs,
            minutes=minutes, out=out, anywhere=True, progress=progress,
        )  # fmt: skip
    return BridgeResult.from_content(content)


def measure_row(folder: Path, key: Row) -> Row:
    """What a `BridgeRow` says beside its key; `folder`: for files of this run alone."""
    texts = Texts(key["vocab_size"], key["pairs"])
    began = time.perf_counter()
    model = trained_model(texts, Training(**key["training"]), key["seed"])
    seconds = time.perf_counter() - began
    days = texts.days(key["seed"], key["days"], key["split"])
    courses = []
    for arm in key["arms"]:
        with TemporaryDirectory(dir=folder) as own:
            courses.append(
                asdict(course(arm, copy.deepcopy(model), texts, days, key, Path(own) / "memory"))
            )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": seconds,
        "courses": courses,
    }


def course(
    name: str, model: Any, texts: Texts, days: Sequence[Day], key: Row, folder: Path
) -> Course:
    """Every day, its night, and its questions, by the arm `name`."""
    arm = ARMS[name](model, texts, Night(**key["night"]), key["seed"], folder)
    floor, ceiling, kept, nights = [], [], [], []
    unrelated, seconds = [accuracy(model, texts)], 0.0
    for day in days:
        cache = slept_over(model, day, key["passes"])
        floor.append(answered(model, day.questions))
        ceiling.append(answered(model, day.questions, cache))
        began = time.perf_counter()
        nights.append(arm.learn(day, cache))
        seconds += time.perf_counter() - began
        del cache
        kept.append(answered(model, day.questions))
        unrelated.append(accuracy(model, texts))
    last = [answered(model, day.questions) for day in days]
    return Course(
        arm=name, floor=floor, ceiling=ceiling, kept=kept, last=last, unrelated=unrelated,
        nights=nights, seconds=seconds,
    )  # fmt: skip


@torch.no_grad()
def slept_over(model: Any, day: Day, passes: int) -> SleepCache:
    """The cache of a day's text behind a sleep: its window is gone, its fast weights are left."""
    cache = SleepCache(model.config)
    model.eval()(torch.tensor([day.text]), cache=cache)
    model.sleep(cache, passes=passes)
    return cache
