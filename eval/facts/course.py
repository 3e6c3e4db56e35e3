"""One arm of the benchmark of facts, from the pristine model to the sleep after the second wave."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from hybrid_sleep.eval.facts.accuracy import accuracy
from hybrid_sleep.eval.facts.arms import ARMS, cycles
from hybrid_sleep.eval.facts.measured import (
    Change,
    Knowledge,
    Point,
    bytes_of,
    change_of,
    known_pairs,
    look,
    probes_of,
    replies,
)
from hybrid_sleep.eval.facts.settings import Settings
from hybrid_sleep.eval.facts.subjects import Subject
from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.memory import Memory
from hybrid_sleep.parametric.options import MemoryOptions
from hybrid_sleep.parametric.probes import Baseline
from hybrid_sleep.parametric.workspace import BASELINE, STATISTICS
from hybrid_sleep.sleep.weights import weights_digest
from hybrid_sleep.support.resume import Row

WINDOWS, DEPTHS = (0, 1, 8), (1, 2, 3, 4)


class Course:
    """An arm's memory of `subject` in `folder`, and what was measured of it.

    shared: a folder in which what the pristine model says and its statistics are kept for the
    courses after this one.
    """

    def __init__(self, key: Row, subject: Subject, folder: Path, shared: Path):
        self.arm, self.key, self.subject = ARMS[key["arm"]], key, subject
        self.folder, self.shared = folder, shared
        self.options = MemoryOptions.from_dict(key["settings"])
        self.live: list[Fact] = []
        self.seconds: list[float] = []
        self.changes: list[Change] = []

    def run(self) -> Row:
        """All of it; what a `FactsRow` says beside its key."""
        subject, key = self.subject, self.key
        began = time.perf_counter()
        self._bring()
        self.memory = self._open(subject.load())
        try:
            memory = self.memory
            memory.statistics()
            setup = time.perf_counter() - began
            self._share()
            wake = [self._look("before", 0.0, subject.facts, 0)]
            self.said = {
                fact.key: replies(memory.model, subject, fact)
                for fact in (self._updated(), subject.deleted)
            }
            for point in key["points"]:
                wake.append(self._learn("wake", subject.facts[len(self.live) : point]))
            learned = list(self.seconds)
            sleeps = self._sleep("sleep")
            slept = self._slept()
            reopened, second = None, []
            if key["second_wave"]:
                second.append(self._learn("second wave", subject.more))
                reopened = self._reopen()
                second.append(self._change())
                second += self._sleep("second sleep")
                self._watch("second sleep")
            baseline = self.memory.baseline
        finally:
            self.memory.close()
        return {
            "known": len(baseline.answered),
            "asked": len(subject.known),
            "setup_seconds": setup,
            "wake": _plain(wake),
            "sleeps": _plain(sleeps),
            "second": _plain(second),
            "changes": _plain(self.changes),
            "slept": slept,
            "reopened": reopened,
            "learn_seconds": learned,
        }

    def _open(self, model: nn.Module) -> Memory:
        subject = self.subject
        return self.arm.kind.open(
            self.folder,
            model,
            subject.tokenizer,
            relations=subject.relations,
            known=known_pairs(subject),
            corpus=subject.corpus,
            ordinary=subject.ordinary,
            options=self.options,
        )

    def _look(
        self, stage: str, seconds: float | None, facts: Sequence[Fact], taught: int, **more: Any
    ) -> Point:
        memory = self.memory
        return look(
            stage,
            memory.model,
            self.subject,
            facts,
            Knowledge(memory.probes, memory.baseline),
            taught=taught,
            changed=max(memory.edited.change().values(), default=0.0),
            bytes=bytes_of(self.folder),
            seconds=seconds,
            **more,
        )

    def _learn(self, stage: str, facts: Sequence[Fact]) -> Point:
        """Learn `facts` one by one, and look."""
        for fact in facts:
            began = time.perf_counter()
            self.memory.learn(fact)
            self.seconds.append(time.perf_counter() - began)
            self.live.append(fact)
        taken = self.seconds[len(self.seconds) - len(facts) :]
        return self._look(stage, sum(taken) / len(taken), self.live, len(self.live))

    def _sleep(self, stage: str) -> list[Point]:
        """Sleep until nothing is left to do, and look after each cycle that did something."""
        points: list[Point] = []
        began = time.perf_counter()
        for record in cycles(self.memory):
            seconds = time.perf_counter() - began
            if record.outcome != "nothing to do" or not points:
                taught = len(self.live)
                points.append(self._look(stage, seconds, self.live, taught, outcome=record.ended))
            began = time.perf_counter()
        return points

    def _slept(self) -> list[Row]:
        """What is answered behind slept windows, where the model has sleep."""
        world = self.subject.world
        if world is None or not self.arm.whole:
            return []
        found = []
        for windows in WINDOWS:
            for passes in DEPTHS if windows else DEPTHS[:1]:
                answered = accuracy(
                    self.memory.model,
                    self.subject.tokenizer,
                    world,
                    self.live,
                    windows=windows,
                    passes=passes,
                )
                found.append({"windows": windows, "passes": passes, "answered": answered})
        return found

    def _reopen(self) -> bool:
        """Close the memory and open it from its folder with a pristine model."""
        before = weights_digest(self.memory.model)
        self.memory.close()
        del self.memory.model
        self.memory = self._open(self.subject.load())
        after = weights_digest(self.memory.model)
        if after != before:
            raise RuntimeError(
                f"a memory that is opened again must give the same weights, {before}, got {after}"
            )
        return True

    def _change(self) -> Point:
        """Update one fact and delete another, and look."""
        subject = self.subject
        began = time.perf_counter()
        self.memory.learn(subject.update)
        seconds = time.perf_counter() - began
        self.memory.forget(subject.deleted.subject, subject.deleted.relation)
        self.live = [
            subject.update if fact.key == subject.update.key else fact
            for fact in self.live
            if fact.key != subject.deleted.key
        ]
        self._watch("update and deletion")
        return self._look("update and deletion", seconds, self.live, len(self.live))

    def _watch(self, stage: str) -> None:
        """What is said about the two facts that were changed."""
        subject, model = self.subject, self.memory.model
        for fact, new in (
            (self._updated(), subject.update.object),
            (subject.deleted, None),
        ):
            said = self.said[fact.key]
            self.changes.append(change_of(stage, model, subject, fact, new, said))

    def _updated(self) -> Fact:
        """The fact that is updated later, as it is taught first."""
        return next(fact for fact in self.subject.facts if fact.key == self.subject.update.key)

    def _bring(self) -> None:
        if self.shared.exists():
            shutil.copytree(self.shared, self.folder, dirs_exist_ok=True)

    def _share(self) -> None:
        if self.shared.exists():
            return
        partial = self.shared.with_name(f".{self.shared.name}.{os.getpid()}")
        partial.mkdir()
        shutil.copy(self.folder / BASELINE, partial)
        shutil.copytree(self.folder / STATISTICS, partial / STATISTICS)
        try:
            os.replace(partial, self.shared)
        except OSError:  # Another process was first.
            shutil.rmtree(partial)


def night_options(settings: Settings) -> MemoryOptions:
    """Of the memory that studies a page of facts."""
    return replace(settings.memory, study=settings.page)


def baseline_row(key: Row, subject: Subject, settings: Settings) -> Row:
    """What a `FactsRow` of a baseline, which learns all facts at once, says beside its key."""
    from hybrid_sleep.eval.facts import baselines, page

    model, given = subject.load(), (subject.tokenizer, subject.relations)
    whole = settings.whole_replies
    methods: dict[str, Callable[[], baselines.Method]] = {
        "fine-tuning": lambda: baselines.FineTuning(
            model,
            *given,
            baselines.Training(rate=settings.fine_tuning, whole_replies=whole),
        ),
        "lora": lambda: baselines.LoRA(
            model, *given, baselines.Training(rate=settings.lora, whole_replies=whole)
        ),
        "page": lambda: page.PageTuning(
            model, *given, baselines.Training(rate=settings.fine_tuning)
        ),
        "night": lambda: page.Night(model, subject, night_options(settings)),
        "asked": lambda: page.AskedNight(model, subject, night_options(settings)),
        "prompt": lambda: baselines.Prompt(model, *given),
        "retrieval": lambda: baselines.Retrieval(model, *given),
    }
    began = time.perf_counter()
    probes = probes_of(subject)
    knowledge = Knowledge(probes, Baseline.of(model, subject.tokenizer, probes))
    setup = time.perf_counter() - began
    method = methods[key["arm"]]()
    facts = subject.facts
    with method:
        began = time.perf_counter()
        method.learn(facts)
        seconds = time.perf_counter() - began
        point = look(
            "all at once",
            model,
            subject,
            facts,
            knowledge,
            method.prompt,
            taught=len(facts),
            seconds=seconds / len(facts),
            outcome=method.outcome,
        )
    return {
        "known": len(knowledge.baseline.answered),
        "asked": len(subject.known),
        "setup_seconds": setup,
        "wake": _plain([point]),
    }


def _plain(values: Sequence[Any]) -> list[Row]:
    return [asdict(value) for value in values]
