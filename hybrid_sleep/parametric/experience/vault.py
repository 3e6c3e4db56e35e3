"""Rows of ciphertext, and the keys of the sources that open them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybrid_sleep.parametric.durable import transaction
from hybrid_sleep.parametric.experience.experience import Experience
from hybrid_sleep.parametric.experience.keys import Keys
from hybrid_sleep.parametric.experience.schema import NOBODY

BODY, SIGNATURE = "body", "signature"


@dataclass(frozen=True)
class Source:
    """A source by its id in the database, and the name of its key."""

    id: int
    key: str


class Vault:
    """What a database and a folder of keys hold of experiences.

    Each ciphertext is bound to its column, row and source, so that one put into another's place is
    found out. Nothing but what a transaction has written is in `sources`.
    """

    def __init__(self, db: sqlite3.Connection, folder: Path, writable: bool):
        self.db, self.folder, self.writable = db, folder, writable
        self.keys = Keys(folder)
        self.sources: dict[str, Source] = {}
        if writable:
            # Deleted rows become zeros; and what the database writes beside it stays in memory.
            db.execute("PRAGMA secure_delete = ON")
            db.execute("PRAGMA temp_store = MEMORY")
        self.reload()

    def reload(self) -> None:
        """Read again which sources there are."""
        found = {}
        for number, key, name in self.db.execute("SELECT id, key, name FROM sources ORDER BY id"):
            found[self.keys.unseal(key, name, f"name:{number}").decode()] = Source(number, key)
        self.sources = found

    def name_of(self, number: int) -> str:
        """The name of the source with this id."""
        return next(name for name, source in self.sources.items() if source.id == number)

    def transaction(self, what: str) -> AbstractContextManager[None]:
        """A durable transaction, or part of the one that is open already."""
        self.check_writable()
        return transaction(self.db, what)

    def check_writable(self) -> None:
        """Raise PermissionError unless the store is open for writing."""
        if not self.writable:
            raise PermissionError(f"{self.folder} must be open for writing, got a store to read")

    def add_source(self, name: str, key: str) -> Source:
        """Give a new source a row, within a transaction."""
        row = self.db.execute("SELECT coalesce(max(id), ?) + 1 FROM sources", (NOBODY,)).fetchone()
        source = Source(row[0], key)
        sealed = self.keys.seal(key, name.encode(), f"name:{source.id}")
        self.db.execute("INSERT INTO sources VALUES (?, ?, ?)", (source.id, key, sealed))
        return source

    def change_key(self, name: str, key: str) -> None:
        """Encrypt all that is kept of a source with another key, within a transaction."""
        old = self.sources[name]
        query = "SELECT id, body, signature FROM experiences WHERE source_id = ?"
        for number, *columns in self.db.execute(query, (old.id,)).fetchall():
            sealed = [
                self.seal(key, name, column, number, self.unseal(name, column, number, value))
                for column, value in zip((BODY, SIGNATURE), columns, strict=True)
            ]
            self.db.execute(
                "UPDATE experiences SET body = ?, signature = ? WHERE id = ?", (*sealed, number)
            )
        sealed_name = self.keys.seal(key, name.encode(), f"name:{old.id}")
        self.db.execute(
            "UPDATE sources SET key = ?, name = ? WHERE id = ?", (key, sealed_name, old.id)
        )

    def seal(self, key: str, name: str, column: str, number: int, plain: bytes) -> bytes:
        """The ciphertext of a column of the row `number` of source `name`."""
        return self.keys.seal(key, plain, f"{column}:{number}:{name}")

    def unseal(self, name: str, column: str, number: int, sealed: bytes) -> bytes:
        """What `seal` encrypted with the source's key."""
        return self.keys.unseal(self.sources[name].key, sealed, f"{column}:{number}:{name}")

    def body(self, number: int) -> tuple[Experience, tuple[int, ...], int]:
        """The experience `number`, its token ids and the first target; ValueError if not there."""
        row = self.db.execute(
            "SELECT source_id, body FROM experiences WHERE id = ?", (number,)
        ).fetchone()
        if row is None:
            raise ValueError(f"id must be one of an experience in the buffer, got {number!r}")
        name = self.name_of(row[0])
        data = json.loads(self.unseal(name, BODY, number, row[1]))
        return Experience(source=name, **data["experience"]), tuple(data["ids"]), data["start"]

    def bodies(self) -> Iterator[tuple[int, Experience]]:
        """All experiences, by id."""
        for (number,) in self.db.execute("SELECT id FROM experiences ORDER BY id").fetchall():
            yield number, self.body(number)[0]

    def signatures(self, name: str) -> Iterator[tuple[int, bytes]]:
        """The signatures of a source's experiences, by id."""
        query = "SELECT id, signature FROM experiences WHERE source_id = ? ORDER BY id"
        for number, sealed in self.db.execute(query, (self.sources[name].id,)).fetchall():
            yield number, self.unseal(name, SIGNATURE, number, sealed)

    def signature(self, number: int, name: str) -> bytes:
        """The signature of one."""
        query = "SELECT signature FROM experiences WHERE id = ?"
        return self.unseal(name, SIGNATURE, number, self.db.execute(query, (number,)).fetchone()[0])

    def progress(self, name: str) -> int:
        """A number that lasts, by its name."""
        query = "SELECT value FROM progress WHERE name = ?"
        return int(self.db.execute(query, (name,)).fetchone()[0])

    def set_progress(self, name: str, value: int) -> None:
        """Write it, within a transaction."""
        self.db.execute("UPDATE progress SET value = ? WHERE name = ?", (value, name))

    def count(self, source: int, what: str, more: int = 1) -> None:
        """Add to what is counted of a source, within a transaction."""
        self.db.execute(
            "INSERT INTO tallies VALUES (?, ?, ?) "
            "ON CONFLICT (source_id, what) DO UPDATE SET count = count + excluded.count",
            (source, what, more),
        )


def packed(experience: Experience, ids: tuple[int, ...], start: int) -> bytes:
    """What the column `body` encrypts: all but the source, which is bound to it."""
    data: Mapping[str, Any] = {k: v for k, v in asdict(experience).items() if k != "source"}
    return json.dumps({"experience": data, "ids": ids, "start": start}).encode()
