"""Documents in the rows of a `datasets` source, streamed or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hybrid_sleep.training.text.config import TextConfig
from hybrid_sleep.training.text.source import Document, HoldOut, TextSource


class DatasetSource(TextSource):
    """Rows of `datasets.load_dataset`, read in order; `column` holds text or lists of token ids.

    A row is read and tokenised in one piece. A place in it is the row's number and, if it streams,
    the library's own state, with which it skips what it can without reading.
    """

    def __init__(self, config: TextConfig):
        self.config = config
        wanted = dict(config.dataset)
        self.column = wanted.pop("column")
        self.streaming = wanted["streaming"]
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                "text.dataset needs the package datasets, which is not installed; allowed: "
                "pip install datasets, or text.files"
            ) from error
        try:
            data = load_dataset(wanted.pop("path"), **wanted)
            first = next(iter(copy.deepcopy(data) if self.streaming else data), None)
        except Exception as error:  # builders, file formats and the hub all raise their own
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"text.dataset={config.dataset!r} cannot be loaded ({reason}); allowed: what "
                "datasets.load_dataset loads"
            ) from error
        if first is None:
            raise ValueError(f"text.dataset={config.dataset!r} has no rows; allowed: at least one")
        if self.column not in first:
            raise ValueError(
                f"text.dataset.column={self.column!r}; allowed: a column of the data set, "
                f"{', '.join(first)}"
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
        for index, row in enumerate(data, start=here["row"]):
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
        for index, row in enumerate(self._from({"row": 0, "state": None})):
            document = self._parts(index, row)[1]
            if document is not None:
                yield document

    def read(self, handle: Document) -> Document:
        return handle

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
                f"text.dataset.column={self.column!r} holds {type(content).__name__} in row "
                f"{index}; allowed: a column of text or of lists of token ids"
            )
        if not content or (isinstance(content, str) and content.isspace()):
            return None, None
        if self._split.draws(index):
            return None, Document(content)
        cut = len(content) - self._split.tail(len(content))
        training = Document(content[:cut], cut == len(content)) if cut else None
        return training, Document(content[cut:]) if cut < len(content) else None
