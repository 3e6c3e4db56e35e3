"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step.

    The content reaches the disk before the name does, so a process killed at any moment leaves
    either the old file or the new one. On an exception the old file stays and the temporary goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=f".partial{path.suffix}"
    )
    os.close(handle)
    partial = Path(name)
    try:
        # mkstemp makes private files; the result should be as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` (UTF-8) atomically; parent folders are made."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | os.PathLike, content: Any) -> None:
    """Write `content` to `path` as indented JSON, atomically; TypeError on what JSON lacks."""
    write_text_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def keyed(by_number: dict[Any, Any]) -> dict[str, Any]:
    """Keys as a JSON file would have them, in dicts inside as well."""
    return {
        str(number): keyed(value) if isinstance(value, dict) else value
        for number, value in by_number.items()
    }
