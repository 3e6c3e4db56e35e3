"""Where documents come from, which of them are held out, and in which order streams get them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.training.text.config import TextConfig
from hybrid_sleep.training.text.tokenizer import BYTES, Encoder

# Documents read at a time where they are not shuffled; resuming reads at most as many again.
BLOCK = 256


class Document(NamedTuple):
    """Text, or tokens, of a document; `ends` is False if the source goes on behind it."""

    content: str | list[int]
    ends: bool = True


class TextSource(ABC):
    """The documents of a `TextConfig`, without blank ones, in the order of the source.

    `size` says how much there is, as far as it is known, so that a run is not resumed on another
    source.
    """

    config: TextConfig
    size: dict[str, int]

    @abstractmethod
    def blocks(self, size: int, at: Any = None) -> Iterator[tuple[Any, list[Any]]]:
        """The training documents once, `size` at a time, as handles, and where each block begins.

        Such a place, which JSON can hold, given as `at`, goes on there.
        """

    @abstractmethod
    def held_out(self) -> Iterator[Any]:
        """The documents, as handles, that `blocks` never yields."""

    @abstractmethod
    def read(self, handle: Any) -> Document:
        """The document of a handle."""

    def check(self, tokenizer: Any, *, vocab_size: int, rows: int) -> None:
        """Raise ValueError unless a model of `vocab_size` can train on batches of `rows`."""
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least {len(tokenizer)}, the tokens of text.tokenizer="
                f"{self.config.tokenizer!r}, got {vocab_size}"
            )
        found, teaches, encoder = 0, False, Encoder(tokenizer)
        for _, handles in self.blocks(min(rows, BLOCK)):
            found += len(handles)
            teaches = teaches or any(len(encoder(self.read(handle))) > 1 for handle in handles)
            if teaches and found >= rows:
                return
        if found >= rows:
            raise ValueError(
                "text must hold a document of two tokens or more, of which the first is not "
                "predicted, got none"
            )
        raise ValueError(
            f"text must hold a document for each of train.batch_size={rows} rows, which read "
            f"documents of their own (a file gives one for each {chunk_bytes(self.config)} bytes), "
            f"got {found} to train on"
        )


class HoldOut:
    """Which of `total` documents (None: not known) are held out.

    Of each `every` documents in a row one, drawn by a hash of their place. If there are fewer,
    `tails`: the last `share` of every document.
    """

    def __init__(self, share: float, total: int | None):
        self.share = share
        self.every = round(1 / share) if share else 0
        self.tails = total is not None and total < self.every

    def draws(self, index: int) -> bool:
        """Whether document `index` (0 for the first) is held out whole."""
        if not self.every or self.tails:
            return False
        group, place = divmod(index, self.every)
        return derive_seed("held out", group) % self.every == place

    def tail(self, length: int) -> int:
        """How much of the end of something that long is held out; 0 unless `tails`."""
        return max(1, round(length * self.share)) if self.tails else 0


class Shuffler:
    """Shuffles documents through endless epochs, and gives document d to stream d mod `rows`.

    `wanted`: the streams to serve, and the first document that each still needs. `start`: a `place`
    from which to read on. The shuffle of a block depends on (seed, epoch, block) alone.

    Documents that are read but not yet taken are kept, of files only their places: about as much
    text as the fastest stream is ahead of the slowest.
    """

    def __init__(
        self,
        source: TextSource,
        *,
        seed: int,
        rows: int,
        wanted: dict[int, int],
        start: dict[str, Any] | None = None,
    ):
        self.source, self.seed, self.rows, self.wanted = source, seed, rows, wanted
        self.waiting: dict[int, Any] = {}
        self.start = start or {"first": 0, "epoch": 0, "block": 0, "at": None}
        self.begun: deque[dict[str, Any]] = deque()
        self.reading = self._read_blocks()

    def take(self, number: int) -> Document:
        """Document `number` of a wanted stream; each can be taken once."""
        while number not in self.waiting:
            next(self.reading)
        return self.source.read(self.waiting.pop(number))

    def place(self, oldest: int) -> dict[str, Any]:
        """From where to read to find document `oldest` and all behind it; JSON can hold it."""
        while len(self.begun) > 1 and self.begun[1]["first"] <= oldest:
            self.begun.popleft()
        return self.begun[0] if self.begun else self.start

    def _read_blocks(self) -> Iterator[None]:
        number, epoch, block, at = (self.start[key] for key in ("first", "epoch", "block", "at"))
        size = self.source.config.shuffle or BLOCK
        while True:
            before = number
            for here, handles in self.source.blocks(size, at):
                self.begun.append({"first": number, "epoch": epoch, "block": block, "at": here})
                order: Any = range(len(handles))
                if self.source.config.shuffle:
                    order = shuffled(len(handles), self.seed, epoch, block)
                for place, which in enumerate(order, start=number):
                    if place >= self.wanted.get(place % self.rows, math.inf):
                        self.waiting[place] = handles[which]
                number += len(handles)
                block += 1
                yield
            if number == before and at is None:
                raise ValueError("text must hold documents to train on, got none")
            epoch, block, at = epoch + 1, 0, None


def shuffled(count: int, seed: int, epoch: int, block: int) -> list[int]:
    """0..count-1 in an order that is the same on every machine and in every version."""
    keys = np.random.Philox(key=derive_seed("shuffle", seed, epoch, block)).random_raw(count)
    return np.argsort(keys, kind="stable").tolist()


def chunk_bytes(config: TextConfig) -> int:
    """Bytes of the chunks in which long documents of files are read: about eight rows each.

    A row sees nothing of the rows before it, so longer chunks would only make batches that follow
    each other alike; shorter ones would put the end of one into too many rows.
    """
    return 8 * config.length * (1 if config.tokenizer == BYTES else 4)


def open_source(config: TextConfig) -> TextSource:
    """The source a `TextConfig` names.

    Raises FileNotFoundError or ValueError, naming the key, for anything that is not there or holds
    no text.
    """
    if config.files is not None:
        from hybrid_sleep.training.text.files import FileSource

        return FileSource(config)
    from hybrid_sleep.training.text.dataset import DatasetSource

    return DatasetSource(config)
