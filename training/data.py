"""Batches of a task, made when they are needed and the same whenever they are made again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from hybrid_sleep.eval.tasks import Task

TRAIN_SPLIT = "train"


class TaskBatches(Dataset):
    """Item i is the i-th training batch of `task`: `input_ids`, `labels`, LongTensors [size, T].

    A batch depends on `(seed, i, rank)` and nothing else, so that a resumed run goes on with the
    batches it would have seen, without making the ones it has, and ranks differ. `length`: number
    of batches; `size`: examples in one. Raises IndexError past the end.
    """

    def __init__(self, task: Task, *, length: int, size: int, seed: int = 0, rank: int = 0):
        self.task, self.length, self.size = task, length, size
        self.seed, self.rank = seed, rank

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"batch {index}; allowed: 0..{self.length - 1}")
        seed = derive_seed("train", self.seed, index, self.rank)
        return self.task.batch(TRAIN_SPLIT, seed, self.size)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Examples to judge a model by while it trains, at each of `depths`.

    They come from the training split, from a seed that no training batch uses: judging by the test
    split, and stopping or tuning by it, would leave no clean number for the end.
    """

    task: Task
    depths: tuple[int, ...]
    count: int = 1000
    seed: int = 0
    batch_size: int = 250

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The examples, at most `batch_size` at a time."""
        seed = derive_seed("held out", self.seed)
        whole = self.task.batch(TRAIN_SPLIT, seed, self.count)
        for start in range(0, self.count, self.batch_size):
            yield {name: rows[start : start + self.batch_size] for name, rows in whole.items()}

    def __len__(self) -> int:
        return self.count


def derive_seed(*parts: Any) -> int:
    """A seed below 2**63 for `parts`, the same on every machine and in every version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def only_item(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate for a dataset whose items are batches already."""
    (item,) = items
    return item
