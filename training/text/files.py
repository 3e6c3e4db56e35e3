"""Documents in UTF-8 files, found once and read when they are needed."""

from __future__ import annotations

import codecs
import glob
import itertools
import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hybrid_sleep.training.text.config import TextConfig
from hybrid_sleep.training.text.source import (
    Document,
    HoldOut,
    TextSource,
    chunk_bytes,
    shuffled,
)

READ_BYTES = 4 << 20


class FileSource(TextSource):
    """Text files: all are scanned when the source is opened, and none is ever read whole.

    A document longer than `chunk_bytes` is trained on in chunks of about that size, cut behind a
    line where one ends nearby. They are documents of their own but for the eos token, which only
    the last has. So streams share a long file instead of all reading it from the start. The index
    takes 32 bytes a chunk.

    Line ends are read as Python reads them (CR LF and CR are LF), in the separator too.
    """

    def __init__(self, config: TextConfig):
        self.config = config
        self.paths = find_files(config.files or [])
        whole = array("q")
        for number, path in enumerate(self.paths):
            for span in find_documents(path, config.separator):
                whole.extend((number, *span))
        spans = np.array(whole, dtype=np.int64).reshape(-1, 3)
        if len(spans) <= len(self.paths):
            _check_separator(self.paths, config.separator)
        split = HoldOut(config.held_out, len(spans))
        training, held_out = array("q"), array("q")
        size, place = chunk_bytes(config), -1
        data: mmap.mmap | bytes = b""
        for index, (number, start, end) in enumerate(spans.tolist()):
            if number != place:
                place, data = number, _mapped(self.paths[number])
            stop = start if split.draws(index) else end
            if tail := split.tail(end - start):
                stop = _line_end(data, start, end - tail)
            for first, last in _chunks(data, start, stop, size):
                training.extend((number, first, last, last == end))
            for first, last in _chunks(data, stop, end, size):
                held_out.extend((number, first, last, last == end))
        if not training:
            raise ValueError(
                "text.files must hold text that text.held_out does not take, got none to train on "
                f"in {config.files!r}"
            )
        self._training, aside = (
            np.array(places, dtype=np.int64).reshape(-1, 4) for places in (training, held_out)
        )
        # Shuffled, for whoever reads only the first of them to see more than one document.
        self._held_out = aside[shuffled(len(aside), 0, 0, 0)]
        self.size = {
            "chunks": len(self._training),
            "bytes": sum(path.stat().st_size for path in self.paths),
        }

    def blocks(self, size: int, at: int | None = None) -> Iterator[tuple[int, list[np.ndarray]]]:
        for start in range(at or 0, len(self._training), size):
            yield start, list(self._training[start : start + size])

    def held_out(self) -> Iterator[np.ndarray]:
        return iter(self._held_out)

    def read(self, handle: np.ndarray) -> Document:
        number, start, end, ends = handle.tolist()
        with open(self.paths[number], "rb") as file:
            file.seek(start)
            text = file.read(end - start).decode("utf-8")
        return Document(text.replace("\r\n", "\n").replace("\r", "\n"), bool(ends))


def find_files(patterns: list[str]) -> list[Path]:
    """Files of paths and glob patterns, those of a pattern sorted, each once."""
    found: dict[Path, None] = {}
    for number, pattern in enumerate(patterns):
        if Path(pattern).is_file():
            matches = [Path(pattern)]
        else:
            matches = [Path(m) for m in sorted(glob.glob(pattern, recursive=True))]
            matches = [path for path in matches if path.is_file()]
        if not matches:
            raise FileNotFoundError(
                f"text.files[{number}] must be the path of a text file, or a glob pattern that "
                f"matches one, seen from the working directory, got {pattern!r}"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def find_documents(path: Path, separator: str | None) -> Iterator[tuple[int, int]]:
    """First byte and end of every document in a file, without blank ones.

    Raises ValueError, with the place, unless the file is UTF-8.
    """
    _check_utf8(path)
    data = _mapped(path)
    start = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
    for first, last in itertools.chain(_separators(data, separator), [(len(data), 0)]):
        if not _blank(data, start, first):
            yield start, first
        start = last


def _check_separator(paths: list[Path], separator: str | None) -> None:
    """Raise ValueError for a separator that divides none of the files."""
    if separator is None or any(next(_separators(_mapped(p), separator), None) for p in paths):
        return
    hint = ""
    if re.search(r"\\[nrt]", separator):
        hint = ' (a line end is "\\n" in double quotes; without them it is a backslash and an n)'
    raise ValueError(
        "text.separator must be text that stands between documents, or null where a file is one, "
        f"got {separator!r}, which occurs in none of the files{hint}"
    )


def _separators(data: mmap.mmap | bytes, separator: str | None) -> Iterator[tuple[int, int]]:
    if separator is None:
        return
    lines = separator.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    pattern = re.escape(lines[0].encode())
    # One line end is never read as two.
    newline = rb"(?:\r\n|\r(?!\n)|(?<!\r)\n)" if data.find(b"\r") >= 0 else rb"\n"
    for line in lines[1:]:
        pattern += newline + re.escape(line.encode())
    for match in re.finditer(pattern, data):
        yield match.span()


def _chunks(
    data: mmap.mmap | bytes, start: int, end: int, size: int
) -> Iterator[tuple[int, int]]:
    count = -(-(end - start) // size)
    first = start
    for i in range(1, count + 1):
        stop = end if i == count else _line_end(data, first, start + (end - start) * i // count)
        if stop > first:
            yield first, stop
        first = stop


def _line_end(data: mmap.mmap | bytes, start: int, near: int) -> int:
    """A place to cut at most a quarter before `near`: behind a line, else between characters."""
    newline = data.rfind(b"\n", near - (near - start) // 4, near)
    if newline >= 0:
        return newline + 1
    while near > start and (data[near] & 0xC0 == 0x80 or data[near - 1 : near + 1] == b"\r\n"):
        near -= 1
    return near


def _blank(data: mmap.mmap | bytes, start: int, end: int) -> bool:
    return all(
        data[place : min(end, place + READ_BYTES)].isspace()
        for place in range(start, end, READ_BYTES)
    )


def _mapped(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file, without reading them; an empty one cannot be mapped."""
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = 0
    with open(path, "rb") as file:
        while True:
            block = file.read(READ_BYTES)
            unread = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"text.files must be UTF-8, got another byte at {place - unread + error.start} "
                    f"of {str(path)!r}"
                ) from error
            if not block:
                return
            place += len(block)
