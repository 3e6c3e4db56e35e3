"""What text a run learns from and how it is cut into rows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict
from pydantic.dataclasses import dataclass

from hybrid_sleep.training.schema import (
    STRICT,
    CountFrom0,
    FilePath,
    Flag,
    Name,
    Number,
    Text,
    as_path,
)
from hybrid_sleep.validation import LARGEST


def _data_files(given: Any) -> Any:
    """Paths as they are: one, several, or those of each split."""
    if isinstance(given, dict):
        return {split: _data_files(paths) for split, paths in given.items()}
    if isinstance(given, list) and given:
        return [as_path(path) for path in given]
    return None if given is None else as_path(given)


@dataclass(kw_only=True, config=STRICT)
class DatasetConfig:
    """What `datasets.load_dataset` takes, and the `column` that holds text or ready tokens."""

    path: FilePath
    name: Text | None = None
    split: Name = "train"
    data_files: Annotated[
        Any,
        BeforeValidator(_data_files),
        "null, a path, a list of paths, or one of these for each split",
    ] = None
    streaming: Flag = False
    column: Name = "text"


@dataclass(kw_only=True, config=STRICT)
class TextConfig:
    """The `text` of a run: language modelling on documents.

    Exactly one of `files` (paths and glob patterns of UTF-8 files; `separator` divides a file into
    documents, None: a file is one) and `dataset` (a row is a document).

    `tokenizer`: `bytes`, which is built in, or a folder or hub name of transformers. A training row
    has `length` tokens, T; `packing` puts several documents into one, each unseen by the others,
    False gives each document rows of its own, the last one padded. Documents are shuffled within
    blocks of `shuffle` (0: not at all).

    `held_out`, a share of at most a half, is kept from training for evaluation: of every
    1 / held_out documents one; where the source has fewer than that, the end of each.
    """

    files: Annotated[
        list[Annotated[FilePath, "the path of a file, or a glob pattern"]],
        Field(min_length=1),
        "a list of paths and glob patterns",
    ] | None = None
    dataset: DatasetConfig | None = None
    tokenizer: Annotated[FilePath, "bytes, a folder or a name on the hub"] = "bytes"
    length: Annotated[int, Strict(), Field(ge=2, le=LARGEST), "an integer of at least 2"]
    packing: Flag = True
    separator: Annotated[Text, Field(min_length=1), "text between documents"] | None = None
    held_out: Annotated[Number, Field(ge=0, le=0.5), "a share of the documents, 0 to 0.5"] = 0.02
    shuffle: CountFrom0 = 1000

    def __post_init__(self) -> None:
        if (self.files is None) == (self.dataset is None):
            given = "neither" if self.files is None else "both"
            raise ValueError(f"one of text.files and text.dataset must be given, got {given}")
        if self.separator is not None and self.files is None:
            raise ValueError(
                "text.separator must be null for text.dataset, whose rows are documents, got "
                f"{self.separator!r}"
            )
