"""Texts with intents out of files as the hub has them, read by `datasets` from a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What `datasets` calls a kind of file, and how their names end.
KINDS = {"parquet": (".parquet",), "json": (".json", ".jsonl"), "csv": (".csv",)}


def read_split(
    folder: Path, split: str, column: str, names: Sequence[str]
) -> list[tuple[str, int]]:
    """The texts of a split, each with the place of its intent in `names`, in the files' order.

    Files are those of `folder` and below with `split` as a word of the name of the file or of a
    folder, such as train-00000-of-00001.parquet or train/0000.parquet: Parquet, JSON (lines or a
    list) or CSV, the first kind of which there are some. They have the columns `text` and `column`,
    which holds a place in `names`, a `ClassLabel` over these names, or a name.

    Raises FileNotFoundError for a folder or files that are not there; ValueError for files that
    cannot be read, without these columns or without rows, for what is no text, and for an intent
    that is none of `names`, naming its row.
    """
    kind, files = _files(folder, split)
    data = _load(kind, files, split)
    lacking = [name for name in ("text", column) if name not in data.column_names]
    if lacking:
        raise ValueError(
            f"data must have the columns text and {column}, got {', '.join(data.column_names)} in "
            f"split {split} of {str(folder)!r}"
        )
    if not len(data):
        raise ValueError(f"data must have rows, got none in split {split} of {str(folder)!r}")
    places = {name: place for place, name in enumerate(names)}
    classes = getattr(data.features[column], "names", None)
    found = []
    for row, (text, label) in enumerate(zip(data["text"], data[column], strict=True)):
        if not isinstance(text, str):
            raise ValueError(f"text must be text, got {text!r} in row {row} of split {split}")
        intent = label
        if classes is not None and type(label) is int and 0 <= label < len(classes):
            intent = classes[label]
        place = places.get(intent) if isinstance(intent, str) else intent
        if type(place) is not int or not 0 <= place < len(names):
            raise ValueError(
                f"{column} must be an integer of 0 to {len(names) - 1} or one of the {len(names)} "
                f"published names, got {intent!r} in row {row} of split {split}"
            )
        found.append((text, place))
    return found


def _files(folder: Path, split: str) -> tuple[str, list[str]]:
    """The kind of files that a split has, and where they are."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data must be a folder that is there, got {str(folder)!r}")
    word = re.compile(rf"(?<![a-z]){split}(?![a-z])")
    for kind, ends in KINDS.items():
        files = [
            str(path)
            for path in sorted(folder.rglob("*"))
            if path.suffix in ends and word.search(path.relative_to(folder).as_posix().lower())
        ]
        if files:
            return kind, files
    raise FileNotFoundError(
        f"data must be a folder with Parquet, JSON or CSV files that have {split!r} in their "
        f"names, got {str(folder)!r} without any"
    )


def _load(kind: str, files: list[str], split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            "the package datasets must be installed (pip install 'hybrid-sleep[train]'), "
            f"got {error}"
        ) from error
    try:
        return load_dataset(kind, data_files={split: files}, split=split)
    except Exception as error:  # builders and file formats all raise their own
        cause = error.__cause__ or error
        reason = str(cause).strip().partition("\n")[0]
        raise ValueError(
            f"data must be files that datasets reads, got {', '.join(files)}, which cannot be read "
            f"({type(cause).__name__}: {reason})"
        ) from error
