"""What lasts of a folder of facts: files of tensors and transactions, each whole or not there."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_sleep.support.io import atomic_path, unreadable

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "hybrid_sleep.facts.1"


def reached(point: str) -> None:
    """Called before, within and after every durable write. Does nothing: tests kill here."""


@contextmanager
def transaction(db: sqlite3.Connection, what: str) -> Iterator[None]:
    """What the block does with `db` happens at once at its end, or, on an exception, not at all."""
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors` to a file of safetensors, atomically; returns their digest."""
    # Only who reads or writes tensors waits for torch.
    from safetensors.torch import save_file

    from hybrid_sleep.sleep.weights import tensors_digest

    # safetensors refuses views that share storage.
    kept = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    digest = tensors_digest(kept)
    reached(f"before {path.name}")
    with atomic_path(path) as partial:
        save_file(kept, partial, metadata={"format": FORMAT, "contents": digest})
        reached(f"within {path.name}")
    reached(f"after {path.name}")
    return digest


def read_tensors(path: str | os.PathLike, digest: str | None = None) -> dict[str, Tensor]:
    """What `write_tensors` wrote. OSError or ValueError, naming the file, if it is damaged.

    digest: what the tensors must be; None: what the file itself says that they were.
    """
    from safetensors import SafetensorError, safe_open

    from hybrid_sleep.sleep.weights import tensors_digest

    try:
        with safe_open(path, framework="pt") as file:
            wanted = digest or (file.metadata() or {}).get("contents")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    if tensors_digest(tensors) != wanted:
        raise unreadable(path, "its tensors are not those that were saved (SHA-256 differs)")
    return tensors
