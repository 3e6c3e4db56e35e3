"""What text a run learns from and how it is cut into rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybrid_sleep.training.schema import as_path, only_known

# Keys of `text.dataset` and their defaults; None is what `datasets.load_dataset` takes for absent.
DATASET_KEYS = {
    "path": None,
    "name": None,
    "split": "train",
    "data_files": None,
    "streaming": False,
    "column": "text",
}


@dataclass(kw_only=True)
class TextConfig:
    """The `text` of a run: language modelling on documents.

    Exactly one of `files` (paths and glob patterns of UTF-8 files; `separator` divides a file into
    documents, None: a file is one) and `dataset` (keys of `datasets.load_dataset` and `column`,
    which holds text or ready tokens; a row is a document).

    `tokenizer`: `bytes`, which is built in, or a folder or hub name of transformers. A training row
    has `length` tokens, T; `packing` puts several documents into one, each unseen by the others,
    False gives each document rows of its own, the last one padded. Documents are shuffled within
    blocks of `shuffle` (0: not at all).

    `held_out`, a share of at most a half, is kept from training for evaluation: of every
    1 / held_out documents one; where the source has fewer than that, the end of each.
    """

    files: list[str] | None = None
    dataset: dict[str, Any] | None = None
    tokenizer: str = "bytes"
    length: int
    packing: bool = True
    separator: str | None = None
    held_out: float = 0.02
    shuffle: int = 1000

    def __post_init__(self) -> None:
        def demand(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ValueError(f"text.{name}={getattr(self, name)!r}; allowed: {allowed}")

        if (self.files is None) == (self.dataset is None):
            given = "neither" if self.files is None else "both"
            raise ValueError(f"text.files and text.dataset: {given} given; allowed: one of the two")
        if self.files is not None:
            demand(len(self.files) > 0, "files", "a list of paths and glob patterns")
            self.files = [
                as_path(f"text.files[{i}]", path, "the path of a file, or a glob pattern")
                for i, path in enumerate(self.files)
            ]
        if self.dataset is not None:
            self._check_dataset()
        names = "bytes, a folder or a name on the hub"
        demand(bool(self.tokenizer.strip()), "tokenizer", names)
        self.tokenizer = as_path("text.tokenizer", self.tokenizer, names)
        demand(self.length >= 2, "length", "an integer >= 2")
        demand(
            self.separator is None or (self.separator != "" and self.files is not None),
            "separator",
            "null (always, for text.dataset) or text between the documents of a file",
        )
        demand(0 <= self.held_out <= 0.5, "held_out", "a share of the documents, 0..0.5")
        demand(self.shuffle >= 0, "shuffle", "an integer >= 0")

    def _check_dataset(self) -> None:
        only_known(self.dataset, DATASET_KEYS, "text.dataset.")
        self.dataset = {**DATASET_KEYS, **self.dataset}
        for key in ("path", "split", "column"):
            value = self.dataset[key]
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"text.dataset.{key}={value!r}; allowed: text")
        self.dataset["path"] = as_path("text.dataset.path", self.dataset["path"], "text")
        self.dataset["data_files"] = _files(self.dataset["data_files"])
        if not isinstance(self.dataset["streaming"], bool):
            raise ValueError(
                f"text.dataset.streaming={self.dataset['streaming']!r}; allowed: true, false"
            )


def _files(given: Any) -> Any:
    """`text.dataset.data_files`, paths in it as they are: one, several, or those of each split."""
    name = "text.dataset.data_files"
    if isinstance(given, dict):
        return {split: _files(paths) for split, paths in given.items()}
    if isinstance(given, list) and given:
        return [as_path(f"{name}[{i}]", path, "a path") for i, path in enumerate(given)]
    return None if given is None else as_path(name, given, "null, a path, or a list of them")
