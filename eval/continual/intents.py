"""Streams of intents: each task is to say what texts of some of the intents are about.

A row is a first token, the text, a separator, the one token of the intent, and a token that ends
it. CLINC150 comes a domain at a time, or either data set so many intents at a time; the texts come
out of a folder, see `read_split`.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybrid_sleep.eval.continual.intent_data import read_split
from hybrid_sleep.eval.continual.intent_names import BANKING77, CLINC150, CLINC150_DOMAINS
from hybrid_sleep.eval.continual.stream import TaskStream, answered
from hybrid_sleep.eval.tasks.sampling import Stream
from hybrid_sleep.training.text.source import Document
from hybrid_sleep.training.text.tokenizer import BYTES, Encoder, load_tokenizer
from hybrid_sleep.validation import check_choice, check_count

SCOPES = ("all", "task")
SPLITS = ("train", "test")
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Read:
    """Rows of a split, `[count, length]` for each task, and what was done to its texts."""

    rows: list[Tensor]
    cut: int
    out_of_scope: int

    @property
    def count(self) -> int:
        """Rows of all tasks."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class IntentStream(TaskStream):
    """Intents of the texts in the folder `data`.

    intents: of a task. shuffled: seed of the order of what makes up tasks; None: as published.
    scope: what an answer is chosen from, the intents of all tasks ("all", class-incremental
    learning) or of the task that asks ("task", task-incremental). text_length: tokens of a text,
    the rest of a longer one is cut off. tokenizer: see `load_tokenizer`; bytes need no file.

    Raises ValueError for numbers that cannot be and for a task without texts, and what `read_split`
    and `load_tokenizer` raise.
    """

    title: ClassVar[str]
    column: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    data: Path | str
    intents: int | None = None
    shuffled: int | None = None
    scope: str = "all"
    text_length: int = 64
    tokenizer: str = BYTES

    def __post_init__(self) -> None:
        if not isinstance(self.data, (str, Path)):
            raise ValueError(f"data must be the path of a folder, got {self.data!r}")
        if not isinstance(self.tokenizer, str):
            raise ValueError(f"tokenizer must be a name, got {self.tokenizer!r}")
        check_choice("scope", self.scope, SCOPES)
        check_count("text_length", self.text_length)
        if self.shuffled is not None:
            check_count("shuffled", self.shuffled, 0)
        # Before any file is read.
        tasks = self.tasks
        for split, read in self._read.items():
            for task, rows in zip(tasks, read.rows, strict=True):
                if not len(rows):
                    raise ValueError(
                        f"data must have texts of every task, got none of {task!r} in split {split}"
                    )

    @abstractmethod
    def published(self) -> dict[str, tuple[str, ...]]:
        """Names of intents by what makes up a task where `intents` is None."""

    @cached_property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """The intents of each task, by the name of the task: places in `names`."""
        parts = list(self.published().items())
        if self.intents is not None:
            every = [name for _, names in parts for name in names]
            check_count("intents", self.intents, 1, len(every))
            if len(every) % self.intents:
                raise ValueError(f"intents must divide {len(every)}, got {self.intents}")
            if self.shuffled is not None:
                Stream(self.shuffled).shuffle(every)
            parts = [
                (f"intents {i + 1} to {i + self.intents}", tuple(every[i : i + self.intents]))
                for i in range(0, len(every), self.intents)
            ]
        elif self.shuffled is not None:
            Stream(self.shuffled).shuffle(parts)
        return {task: tuple(map(self.names.index, names)) for task, names in parts}

    @property
    def tasks(self) -> list[str]:
        """Domains, or which of the intents."""
        return list(self.groups)

    @property
    def measured(self) -> str:
        """An answer is chosen among the intents of `scope`."""
        every = sum(map(len, self.groups.values()))
        among = f"of the {every} of all tasks" if self.scope == "all" else "of those of its task"
        return f"test texts whose intent is the likeliest {among}"

    @property
    def about(self) -> str:
        """How many texts, and what was cut and left out."""
        train, test = (self._read[split] for split in SPLITS)
        left_out = train.out_of_scope + test.out_of_scope
        told = (
            f"{self.title} in {len(self.tasks)} tasks, {train.count:,} texts for training and "
            f"{test.count:,} for tests. Tokens: {self._tokenizer_name}; of texts longer than "
            f"{self.text_length}, {train.cut:,} for training and {test.cut:,} for tests, the rest "
            "is cut off."
        )
        return told + f" Left out: {left_out:,} texts out of scope." * bool(left_out)

    @property
    def settings(self) -> dict[str, Any]:
        """All fields but where the data are, of which there is a digest of all rows."""
        digest = hashlib.blake2b(digest_size=16)
        for read in self._read.values():
            for rows in read.rows:
                digest.update(str(tuple(rows.shape)).encode() + rows.numpy().tobytes())
        return {
            "intents": self.intents,
            "shuffled": self.shuffled,
            "scope": self.scope,
            "text_length": self.text_length,
            "tokenizer": self._tokenizer_name,
            "rows": digest.hexdigest(),
        }

    @property
    def vocab_size(self) -> int:
        """Tokens of texts, the three of rows, and one for each of `names`."""
        return self.label(len(self.names))

    @property
    def length(self) -> int:
        """Tokens of a row, pads among them."""
        return self.text_length + 4

    @property
    def begin(self) -> int:
        """The first token, behind those of texts."""
        return len(self._encoder.tokenizer)

    @property
    def separator(self) -> int:
        """Stands between text and intent."""
        return self.begin + 1

    @property
    def pad(self) -> int:
        """Stands behind the intent."""
        return self.begin + 2

    def label(self, intent: int) -> int:
        """The token of an intent, by its place in `names`."""
        return self.begin + 3 + intent

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
        rows = self._read["train"].rows[task]
        return rows[[source.below(len(rows)) for _ in range(count)]]

    def accuracy(self, model: nn.Module, task: int, *, context: Sequence[int] = ()) -> float:
        """The share of the task's test texts behind which their intent is the likeliest of `scope`.

        The model reads each text up to the separator. context: ids in front of each.
        """
        rows = self._read["test"].rows[task]
        right, behind = self._labels(rows)
        questions = rows.masked_fill(torch.arange(self.length) > behind[:, None], self.pad)
        groups = list(self.groups.values())
        among = sum(groups, ()) if self.scope == "all" else groups[task]
        labels = torch.tensor([self.label(intent) for intent in among])

        def likeliest(logits: Tensor) -> Tensor:
            return logits[:, -self.length :, labels.to(logits.device)].argmax(-1)

        said = answered(model, questions, context, likeliest, ROWS_AT_ONCE)
        return float((labels[said[torch.arange(len(rows)), behind]] == right).double().mean())

    def floor(self, task: int) -> float:
        """The share that the most frequent intent gets right."""
        right, _ = self._labels(self._read["test"].rows[task])
        return int(right.unique(return_counts=True)[1].max()) / len(right)

    def _labels(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The token of each row's intent, and where the separator stands before it."""
        behind = (rows == self.separator).int().argmax(dim=1)
        return rows[torch.arange(len(rows)), behind + 1], behind

    @property
    def _tokenizer_name(self) -> str:
        return Path(self.tokenizer).name

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(load_tokenizer(self.tokenizer))

    @cached_property
    def _read(self) -> dict[str, Read]:
        """Both splits."""
        folder = self._folder(Path(self.data))
        return {
            split: self._rows(read_split(folder, split, self.column, self.names))
            for split in SPLITS
        }

    def _folder(self, data: Path) -> Path:
        return data

    def _rows(self, texts: list[tuple[str, int]]) -> Read:
        task_of = {
            intent: task for task, group in enumerate(self.groups.values()) for intent in group
        }
        rows: list[list[list[int]]] = [[] for _ in self.groups]
        cut = 0
        for text, intent in texts:
            if intent not in task_of:
                continue
            ids = self._encoder(Document(text, False)).tolist()
            cut += len(ids) > self.text_length
            row = [self.begin, *ids[: self.text_length], self.separator, self.label(intent)]
            rows[task_of[intent]].append(row + [self.pad] * (self.length - len(row)))
        kept = [torch.tensor(part, dtype=torch.long).view(-1, self.length) for part in rows]
        return Read(kept, cut, len(texts) - sum(map(len, rows)))


@dataclass(frozen=True)
class Clinc150(IntentStream):
    """CLINC150, `clinc_oos` on the hub: a domain of 15 intents a task, or `intents` intents a task.

    Of a folder with its configurations, `plus` is read. Texts out of scope are left out.
    """

    name: ClassVar[str] = "clinc150"
    title: ClassVar[str] = "CLINC150 (arXiv 1909.02027)"
    column: ClassVar[str] = "intent"
    names: ClassVar[tuple[str, ...]] = CLINC150

    def published(self) -> dict[str, tuple[str, ...]]:
        """The ten domains."""
        return {name.replace("_", " "): names for name, names in CLINC150_DOMAINS.items()}

    def _folder(self, data: Path) -> Path:
        return data / "plus" if (data / "plus").is_dir() else data


@dataclass(frozen=True)
class Banking77(IntentStream):
    """Banking77, `PolyAI/banking77` on the hub: `intents` intents a task, in their order there."""

    name: ClassVar[str] = "banking77"
    title: ClassVar[str] = "Banking77 (arXiv 2003.04807)"
    column: ClassVar[str] = "label"
    names: ClassVar[tuple[str, ...]] = BANKING77

    intents: int | None = 11

    def __post_init__(self) -> None:
        check_count("intents", self.intents)
        super().__post_init__()

    def published(self) -> dict[str, tuple[str, ...]]:
        """All in one."""
        return {"all intents": BANKING77}
