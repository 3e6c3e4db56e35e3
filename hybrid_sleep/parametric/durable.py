"""What lasts of a folder of facts: files of tensors and transactions, each whole or not there."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.support.io import atomic_path, unreadable

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "hybrid_sleep.facts.1"


def reached(point: str) -> None:
    """Called before, within and after every durable write. Does nothing: tests kill here."""


@contextmanager
def transaction(db: sqlite3.Connection, what: str) -> Iterator[None]:
    """What the block does with `db` happens at once at its end, or, on an exception, not at all.

    Within another one it is part of that.
    """
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        reached(f"before {what}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    reached(f"after {what}")


@contextmanager
def reading(db: sqlite3.Connection) -> Iterator[None]:
    """What the block reads of `db` is of one moment, whatever another process writes."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("COMMIT")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> str:
    """Write `tensors` to a file of safetensors, atomically; returns their digest.

    about: what else the file says, for `read_described`; JSON must have it.
    """
    # Only who reads or writes tensors waits for torch.
    from safetensors.torch import save_file

    from hybrid_sleep.sleep.weights import tensors_digest

    # safetensors refuses views that share storage.
    kept = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    digest = tensors_digest(kept)
    metadata = {"format": FORMAT, "contents": digest}
    if about is not None:
        metadata["about"] = json.dumps(about, allow_nan=False)
    reached(f"before {path.name}")
    with atomic_path(path) as partial:
        save_file(kept, partial, metadata=metadata)
        reached(f"within {path.name}")
    reached(f"after {path.name}")
    return digest


def read_tensors(path: str | os.PathLike, digest: str | None = None) -> dict[str, Tensor]:
    """What `write_tensors` wrote. OSError or ValueError, naming the file, if it is damaged.

    digest: what the tensors must be; None: what the file itself says that they were.
    """
    return _read(path, digest)[0]


def read_described(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that `write_tensors` wrote, and what it was told about them; see `read_tensors`.

    Raises ValueError, too, for a file that says nothing about its tensors.
    """
    tensors, metadata = _read(path, None)
    try:
        about = json.loads(metadata["about"])
        if not isinstance(about, dict):
            raise ValueError(f"a {type(about).__name__}")
    except (KeyError, ValueError) as error:
        raise unreadable(path, "it does not say what its tensors are") from error
    return tensors, about


def _read(path: str | os.PathLike, digest: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    from hybrid_sleep.sleep.weights import tensors_digest

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    if tensors_digest(tensors) != (digest or metadata.get("contents")):
        raise unreadable(path, "its tensors are not those that were saved (SHA-256 differs)")
    return tensors, metadata
