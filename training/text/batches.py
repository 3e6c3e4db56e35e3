"""Rows of tokens: the same global sequence of batches for any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from hybrid_sleep.training.text.config import TextConfig
from hybrid_sleep.training.text.source import Shuffler, TextSource
from hybrid_sleep.training.text.tokenizer import Encoder
from hybrid_sleep.validation import check_count

IGNORED = -100
NO_DOCUMENT = -1


class TextBatches(IterableDataset):
    """Endless training batches of the documents of `source`, already collated.

    A step has `rows` rows, one from each stream. Document d of the shuffled, endless source belongs
    to stream d mod `rows`; a stream joins its documents, an eos token behind each, into rows of T
    tokens. A document cut by the end of a row goes on in the next as a document of its own. Rank r
    of `world` has the streams of its share, in order, in `accumulate` micro-batches a step. So what
    a step trains on depends on the source's config, `rows` and `seed` alone.

    An item is a micro-batch of b = rows / (world * accumulate) rows:
        input_ids: LongTensor `[b, T]`.
        labels: the same, unshifted; -100 at pads and at the first token of each document, which
            nothing precedes.
        document_ids: LongTensor `[b, T]`, 0, 1, 2... within a row, -1 at pads.
        position: where this rank is behind the item (see `merge_positions`).

    `start` is what `merge_positions` returned, of any number of ranks: the batches go on as if
    nothing had stopped. In a DataLoader, use `batch_size=None` and at most one worker.

    Raises ValueError for shares that are not even, and for a start of another run.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: Any,
        *,
        rows: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: dict[str, Any] | None = None,
    ):
        if rows % (world * accumulate):
            raise ValueError(
                f"train.batch_size must be a multiple of {world * accumulate}, the number of "
                f"processes ({world}) times train.accumulate ({accumulate}), got {rows}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..{world - 1}, of {world} processes, got {rank}")
        if start is not None:
            start = _in_todays_words(start)
            for name, now in (("rows", rows), ("seed", seed), ("size", source.size)):
                if start[name] != now:
                    raise ValueError(
                        f"{name} of the text must be {start[name]}, as where it is to go on, got "
                        f"{now}"
                    )
        self.source, self.encoder = source, Encoder(tokenizer)
        self.rows, self.accumulate, self.seed, self.start = rows, accumulate, seed, start
        share = rows // world
        self.streams = range(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                "num_workers must be 0 or 1, because the streams of a rank read their documents in "
                f"order, got {worker.num_workers}"
            )
        start = self.start or {
            "step": 0,
            "source": None,
            "streams": [[first, 0] for first in range(self.rows)],
        }
        begun = start["streams"][self.streams.start : self.streams.stop]
        shuffler = Shuffler(
            self.source,
            seed=self.seed,
            rows=self.rows,
            wanted={
                stream: document for stream, (document, _) in zip(self.streams, begun, strict=True)
            },
            start=start["source"],
        )
        streams = [
            Stream(
                lambda number: self.encoder(shuffler.take(number)),
                self.source.config,
                document=document,
                used=used,
                stride=self.rows,
            )
            for document, used in begun
        ]
        size = len(streams) // self.accumulate
        for step in itertools.count(start["step"] + 1):
            for part in range(self.accumulate):
                chosen = streams[part * size : (part + 1) * size]
                rows = [stream.row() for stream in chosen]
                batch: dict[str, Any] = collate(rows, self.source.config, self.encoder)
                if bool((batch["labels"] == IGNORED).all()):
                    raise ValueError(
                        "text must have a token to predict in every batch, got one of "
                        f"{size} rows with but one token of a document each in step {step}; longer "
                        "documents, text.packing=true or another text.length help"
                    )
                batch["position"] = {
                    "rows": self.rows,
                    "seed": self.seed,
                    "size": self.source.size,
                    "step": step,
                    "parts_left": self.accumulate - part - 1,
                    "first_stream": self.streams.start,
                    "streams": [[stream.document, stream.used] for stream in streams],
                    "source": shuffler.place(min(stream.document for stream in streams)),
                }
                yield batch


