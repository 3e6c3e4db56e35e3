"""Every window of the context written several times: what does a second look alone bring?

Reading twice helps (JRT, arXiv 2407.05483), and N passes of a sleep read N times as well. A model
that sleeps once over windows which hold their tokens N times has looked as often, by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybrid_sleep.eval.tasks.base import IGNORED, Majority, Task
from hybrid_sleep.validation import check_count

if TYPE_CHECKING:
    import torch


class Repeated(Task):
    """`task`, with each window of its context `times` times in a window as much longer.

    The context is all full windows in front of the first label; what is behind stays as it is. So
    do labels, splits, floors and all that is said of examples.

    Raises ValueError unless times >= 1 and the examples have a context of at least a window.
    """

    name = "repeated"
    difficulty = "difficulty"

    def __init__(self, task: Task, times: int):
        self.task, self.times = task, check_count("times", times)
        self.name, self.difficulty = task.name, task.difficulty  # type: ignore[misc]  # as its own
        self.question, self.block = task.question, task.block  # type: ignore[misc]  # as above
        (example,) = task.examples("train", 0, 1)
        first = next(t for t, label in enumerate(example["labels"]) if label != IGNORED)
        self.context = first // task.window * task.window
        if not self.context:
            raise ValueError(
                f"times must be 1 for a task whose first label, at {first}, is in the first window "
                f"of {task.window} tokens, got {times}"
            )
        self.vocab_size, self.params = task.vocab_size, task.params
        self.token_fields, self.together = task.token_fields, task.together
        self.window = times * task.window
        self.length = task.length + (times - 1) * self.context

    def _examples(self, split: str, seed: int, count: int | None) -> Iterator[dict[str, Any]]:
        for example in self.task.examples(split, seed, count):
            ids, labels = example["input_ids"], example["labels"]
            self._check_labels(max(labels[: self.context]))
            windows = range(0, self.context, self.task.window)
            ahead = [
                token for first in windows for token in self.times * ids[first : first + self._own]
            ]
            yield {
                **example,
                "input_ids": ahead + ids[self.context :],
                "labels": [IGNORED] * len(ahead) + labels[self.context :],
            }

    def _batch(self, split: str, seed: int, count: int) -> dict[str, torch.Tensor]:
        import torch

        batch = self.task.batch(split, seed, count)
        made = {}
        for name, rows in batch.items():
            if name == "labels":
                self._check_labels(int(rows[:, : self.context].max()))
            windows = rows[:, : self.context].unflatten(1, (-1, self._own))
            ahead = windows.repeat(1, 1, self.times).flatten(1)
            made[name] = torch.cat((ahead, rows[:, self.context :]), dim=1)
        return made

    @property
    def _own(self) -> int:
        return self.task.window

    def _check_labels(self, largest: int) -> None:
        if largest != IGNORED:
            raise ValueError(
                f"times must be 1 for a task with labels among the first {self.context} tokens of "
                f"some examples, got {self.times}"
            )

    def once(self, input_ids: Sequence[int]) -> list[int]:
        """A sequence as the task itself has it; ValueError where repetitions differ."""
        ids = [int(token) for token in input_ids]
        end, kept = self.times * self.context, []
        for first in range(0, end, self.window):
            whole = ids[first : first + self.window]
            if whole != self.times * whole[: self._own]:
                raise ValueError(
                    f"input_ids must hold each window of {self._own} tokens {self.times} times, "
                    f"got {ids}"
                )
            kept += whole[: self._own]
        return kept + ids[end:]

    def parse(self, input_ids: Sequence[int]) -> dict[str, Any]:
        """What the task reads in it."""
        return self.task.parse(self.once(input_ids))

    def floor(self) -> dict[int, float]:
        """The task's."""
        return self.task.floor()

    def majority(self) -> Majority:
        """The task's."""
        return self.task.majority()

    def chance(self) -> float:
        """The task's."""
        return self.task.chance()

    def only(self, *difficulties: int) -> Repeated:
        """The task limited to examples of some difficulties, as often."""
        return Repeated(self.task.only(*difficulties), self.times)

    def kinds(self, example: Mapping[str, Any]) -> Sequence[str] | None:
        """The task's."""
        return self.task.kinds(self._example(example))

    def describe(self, example: Mapping[str, Any]) -> str:
        """The task's words."""
        return self.task.describe(self._example(example))

    def _example(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """An example as the task itself has it, labels apart."""
        return {**example, "input_ids": self.once(example["input_ids"])}
