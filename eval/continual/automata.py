"""A stream of elementary automaton rules: each task is one step of another rule, on a ring.

A row is a first token, the task's tag, the cells, a separator and the cells one step later. Every
state of the ring belongs to training or to test, whatever the rule, so a test never asks for a row
that was trained on, and the noise of the labels is exactly 0. Without tags the rules contradict
each other, and no model can know them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hybrid_sleep.eval.continual.stream import TaskStream, answered
from hybrid_sleep.eval.tasks.sampling import TEST_SHARE, Stream, mix
from hybrid_sleep.validation import check_count, check_flag

ZERO, ONE, SEPARATOR, BEGIN, TAG = range(5)


def step(cells: np.ndarray, rule: int) -> np.ndarray:
    """One step of elementary rule `rule` (Wolfram's number, 0 to 255) on rings `[..., width]`."""
    left, right = np.roll(cells, 1, axis=-1), np.roll(cells, -1, axis=-1)
    return (rule >> (4 * left + 2 * cells + right)) & 1


@dataclass(frozen=True)
class RuleStream(TaskStream):
    """Tasks 0, 1, ... of `rules`; rings of `width` cells; tags: whether a row says its task.

    Raises ValueError for rules out of range or given twice, and a width below 3 or above 16.
    """

    name: ClassVar[str] = "rules"

    rules: tuple[int, ...] = (110, 30, 90)
    width: int = 10
    tags: bool = True

    def __post_init__(self) -> None:
        check_count("width", self.width, 3, 16)
        check_flag("tags", self.tags)
        if not isinstance(self.rules, tuple):
            raise ValueError(f"rules must be a tuple of integers, got {self.rules!r}")
        for rule in self.rules:
            check_count("rules", rule, 0, 255)
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules must be one or more, each once, got {list(self.rules)}")

    @property
    def tasks(self) -> list[str]:
        """The rules."""
        return [f"rule {rule}" for rule in self.rules]

    @property
    def measured(self) -> str:
        """A ring counts if all of it is right."""
        return "test rings of which every cell one step later is right"

    @property
    def about(self) -> str:
        """Rules and rings, in words."""
        tags = "each row says its rule" if self.tags else "no row says its rule"
        return f"Rules {', '.join(map(str, self.rules))} on rings of {self.width} cells; {tags}."

    @property
    def settings(self) -> dict[str, Any]:
        """All fields."""
        return {"rules": list(self.rules), "width": self.width, "tags": self.tags}

    @property
    def vocab_size(self) -> int:
        """Cells, separator, first token, and a tag for each task."""
        return TAG + len(self.rules)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return 2 * self.width + 3

    @property
    def begin(self) -> int:
        """The first token."""
        return BEGIN

    def states(self, test: bool) -> np.ndarray:
        """All states for tests, or all for training: `[count, width]`, in a fixed order."""
        numbers = np.arange(2**self.width, dtype=np.uint64)
        chosen = numbers[(mix(numbers) % np.uint64(TEST_SHARE) == 0) == test]
        return ((chosen[:, None] >> np.arange(self.width, dtype=np.uint64)) & np.uint64(1)).astype(
            np.int64
        )

    def rows(self, task: int, states: np.ndarray) -> Tensor:
        """Rows of `task` for `states: [B, width]`: ids `[B, length]`."""
        column = np.ones((len(states), 1), dtype=np.int64)
        tag = TAG + task if self.tags else SEPARATOR
        parts = (
            BEGIN * column,
            tag * column,
            states,
            SEPARATOR * column,
            step(states, self.rules[task]),
        )
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def batch(
        self,
        task: int,
        count: int,
        source: Stream,
        *,
        progress: float | None = 1.0,
        after: int | None = None,
    ) -> Tensor:
        """`count` rows for training, drawn with replacement; they are in no order, and all true."""
        states = self.states(test=False)
        drawn = np.array([source.below(len(states)) for _ in range(count)])
        return self.rows(task, states[drawn])

    @property
    def answer(self) -> int:
        """Where the cells one step later begin in a row."""
        return self.width + 3

    def accuracy(self, model: nn.Module, task: int, *, context: Sequence[int] = ()) -> float:
        """The share of test states of which every cell one step later is the likeliest token.

        That is what greedy decoding answers exactly. context: ids in front of each row.
        """
        rows = self.rows(task, self.states(test=True))
        cells = slice(-self.width - 1, -1)
        said = answered(model, rows, context, lambda logits: logits[:, cells].argmax(-1))
        return float((said == rows[:, -self.width :]).all(-1).double().mean())

    def floor(self, task: int) -> float:
        """The share that the best row for all states alike gets right."""
        after = step(self.states(test=True), self.rules[task])
        return float(np.unique(after, axis=0, return_counts=True)[1].max() / len(after))
