"""What is learned task after task: rows of tokens to train on, and a test for each task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybrid_sleep.eval.tasks.sampling import Stream
from hybrid_sleep.parametric.sites import frozen

# Labels that nothing is learned of, as in transformers.
IGNORED = -100


class TaskStream(ABC):
    """Tasks 0, 1, ... in the order in which they are learned; the same whenever it is made anew.

    name: what the kind is called where one is chosen.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def tasks(self) -> list[str]:
        """What each task is called."""

    @property
    @abstractmethod
    def measured(self) -> str:
        """What accuracy is the share of, in words."""

    @property
    @abstractmethod
    def about(self) -> str:
        """What a reader of a table has to know of it, in sentences."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON values that say all that rows and tests depend on."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Of a model that learns it."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of a row, pads among them."""

    @property
    @abstractmethod
    def begin(self) -> int:
        """The first id of every row, from which a model writes rows of its own."""

    @property
    def pad(self) -> int | None:
        """The id that ends a row and fills it up to `length`; None where all rows are full."""
        return None

    @abstractmethod
    def batch(
        self,
        task: int,
        count: int,
        source: Stream,
        *,
        progress: float | None = 1.0,
        after: int | None = None,
    ) -> Tensor:
        """`count` rows of `task` for training, drawn with replacement: ids `[count, length]`.

        progress: how much of the training on the task is over, 0 to 1, where its rows come in an
        order; None: rows of all of it, as one who stored them has them. after: without what is no
        longer true when so many tasks are over; None: with it.
        """

    @abstractmethod
    def accuracy(self, model: nn.Module, task: int, *, context: Sequence[int] = ()) -> float:
        """The share of the test of `task` that is answered. context: ids in front of each row."""

    @abstractmethod
    def floor(self, task: int) -> float:
        """What the best guess without any memory of the past scores."""

    def apart(
        self, model: nn.Module, learned: int, context: Callable[[int], Sequence[int]]
    ) -> dict[str, float | None]:
        """What else is measured when `learned` tasks are over; None where there is nothing yet.

        context: of a task, ids in front of each row.
        """
        return {}

    def labels(self, rows: Tensor) -> Tensor:
        """`rows` as labels: every token is to be predicted, but for pads behind the first."""
        labels = rows.clone()
        if self.pad is not None:
            labels[(rows == self.pad).cumsum(dim=1) > 1] = IGNORED
        return labels

    def without_pads(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Each row as it is with one pad at its end; one without pads as it is."""
        if self.pad is None:
            return [list(row) for row in rows]
        return [list(row[: row.index(self.pad) + 1 if self.pad in row else None]) for row in rows]


@torch.no_grad()
def answered(
    model: nn.Module,
    rows: Tensor,
    context: Sequence[int],
    answer: Callable[[Tensor], Tensor],
    at_once: int | None = None,
) -> Tensor:
    """What `answer` makes of the logits of `rows: [B, T]`, with `context` in front of each.

    answer: gets logits `[b, context + T, vocabulary]` of `at_once` rows (None: all), and gives a
    tensor `[b, ...]`.
    """
    device = next(model.parameters()).device
    front = torch.tensor(list(context), dtype=torch.long).expand(len(rows), -1)
    ids = torch.cat((front, rows), dim=1).to(device)
    with frozen(model):
        parts = [
            answer(model(input_ids=part, use_cache=False).logits)
            for part in ids.split(at_once or len(ids))
        ]
    return torch.cat(parts).cpu()