def merge_positions(positions: list[dict[str, Any]]) -> dict[str, Any]:
    """What `TextBatches(start=...)` takes, from the last position of every rank of a step.

    JSON can hold it: two numbers a stream, and where to read on. Raises ValueError unless the
    positions are all streams of one step, after its last micro-batch.
    """
    parts = sorted(positions, key=lambda part: part["first_stream"])
    streams = [stream for part in parts for stream in part["streams"]]
    shared = {name: parts[0][name] for name in ("rows", "seed", "size", "step")}
    firsts = itertools.accumulate((len(part["streams"]) for part in parts), initial=0)
    whole = len(streams) == shared["rows"] and all(
        part["first_stream"] == first
        and part["parts_left"] == 0
        and all(part[name] == value for name, value in shared.items())
        for part, first in zip(parts, firsts, strict=False)
    )
    if not whole:
        found = [(p["step"], p["parts_left"], p["first_stream"], len(p["streams"])) for p in parts]
        raise ValueError(
            f"positions must be those of all {shared['rows']} streams after the last micro-batch "
            f"of one step, got (step, micro-batches left, first stream, streams) {found}"
        )
    oldest = min(document for document, _ in streams)
    places = [part["source"] for part in parts if part["source"]["first"] <= oldest]
    source = max(places, key=lambda place: place["first"])
    return {**shared, "streams": streams, "source": source}


def _in_todays_words(position: dict[str, Any]) -> dict[str, Any]:
    """A position as it is written today: checkpoints of earlier versions have other names in it."""
    size = {"chunks" if key == "pieces" else key: n for key, n in position["size"].items()}
    position = {"streams" if key == "lanes" else key: x for key, x in position.items()}
    return {**position, "size": size}


class TextHeldOut:
    """Batches of the documents that training never reads, always the same, to measure at `depths`.

    One stream reads them in order into at most `count` rows (None: all); the last may have pads.
    A batch has at most `batch_size` rows and the tensors of a `TextBatches` item; `len` is the
    number of rows. Documents are read when one of these is first used. Raises ValueError then
    if there are none.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: Any,
        *,
        depths: tuple[int, ...],
        count: int | None = None,
        batch_size: int = 8,
    ):
        for name, value in (("count", count), ("batch_size", batch_size)):
            if value is not None:
                check_count(name, value)
        self.source, self.encoder = source, Encoder(tokenizer)
        self.depths, self.count, self.batch_size = depths, count, batch_size

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The rows, at most `batch_size` at a time."""
        for start in range(0, len(self), self.batch_size):
            rows = self._rows[start : start + self.batch_size]
            yield collate(rows, self.source.config, self.encoder)

    @cached_property
    def _rows(self) -> list[list[np.ndarray]]:
        documents = (self.encoder(self.source.read(h)) for h in self.source.held_out())
        stream = Stream(lambda _: next(documents, None), self.source.config)
        rows = list(itertools.islice(iter(stream.row, []), self.count))
        if not rows:
            raise ValueError(
                "text.held_out must be a share that keeps a document of this source for "
                f"evaluation, at most 0.5, got {self.source.config.held_out!r}"
            )
        return rows


class Stream:
    """Joins documents `document`, `document + stride`... into rows of T tokens.

    `read(number)` gives the tokens of a document, None behind the last. The next row begins behind
    token `used` of `document`.
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray | None],
        config: TextConfig,
        *,
        document: int = 0,
        used: int = 0,
        stride: int = 1,
    ):
        self.read, self.length, self.packing = read, config.length, config.packing
        self.document, self.used, self.stride = document, used, stride
        self._tokens: np.ndarray | None = None

    def row(self) -> list[np.ndarray]:
        """Tokens of the next row, document by document; none behind the last."""
        parts: list[np.ndarray] = []
        space = self.length
        while space and (self.packing or not parts):
            if self._tokens is None:
                self._tokens = self.read(self.document)
                if self._tokens is None:
                    break
            part = self._tokens[self.used : self.used + space]
            parts.append(part)
            space -= len(part)
            self.used += len(part)
            if self.used == len(self._tokens):
                self._tokens, self.used = None, 0
                self.document += self.stride
        return parts


def collate(
    rows: list[list[np.ndarray]], config: TextConfig, encoder: Encoder
) -> dict[str, torch.Tensor]:
    """Rows, each the tokens of its documents, as `input_ids`, `labels` and `document_ids`."""
    shape = (len(rows), config.length)
    ids = np.full(shape, encoder.pad, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    documents = np.full(shape, NO_DOCUMENT, dtype=np.int64)
    for i, parts in enumerate(rows):
        start = 0
        for number, part in enumerate(parts):
            stop = start + len(part)
            ids[i, start:stop] = part
            labels[i, start + 1 : stop] = part[1:]
            documents[i, start:stop] = number
            start = stop
    arrays = {"input_ids": ids, "labels": labels, "document_ids": documents}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
