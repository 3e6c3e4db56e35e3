"""Ways to learn one task after the other, each from the same model: what a sleep is compared with.

Every method gets the same rows of a task, as many of them a step, and the same number of steps.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybrid_sleep.eval.continual.stream import IGNORED, TaskStream
from hybrid_sleep.eval.tasks.sampling import Stream
from hybrid_sleep.parametric.ewc import OnlineEWC
from hybrid_sleep.parametric.lessons import Lesson, lesson_loss, taught
from hybrid_sleep.parametric.mix import Row
from hybrid_sleep.parametric.sampling import continuations
from hybrid_sleep.training.loop import StepRecord, fit
from hybrid_sleep.training.optimizer import optimizer_for

OnStep = Callable[[StepRecord], bool | None]


@dataclass(frozen=True)
class Training:
    """How a method trains on a task.

    steps, rows: of a task, and rows a step. lr_muon, lr_adamw: learning rates. replayed: the share
    of a step's rows that are earlier ones, stored or the model's own. strength, decay: of EWC.
    measured: rows that the Fisher information of a task is of.
    """

    steps: int = 400
    rows: int = 32
    lr_muon: float = 0.02
    lr_adamw: float = 3e-3
    replayed: float = 0.25
    strength: float = 100.0
    decay: float = 0.95
    measured: int = 128


class Method(ABC):
    """Learns the tasks of `stream` by `model`, in order; `learn` is called once for each."""

    label: ClassVar[str]

    def __init__(self, model: nn.Module, stream: TaskStream, training: Training, seed: int):
        self.model, self.stream, self.training, self.seed = model, stream, training, seed
        self.tokens = 0

    @abstractmethod
    def learn(self, task: int, on_step: OnStep | None = None) -> None:
        """Train on `task`; `on_step` as in `fit`."""

    def context(self, task: int) -> list[int]:
        """Ids in front of every test row."""
        return []

    def drawn(
        self,
        task: int,
        rows: int,
        *purpose: int,
        over: int | None = None,
        progress: float | None = 1.0,
        after: int | None = None,
    ) -> Iterator[Tensor]:
        """Batches of rows of a task, the same for all methods of a seed.

        over: batches in which they come from the task's first rows to its last; None: all at one
        `progress`. That and `after` as in `TaskStream.batch`.
        """
        source = Stream(self.seed, task, *purpose)
        for i in count():
            at = progress if over is None else min(1.0, i / over)
            yield self.stream.batch(task, rows, source, progress=at, after=after)

    def labelled(self, rows: Tensor) -> dict[str, Tensor]:
        """A batch in which every token is to be predicted."""
        return {"input_ids": rows, "labels": self.stream.labels(rows)}

    def fit(
        self, model: nn.Module, batches: Iterator[Any], on_step: OnStep | None, **how: Any
    ) -> None:
        """The steps of one task."""
        t = self.training
        how = {"steps": t.steps, **how}
        optimizer = optimizer_for(model, t.lr_muon, t.lr_adamw)
        guard = how.pop("guard", None)
        with guard.guarding(optimizer) if guard else nullcontext():
            fit(
                model, self._counted(batches), optimizer=optimizer, on_step=on_step,
                schedule="trapezoid", warmup=how["steps"] // 20, seed=self.seed, **how,
            )  # fmt: skip

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`, whose tokens are counted as trained on."""
        for batch in batches:
            if "lessons" in batch:
                self.tokens += sum(len(lesson.ids) for lesson in batch["lessons"])
            else:
                self.tokens += int((batch["labels"] != IGNORED).sum())
            yield batch


class NoSleep(Method):
    """Nothing is learned."""

    label = "no sleep"

    def learn(self, task: int, on_step: OnStep | None = None) -> None:
        """Nothing happens."""


class InContext(NoSleep):
    """Nothing is learned, but every question comes behind `EXAMPLES` rows of its task."""

    label = "in context"
    EXAMPLES = 4

    def context(self, task: int) -> list[int]:
        """Rows of the task that are for training."""
        rows = next(self.drawn(task, self.EXAMPLES, 2)).tolist()
        return [i for row in self.stream.without_pads(rows) for i in row]


class FineTuning(Method):
    """Plain training on the task alone."""

    label = "fine-tuning"

    def learn(self, task: int, on_step: OnStep | None = None) -> None:
        """Train on rows of `task`."""
        rows = self.drawn(task, self.training.rows, over=self.training.steps)
        self.fit(self.model, map(self.labelled, rows), on_step)


