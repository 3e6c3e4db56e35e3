"""What changes from step to step: learning rates, windows, and curricula `{0: ..., 500: ...}`."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hybrid_sleep.validation import check_choice, check_count, check_number

T = TypeVar("T")
SCHEDULES = ("constant", "linear", "cosine", "trapezoid")


def learning_rates(
    schedule: str, *, steps: int, warmup: int = 0, cooldown: float = 0.3
) -> dict[str, Any]:
    """A learning-rate schedule over `steps` as the arguments that `TrainingArguments` has for it.

    The rate rises linearly for `warmup` steps, then follows `schedule`: `constant`; `linear` or
    `cosine` to zero at the last step; `trapezoid`, constant and then linear to zero over the last
    `cooldown` share of all steps. ValueError for another name or a value out of range.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_count("steps", steps)
    check_count("warmup", warmup, minimum=0)
    if warmup > steps:
        raise ValueError(f"warmup must be at most steps={steps}, got {warmup}")
    if check_number("cooldown", cooldown, least=0) > 1:
        raise ValueError(f"cooldown must be a share of the steps, 0 to 1, got {cooldown}")
    arguments: dict[str, Any] = {"lr_scheduler_type": schedule, "warmup_steps": warmup}
    if schedule == "constant":
        arguments["lr_scheduler_type"] = "constant_with_warmup"
    elif schedule == "trapezoid":
        decay = min(math.ceil(cooldown * steps), steps - warmup)
        arguments["lr_scheduler_type"] = "warmup_stable_decay"
        arguments["lr_scheduler_kwargs"] = {"num_decay_steps": decay, "decay_type": "linear"}
    return arguments


def check_starts(name: str, starts: Iterable[Any]) -> None:
    """Raise ValueError unless `starts` are steps, the first of them 0, each above the last."""
    starts = list(starts)
    for start in starts:
        check_count(f"{name} step", start, minimum=0)
    if starts[:1] != [0]:
        found = f"step {starts[0]}" if starts else "none"
        raise ValueError(f"{name} must have a first stage at step 0, got {found}")
    for before, after in zip(starts, starts[1:], strict=False):
        if after <= before:
            raise ValueError(f"{name} must have ascending steps, got {after} after {before}")


def stage_at(stages: Sequence[tuple[int, T]], step: int) -> T:
    """What the last of `stages` (first step, value) that has begun by `step` holds."""
    check_count("step", step, minimum=0)
    return stages[bisect.bisect_right(stages, step, key=lambda stage: stage[0]) - 1][1]


@dataclass(frozen=True)
class WindowSchedule:
    """The window to train with at each step: `stages` of (first step, window >= 1)."""

    stages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        check_starts("train.windows", (start for start, _ in self.stages))
        for start, window in self.stages:
            check_count(f"train.windows from step {start}", window)

    def at(self, step: int) -> int:
        """The window of training step `step` (0 for the first)."""
        return stage_at(self.stages, step)

    def check(self, window: int, steps: int) -> None:
        """Raise ValueError unless the schedule ends at `window`, the model's, before `steps`."""
        start, last = self.stages[-1]
        if last != window:
            raise ValueError(
                f"train.windows must end at the model's window, {window}, got {last}"
            )
        if start >= steps:
            raise ValueError(
                f"train.windows must change before train.steps={steps}, got step {start}"
            )

    def to_config(self) -> dict[int, int]:
        """What `parse_windows` turns back into this schedule."""
        return dict(self.stages)


def parse_windows(value: Any) -> WindowSchedule:
    """The schedule a run config names: `{0: 8, 500: 16, 1000: 24}`; a schedule is returned as is.

    Raises ValueError naming the key, its value and what is allowed.
    """
    if isinstance(value, WindowSchedule):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"train.windows must be {{0: window, step: window, ...}}, got {value!r}")
    return WindowSchedule(tuple(value.items()))
