"""Files erased: overwritten, then removed, each step on the disk before the next."""

from __future__ import annotations

import os
from pathlib import Path

from hybrid_sleep.parametric import durable

BLOCK = 1 << 20


def overwrite(path: Path) -> None:
    """Fill the file `path` with zeros, in place and on the disk.

    A disk that writes elsewhere (flash, copies on write, snapshots) keeps the old blocks for a
    while; what must not be read there must have been encrypted.
    """
    path.chmod(0o600)
    with open(path, "r+b", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0:
            left -= file.write(bytes(min(left, BLOCK)))
        os.fsync(file.fileno())


def shred(path: Path) -> None:
    """Overwrite and remove a file, or a folder with all in it; nothing happens if it is missing.

    A symbolic link is removed, what it leads to stays.
    """
    if path.is_dir() and not path.is_symlink():
        for inside in sorted(path.iterdir()):
            shred(inside)
        path.rmdir()
    elif path.is_symlink():
        path.unlink()
    elif path.exists():
        durable.reached("before shred")
        overwrite(path)
        durable.reached("within shred")
        path.unlink()
    else:
        return
    sync_folder(path.parent)
    durable.reached("after shred")


def sync_folder(folder: Path) -> None:
    """Let the names in `folder` reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
