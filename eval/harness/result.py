"""What an evaluation by lm-evaluation-harness gives; reading it needs no lm_eval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hybrid_sleep.eval.results import Result


@dataclass(kw_only=True)
class Score:
    """One metric of one task, by lm-eval's name; `value` is None where it is not finite.

    interval: 95 %. floor, majority: what guesses score, of our own tasks. documents: how many.
    """

    name: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    interval: list[float] | None
    floor: float | None
    majority: float | None
    higher_is_better: bool | None
    documents: int | None
    num_fewshot: int | None
    version: Any


@dataclass(kw_only=True)
class Level:
    """Accuracy on the questions of one difficulty, and how many there were."""

    share: float
    questions: int


@dataclass(kw_only=True)
class HarnessRow:
    """The scores of a task that was asked for, which may be a group of tasks, at one depth."""

    task: str
    depth: int
    inputs: str
    seconds: float
    scores: list[Score]
    by_difficulty: dict[str, Level] | None


@dataclass(kw_only=True)
class TaskRecord:
    """Of a task of ours its parameters and what guesses score; of any other all is None."""

    params: dict[str, Any] | None
    in_words: bool | None
    difficulty: str | None
    floor: dict[str, float] | None
    majority: dict[str, float] | None


@dataclass(kw_only=True)
class HarnessResult(Result):
    """Scores by task and depth. `config`: of the run behind the checkpoint, if it is known."""

    benchmark: ClassVar[str] = "harness"
    checkpoint: str
    parameters: int
    trained_depths: list[int] | None
    config: dict[str, Any] | None
    tasks: dict[str, TaskRecord]
    depths: list[int]
    limit: int | None
    seed: int
    num_fewshot: int | None
    dtype: str
    batch_size: int | str
    sleep_options: dict[str, Any]
    rows: list[HarnessRow]
