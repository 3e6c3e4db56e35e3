"""Documents in the rows of a `datasets` source, streamed or not."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hybrid_sleep.training.text.config import TextConfig
from hybrid_sleep.training.text.source import Document, HoldOut, TextSource


class DatasetSource(TextSource):
    """Rows of `datasets.load_dataset`, read in order; `column` holds text or lists of token ids.

    A row is read and tokenised whole. A place in it is the row's number and, if it streams,
    the library's own state, with which it skips what it can without reading.
    """

    def __init__(self, config: TextConfig):
        self.config = config
        assert config.dataset is not None
        wanted = dataclasses.asdict(config.dataset)
        self._named = f"text.dataset={wanted!r}"
        self.column = wanted.pop("column")
        self.streaming = wanted["streaming"]
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                "text.dataset needs the package datasets, which is not installed: "
                "pip install datasets"
            ) from error
        for path in _paths(wanted["data_files"]):
            if os.path.isfile(path) and os.path.getsize(path) == 0:
                raise ValueError(
                    f"text.dataset.data_files must be files with rows, got {path!r}, which is empty"
                )
        with _complaints() as heard:
            try:
                data = load_dataset(wanted.pop("path"), **wanted)
                first = next(iter(copy.deepcopy(data) if self.streaming else data), None)
            except Exception as error:  # builders, file formats and the hub all raise their own
                raise ValueError(
                    f"{self._named} cannot be loaded: {_reason(error, heard)}"
                ) from error
        if first is None:
            raise ValueError(f"{self._named} must have rows, got none")
        if self.column not in first:
            raise ValueError(
                f"text.dataset.column must be a column of the data set, {', '.join(first)}, got "
                f"{self.column!r}"
            )
        # Never iterated itself: an iterable data set has one state for all its iterators.
        self._data = data.select_columns([self.column])
        total = None if self.streaming else len(data)
        self._split = HoldOut(config.held_out, total)
        self.size = {} if total is None else {"rows": total}

    def blocks(
        self, size: int, at: dict[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Any], list[Document]]]:
        here = at or {"row": 0, "state": None}
        data = self._from(here)
        documents: list[Document] = []
        for index, row in self._numbered(data, here["row"]):
            document = self._parts(index, row)[0]
            if document is not None:
                documents.append(document)
            if len(documents) == size:
                yield here, documents
                state = data.state_dict() if self.streaming else None
                here, documents = {"row": index + 1, "state": state}, []
        if documents:
            yield here, documents

    def held_out(self) -> Iterator[Document]:
        for index, row in self._numbered(self._from({"row": 0, "state": None}), 0):
            document = self._parts(index, row)[1]
            if document is not None:
                yield document

    def read(self, handle: Document) -> Document:
        return handle

    def check(self, tokenizer: Any, *, vocab_size: int, rows: int) -> None:
        if not self.streaming:
            self._check_tokens(len(tokenizer))
        super().check(tokenizer, vocab_size=vocab_size, rows=rows)

    def _check_tokens(self, count: int) -> None:
        """Raise ValueError naming the first row that is neither text nor ids below `count`."""
        column = self._data.data.column(self.column)
        kind = str(column.type)
        if kind in ("string", "large_string"):
            return
        if re.match(r"(large_)?list<\w+: u?int\d+", kind):
            # All at once, where Python would take minutes for what is most often in order.
            lists = [chunk.flatten() for chunk in column.chunks]
            if not any(ids.null_count for ids in lists):
                arrays = [ids.to_numpy(zero_copy_only=False) for ids in lists if len(ids)]
                if all(ids.min() >= 0 and ids.max() < count for ids in arrays):
                    return
        for index, row in enumerate(self._data):
            self._parts(index, row)
            content = row[self.column]
            ids = content if isinstance(content, list) else []
            if ids and not 0 <= min(ids) <= max(ids) < count:
                raise ValueError(
                    f"text.dataset must hold token ids in 0..{count - 1}, those of text.tokenizer, "
                    f"got {ids[:8]}... in row {index}"
                )

    def _numbered(self, data: Iterable[dict[str, Any]], first: int) -> Iterator[tuple[int, Any]]:
        """The rows of `data` with their numbers; ValueError where one cannot be read."""
        index = first - 1
        try:
            for index, row in enumerate(data, start=first):
                yield index, row
        except Exception as error:  # file formats and the hub all raise their own
            raise ValueError(
                f"{self._named} cannot be read behind row {index}: {_reason(error, [])}"
            ) from error

    def _from(self, place: dict[str, Any]) -> Any:
        if not self.streaming:
            return self._data.skip(place["row"])
        data = copy.deepcopy(self._data)
        if place["state"] is not None:
            data.load_state_dict(place["state"])
        return data

    def _parts(self, index: int, row: dict[str, Any]) -> tuple[Document | None, Document | None]:
        """What row `index` gives to training and what to evaluation."""
        content = row[self.column]
        if content is not None and not isinstance(content, (str, list)):
            raise ValueError(
                f"text.dataset.column={self.column!r} must hold text or lists of token ids, got "
                f"{type(content).__name__} in row {index}"
            )
        if isinstance(content, list) and not all(type(token) is int for token in content):
            raise ValueError(
                f"text.dataset.column={self.column!r} must hold text or flat lists of token ids, "
                f"got {str(content[:8])[:80]}... in row {index}"
            )
        if not content or (isinstance(content, str) and content.isspace()):
            return None, None
        if self._split.draws(index):
            return None, Document(content)
        cut = len(content) - self._split.tail(len(content))
        training = Document(content[:cut], cut == len(content)) if cut else None
        return training, Document(content[cut:]) if cut < len(content) else None


def _paths(given: Any) -> Iterator[str]:
    """Local paths out of `data_files`, in which one, several or those of each split may be given.

    What is at other places matches nothing here.
    """
    if isinstance(given, str):
        yield from glob.glob(given, recursive=True)
    elif given is not None:
        for part in given.values() if isinstance(given, dict) else given:
            yield from _paths(part)


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """What `datasets` logs meanwhile: the file that is broken stands there and in no exception."""
    heard: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, keep = logging.getLogger("datasets"), Keep(logging.ERROR)
    before = logger.handlers
    logger.handlers = [keep]
    try:
        yield heard
    finally:
        logger.handlers = before


def _reason(error: BaseException, heard: list[str]) -> str:
    """The first line of what was `heard` last, else of the first cause of `error` that has one."""
    reasons, cause = heard[-1:], error
    while not reasons:
        inner = cause.__cause__ or cause.__context__
        text = str(cause).strip()
        if text and (inner is None or not str(inner).strip()):
            reasons = [f"{type(cause).__name__}: {text}"]
        elif inner is None:
            reasons = [type(cause).__name__]
        else:
            cause = inner
    return reasons[0].strip().partition("\n")[0]
