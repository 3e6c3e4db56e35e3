"""Files: written whole or not at all, by one writer, and read with an error that names them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK_FILE = ".hybrid_sleep.lock"
LFS_POINTER = b"version https://git-lfs"


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


def unreadable(path: str | os.PathLike, error: Exception | str) -> OSError | ValueError:
    """What to raise where `error` came of reading the file `path`: which file, and what it has."""
    path = Path(path)
    if not path.exists():
        return FileNotFoundError(f"{path} is missing")
    if path.is_dir():
        return IsADirectoryError(f"{path} is a folder; allowed: a file")
    if isinstance(error, PermissionError):
        return PermissionError(f"{path} may not be read by this user")
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(f"{path} cannot be read: {os.strerror(error.errno)}")
    with open(path, "rb") as file:
        head = file.read(len(LFS_POINTER))
    if not head:
        return ValueError(f"{path} is damaged: it is empty")
    if head == LFS_POINTER:
        return ValueError(
            f"{path} is a pointer of Git LFS; allowed: the file itself ('git lfs pull' fetches it)"
        )
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ValueError(f"{path} is damaged: {reason}")


def read_text(path: str | os.PathLike) -> str:
    """The text (UTF-8) of `path`. OSError or ValueError, naming the file, if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The content of the JSON file `path`, a `kind`; OSError or ValueError naming the file."""
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise unreadable(path, f"no JSON, {error}") from error
    if not isinstance(content, kind):
        found, wanted = type(content).__name__, kind.__name__
        raise unreadable(path, f"it holds a {found} where a {wanted} is expected")
    return content


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a file that grows by a line of JSON each.

    A writer that was killed can leave its last line cut short, which is left out. Any other line
    that is none raises ValueError, with its number.
    """
    lines = read_text(path).split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__}")
        except (ValueError, RecursionError) as error:
            # What a whole line ends with makes one more, an empty one.
            if number == len(lines):
                break
            raise unreadable(path, f"line {number} is no JSON object") from error
        records.append(record)
    return records


@contextlib.contextmanager
def sole_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Write into `folder` (made if need be) as the only one, until the block or the process ends.

    Raises BlockingIOError, saying who, if someone else does. The lock is the system's own, which a
    process that is killed lets go; the file that it is on says who holds it, and goes with it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; allowed: a folder to write into")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK_FILE)
    except PermissionError as error:
        raise PermissionError(f"{folder} may not be written into by this user") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder} leads through a file; allowed: folders") from error
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        file.close()
        # Where nothing was written, all is as before.
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _locked(path: Path) -> Any:
    """The open file `path`, locked and signed."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise BlockingIOError(
                f"{path.parent} is being written into by {holder}; allowed: another folder, or to "
                "wait until that has ended"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise
            warnings.warn(
                f"{path.parent} cannot be locked ({os.strerror(error.errno)}); see to it that "
                "nothing else writes there",
                stacklevel=4,
            )
        # Whoever held it may have removed it between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == os.stat(path).st_ino:
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