class Replay(Method):
    """Stored rows of earlier tasks in the place of some of the task's.

    They are what was said then, even where it is no longer true.
    """

    label = "replay of stored rows"

    def learn(self, task: int, on_step: OnStep | None = None) -> None:
        """Train on rows of `task` and of those before."""
        own, others = _shares(self.training, task)
        earlier = [self.drawn(i, others, 1, progress=None) for i in range(task)]

        def batches() -> Iterator[dict[str, Tensor]]:
            chosen = Stream(self.seed, task, 3)
            for rows in self.drawn(task, own, over=self.training.steps):
                if not others:
                    yield self.labelled(rows)
                    continue
                mixed = torch.cat([next(source) for source in earlier])
                picked = torch.tensor(chosen.distinct(len(mixed), others))
                yield self.labelled(torch.cat((rows, mixed[picked])))

        self.fit(self.model, batches(), on_step)


class EWC(Method):
    """Fine-tuning under online EWC (arXiv 1612.00796, 1805.06370)."""

    label = "EWC"

    def __init__(self, model: nn.Module, stream: TaskStream, training: Training, seed: int):
        super().__init__(model, stream, training, seed)
        self.guard = OnlineEWC(model, training.strength, decay=training.decay)

    def learn(self, task: int, on_step: OnStep | None = None) -> None:
        """Train on rows of `task`, then protect what they need."""
        rows = self.drawn(task, self.training.rows, over=self.training.steps)
        self.fit(self.model, map(self.labelled, rows), on_step, guard=self.guard)
        self.consolidate(task)

    def consolidate(self, task: int) -> None:
        """Add the task to what the guard protects."""
        rows = next(self.drawn(task, self.training.measured, 4))
        measured = self.stream.without_pads(rows.tolist())
        self.guard.consolidate(self.guard.measure(measured, seed=self.seed))


class ProgressCompress(EWC):
    """A sleep: a copy learns the task, the model is drawn to it and to what it said before.

    Progress & Compress (arXiv 1805.06370, Eq. 2) with the model's own samples from before the sleep
    in the place of some rows: what it then said of them it is to say again. Under online EWC.
    """

    label = "sleep: distillation, own replay, EWC"
    own_replay: ClassVar[bool] = True

    def learn(self, task: int, on_step: OnStep | None = None) -> None:
        """Train a copy on the task, then the model on what copy and former self say."""
        t = self.training
        active, before = copy.deepcopy(self.model), copy.deepcopy(self.model)
        new = self.drawn(task, t.rows, over=t.steps)
        self.fit(active, map(self.labelled, new), None)
        own, others = _shares(t, task if self.own_replay else 0)
        begun = [[self.stream.begin]] * (t.steps * others)
        written = continuations(before, None, begun, self.stream.length - 1, seed=self.seed + task)
        samples = self.stream.without_pads([[self.stream.begin, *ids] for ids in written])

        def batches() -> Iterator[dict[str, list[Lesson]]]:
            source = self.drawn(task, own, 5, over=t.steps)
            for step in range(t.steps):
                recent = self.stream.without_pads(next(source).tolist())
                rows = [Lesson("recent", Row(tuple(ids))) for ids in recent]
                own_rows = [
                    Lesson("foundation", Row(tuple(ids)))
                    for ids in samples[step * others : (step + 1) * others]
                ]
                yield {
                    "lessons": taught(active, rows, at_once=len(rows))
                    + taught(before, own_rows, at_once=len(rows))
                }

        self.fit(
            self.model,
            batches(),
            on_step,
            loss=lambda model, batch: lesson_loss(model, batch["lessons"]),
            guard=self.guard,
        )
        self.consolidate(task)


class Compress(ProgressCompress):
    """The same without any replay, as published."""

    label = "distillation, EWC"
    own_replay = False


class Joint(Method):
    """All tasks so far at once, from the model before any: the upper bound.

    Without what is no longer true.
    """

    label = "joint training"

    def __init__(self, model: nn.Module, stream: TaskStream, training: Training, seed: int):
        super().__init__(model, stream, training, seed)
        self.first = copy.deepcopy(model.state_dict())

    def learn(self, task: int, on_step: OnStep | None = None) -> None:
        """Train anew on all tasks up to `task`, for as many steps as they had one by one."""
        self.model.load_state_dict(self.first)
        learned = range(task + 1)
        sources = [self.drawn(i, self.training.rows, after=task + 1) for i in learned]

        def batches() -> Iterator[dict[str, Tensor]]:
            chosen = Stream(self.seed, task, 6)
            while True:
                rows = torch.cat([next(source) for source in sources])
                picked = torch.tensor(chosen.distinct(len(rows), self.training.rows))
                yield self.labelled(rows[picked])

        self.fit(self.model, batches(), on_step, steps=self.training.steps * (task + 1))


METHODS: dict[str, type[Method]] = {
    "none": NoSleep,
    "in-context": InContext,
    "fine-tuning": FineTuning,
    "replay": Replay,
    "ewc": EWC,
    "compress": Compress,
    "sleep": ProgressCompress,
    "joint": Joint,
}


def _shares(training: Training, earlier: int) -> tuple[int, int]:
    """Rows of a step that are of the task, and those that are replayed."""
    others = round(training.replayed * training.rows) if earlier else 0
    return training.rows - others, others
