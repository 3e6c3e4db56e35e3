"""How far the training of a night is, what each of its steps is over, and when it stops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hybrid_sleep.parametric.lessons import Lesson
from hybrid_sleep.training.ranks import over_ranks

# Seconds between two states that are kept, and how many times longer than keeping one they are.
KEEP_EVERY, KEEP_SHARE = 60.0, 20.0


@dataclass
class Course:
    """How far a training is: `step` of `steps`, out of `planned` without a budget of steps.

    seconds: spent on it, in earlier processes too. resumed: the step that this one began with.
    experts: the rank of those that were trained, None without any; parameters: how many numbers.
    on_policy: rows of the steps taken that the student wrote; rewards: the sum of theirs.
    """

    planned: int
    steps: int
    limit: float | None = None
    step: int = 0
    seconds: float = 0.0
    resumed: int = 0
    experts: int | None = None
    parameters: int = 0
    on_policy: int = 0
    rewards: float | None = None

    @property
    def spent(self) -> str | None:
        """The budget that ended it, if one did."""
        if self.step < self.steps:
            return "seconds" if self.late else None
        return "steps" if self.steps < self.planned else None

    @property
    def late(self) -> bool:
        """Whether no step may begin any more."""
        return self.limit is not None and self.seconds >= self.limit

    def to_dict(self) -> dict[str, Any]:
        """What a record says of it, plain data for JSON."""
        rewarded = self.rewards is not None and self.on_policy
        return {
            "steps": self.step,
            "planned": self.planned,
            "budget spent": self.spent,
            "resumed at": self.resumed or None,
            "seconds": self.seconds,
            "experts": self.experts,
            "parameters": self.parameters,
            "rows on policy": self.on_policy,
            "mean reward": (self.rewards or 0.0) / self.on_policy if rewarded else None,
        }


class Clock(TrainerCallback):
    """Counts steps and seconds, tells of them, and ends a training whose seconds are spent."""

    def __init__(self, course: Course, progress: Callable[[int, int], None] | None):
        self.course, self.progress = course, progress
        self.before = course.seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.kept = time.perf_counter()
        self.keeping = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, course = time.perf_counter(), self.course
        due = now - self.kept >= max(KEEP_EVERY, KEEP_SHARE * self.keeping)
        told = torch.tensor([self.before + now - self.began, due], dtype=torch.float64)
        # Clocks differ, and all processes have to stop at the same step.
        seconds, due = over_ranks(told, "MAX").tolist()
        course.step, course.seconds = state.global_step, seconds
        if self.progress is not None:
            self.progress(course.step, course.steps)
        if course.late:
            control.should_training_stop = True
        elif due and course.step < course.steps:
            control.should_save = True
        self.asked = now

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept = time.perf_counter()
        self.keeping = self.kept - self.asked


class Steps(Dataset):
    """Item i: the lessons that a process has of step `first + i`, and their share of its loss.

    The loss of a step is the weighted mean over its tokens, and gradients are averaged over
    processes: each has its own mean, times its weight in the whole, times the number of processes.
    """

    def __init__(
        self,
        lessons: Sequence[Lesson],
        rows: int,
        first: int,
        steps: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.lessons, self.rows, self.first, self.steps = lessons, rows, first, steps
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin = (self.first + index) * self.rows
        return share_of(self.lessons[begin : begin + self.rows], self.rank, self.world)


def share_of(members: Sequence[Lesson], rank: int, world: int) -> dict[str, Any]:
    """What a process has of the lessons of a step (see `Steps`)."""
    if world == 1:
        return {"lessons": members, "share": 1.0}
    mine = members[rank::world]
    share = world * _weight(mine) / _weight(members)
    # A process without any still has to take part when gradients are summed.
    return {"lessons": mine or members[:1], "share": share}


def _weight(lessons: Sequence[Lesson]) -> float:
    return math.fsum(x.tokens * x.row.weight for x in lessons)
