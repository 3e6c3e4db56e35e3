"""Batches: a task's, the same whenever they are made again, and what a model needs in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from hybrid_sleep.eval.tasks import IGNORED
from hybrid_sleep.training.depth import Difficulties, Drawn, depths_of

if TYPE_CHECKING:
    from hybrid_sleep.eval.tasks import Task

TRAIN_SPLIT = "train"


class TaskBatches(Dataset):
    """Item i is the i-th micro-batch of this rank: what `task.batch` gives, `size` rows of it.

    A step reads `size * accumulate * world` examples. They depend on `(seed, step)` and nothing
    else: they are drawn in blocks of `task.block` examples, each from a seed of its own, and a rank
    draws the blocks that its rows lie in. So ranks and worker processes read apart, any number of
    them reads the same steps, and a resumed run goes on without drawing what it has read.
    `length`: number of items. `asked(step)`: for each group of a step's rows, the difficulties that
    it is limited to, see `Task.only`; None: to none. All groups have `size` rows of an item, drawn
    from the same seeds, one below other; those of shorter examples go on, without labels.

    Where examples ask about one context `together`, each group is as many groups of different
    contexts, so that a model may read these once for all of them; see `depths`. Raises ValueError
    unless `size` is a multiple of it, and IndexError past the end.
    """

    def __init__(
        self,
        task: Task,
        *,
        length: int,
        size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        asked: Callable[[int], Sequence[Difficulties | None]] = lambda step: (None,),
    ):
        self.asked = asked
        if size % task.together:
            raise ValueError(
                f"size must be a multiple of the {task.together} examples that ask about one "
                f"context, got {size}"
            )
        self.task, self.length, self.size, self.seed = task, length, size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.rows = size * world * accumulate
        self._blocks: dict[tuple[int, int, Difficulties | None], dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"batch must be in 0..{self.length - 1}, got {index}")
        step, part = divmod(index, self.accumulate)
        start = (part * self.world + self.rank) * self.size
        block = self.task.block
        first, last = start // block, (start + self.size - 1) // block
        rows = slice(start - first * block, start - first * block + self.size)
        groups = []
        for asked in self.asked(step):
            parts = [self._block(step, number, asked) for number in range(first, last + 1)]
            group = {name: torch.cat([p[name] for p in parts])[rows] for name in parts[0]}
            apart = self.task.together
            groups += [{name: x[i::apart] for name, x in group.items()} for i in range(apart)]
        columns = max(group["labels"].shape[1] for group in groups)
        groups = [_as_long(group, columns) for group in groups]
        return {name: torch.cat([group[name] for group in groups]) for name in groups[0]}

    def depths(self, drawn: Drawn) -> Drawn:
        """The depth of each group of an item's rows, of those that a policy has `drawn`."""
        return drawn if self.task.together == 1 else depths_of(drawn, self.task.together)

    def _block(self, step: int, number: int, asked: Difficulties | None) -> dict[str, torch.Tensor]:
        key = (step, number, asked)
        if key not in self._blocks:
            # Micro-batches of a step share blocks; earlier steps do not come back.
            self._blocks = {key: rows for key, rows in self._blocks.items() if key[0] == step}
            count = min(self.task.block, self.rows - number * self.task.block)
            seed = derive_seed("train", self.seed, step, number)
            task = self.task if asked is None else self.task.only(*asked)
            self._blocks[key] = task.batch(TRAIN_SPLIT, seed, count)
        return self._blocks[key]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Examples to evaluate a model on while it trains, at each of `depths`.

    They come from the training split, from a seed that no training batch uses: evaluating on the
    test split, and stopping or tuning by it, would leave no clean number for the end.
    """

    task: Task
    depths: tuple[int, ...]
    count: int = 1000
    seed: int = 0
    batch_size: int = 250

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The examples, at most `batch_size` at a time."""
        whole = self.task.batch(TRAIN_SPLIT, held_out_seed(self.seed), self.count)
        for start in range(0, self.count, self.batch_size):
            yield {name: rows[start : start + self.batch_size] for name, rows in whole.items()}

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class MarkSupervised:
    """A data collator that also says which tokens a loss is computed on.

    collator: makes batches with `labels`, -100 where unsupervised. `supervised: [B, T]` is added,
    from which the model knows which windows may sleep where Trainer keeps the labels to itself:
    with label smoothing, with `compute_loss_func`, and in trl's SFTTrainer.

        Trainer(model, args, data_collator=MarkSupervised(collator), ...)

    Raises ValueError where a batch has no labels.
    """

    collator: Callable[..., dict[str, Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = mark_supervised(self.collator(*args, **kwargs))
        if "supervised" not in batch:
            raise ValueError(
                "MarkSupervised needs a collator that makes `labels`, got a batch of "
                f"{', '.join(batch)}"
            )
        return batch


def mark_supervised(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` with `supervised`, the tokens that have a label, where it has labels."""
    labels = batch.get("labels")
    return dict(batch) if labels is None else {**batch, "supervised": labels != IGNORED}


def _as_long(rows: dict[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
    """`rows` with so many columns: their last token again, where nothing is learned."""
    more = columns - rows["labels"].shape[1]
    if more == 0:
        return rows
    last = rows["input_ids"][:, -1:].expand(-1, more)
    behind = {"input_ids": last, "labels": torch.full_like(last, IGNORED)}
    behind["attention_mask"] = torch.zeros_like(last)
    return {name: torch.cat([x, behind[name].to(x.dtype)], dim=1) for name, x in rows.items()}


def labelled_columns(batch: Mapping[str, Any]) -> int | None:
    """How many of the last columns have the logits that the labels of `batch` need; None: all.

    Where only the end of each row is supervised, as in most tasks, the other logits are a good part
    of a small model's work.
    """
    labels = batch.get("labels")
    if labels is None or {"attention_mask", "document_ids", "position_ids"} & batch.keys():
        return None
    columns = (labels != IGNORED).any(0).nonzero()
    # A label is predicted one column before it.
    first = int(columns[0]) - 1 if len(columns) else 0
    return labels.shape[1] - first if first > 0 else None


def held_out_seed(seed: int) -> int:
    """Where in the training split a run with `seed` finds examples that it never trains on."""
    return derive_seed("held out", seed)


def derive_seed(*parts: Any) -> int:
    """A seed below 2**63 for `parts`, the same on every machine and in every version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def only_item(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate for a dataset whose items are batches already."""
    (item,) = items
    return item
