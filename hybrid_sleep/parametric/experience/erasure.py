"""Experiences erased, with what was made of them, and what can be proved of it afterwards.

One transaction takes the rows away and writes digests of them into the trail. Then keys, derived
files, free pages and journal go; a process killed before that is through takes it up again at the
next opening. The digests are HMAC-SHA256 by a key of their own: without it, they say nothing; who
has it and a text can tell whether, and when, that text was erased.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybrid_sleep.parametric import durable
from hybrid_sleep.parametric.experience.experience import Experience
from hybrid_sleep.parametric.experience.keys import AUDIT, FOLDER, SUFFIX
from hybrid_sleep.parametric.experience.schema import NOBODY
from hybrid_sleep.parametric.experience.scrub import scrub
from hybrid_sleep.parametric.experience.shred import overwrite, shred
from hybrid_sleep.parametric.experience.vault import Vault
from hybrid_sleep.parametric.schema import now


def erase(vault: Vault, source: str | None, ids: Collection[int] | None, proof: bool) -> int:
    """Erase a source, or experiences by id; see `Buffer.erase`. Returns how many there were."""
    vault.check_writable()
    if (source is None) == (ids is None):
        raise ValueError(f"either source or ids must be given, got {source!r} and {ids!r}")
    if source is not None and source not in vault.sources:
        raise ValueError(f"source must be one of the buffer's, got {source!r}")
    wanted = set(ids or ())
    if source is not None:
        query = "SELECT id FROM experiences WHERE source_id = ?"
        wanted = {row[0] for row in vault.db.execute(query, (vault.sources[source].id,))}
    going = {number: vault.body(number)[0] for number in sorted(wanted)}
    if source is None and not going:
        return 0
    touched = {source} if source is not None else {x.source for x in going.values()}
    # What stays of a source gets a new key, as the old one opens what must be gone.
    new_keys = {}
    for name in sorted(touched):
        query = "SELECT count(*) FROM experiences WHERE source_id = ?"
        kept = vault.db.execute(query, (vault.sources[name].id,)).fetchone()[0]
        if kept > sum(x.source == name for x in going.values()):
            new_keys[name] = vault.keys.make()
    if proof and not vault.keys.auditable:
        vault.keys.make(AUDIT)
    with _journal(vault), vault.transaction("erase"):
        _write_trail(vault, going, touched - new_keys.keys(), proof)
        vault.db.executemany("DELETE FROM experiences WHERE id = ?", [(n,) for n in going])
        for name in sorted(touched):
            number = vault.sources[name].id
            vault.db.execute("UPDATE derived SET doomed = TRUE WHERE source_id = ?", (number,))
            if name in new_keys:
                vault.change_key(name, new_keys[name])
                continue
            query = "SELECT what, count FROM tallies WHERE source_id = ?"
            for what, count in vault.db.execute(query, (number,)).fetchall():
                vault.count(NOBODY, what, count)
            vault.db.execute("DELETE FROM tallies WHERE source_id = ?", (number,))
            vault.db.execute("DELETE FROM sources WHERE id = ?", (number,))
        vault.set_progress("unclean", True)
    vault.reload()
    clean(vault)
    return len(going)


def clean(vault: Vault) -> None:
    """Take away all that erasures have left; nothing happens where they have left nothing.

    Raises OSError where the database cannot be rewritten; the next opening tries again.
    """
    # A key is on the disk before the transaction that needs it, which may not have come.
    vault.keys.destroy_others({source.key for source in vault.sources.values()})
    if not vault.progress("unclean"):
        return
    query = "SELECT DISTINCT path FROM derived WHERE doomed"
    paths = [row[0] for row in vault.db.execute(query).fetchall()]
    for path in paths:
        shred(vault.folder / path)
    with _journal(vault):
        with vault.transaction("derived"):
            vault.db.executemany("DELETE FROM derived WHERE path = ?", [(path,) for path in paths])
        try:
            # Zeros are written over deleted rows, but copies of them may be in the gaps of pages
            # from before they were moved. New pages have no such gaps.
            vault.db.execute("VACUUM")
        except sqlite3.Error as error:
            raise OSError(
                f"{vault.folder} cannot be rewritten without what was erased: {error}; its keys "
                "are gone, and the next opening tries again"
            ) from error
        durable.reached("after vacuum")
    with vault.transaction("clean"):
        vault.set_progress("unclean", False)


@contextmanager
def _journal(vault: Vault) -> Iterator[None]:
    """Keep SQLite's journal, which has the pages from before a change, to overwrite it."""
    vault.db.execute("PRAGMA journal_mode = PERSIST")
    yield
    # Not after an error, when the journal may be what the database is mended with. After a commit
    # its head is zeros already.
    journal = Path(f"{_file(vault.db)}-journal")
    if journal.exists():
        overwrite(journal)
    vault.db.execute("PRAGMA journal_mode = DELETE")


def _file(db: sqlite3.Connection) -> str:
    return str(db.execute("PRAGMA database_list").fetchone()[2])


def register(vault: Vault, path: Path, source: str) -> Path:
    """Remember that the file or folder `path` was made of `source`; see `Buffer.derived`."""
    whole = (vault.folder / path).resolve()
    root = vault.folder.resolve()
    own = (Path(_file(vault.db)).resolve(), root / FOLDER)
    inside = root in whole.parents and not any(
        whole == x or whole in x.parents or x in whole.parents for x in own
    )
    if not inside:
        raise ValueError(
            f"path must be in {vault.folder} and neither the database nor a key (*{SUFFIX}), "
            f"got {path}"
        )
    if source not in vault.sources:
        raise ValueError(f"source must be one of the buffer's, got {source!r}")
    with vault.transaction("derived"):
        vault.db.execute(
            "INSERT OR IGNORE INTO derived VALUES (?, ?, FALSE)",
            (whole.relative_to(root).as_posix(), vault.sources[source].id),
        )
    return whole


def doom(vault: Vault, path: Path) -> None:
    """Mark the file or folder `path` to be erased; see `Buffer.doom`."""
    with vault.transaction("doom"):
        found = vault.db.execute(
            "UPDATE derived SET doomed = TRUE WHERE path = ?", (path.as_posix(),)
        )
        if found.rowcount:
            vault.set_progress("unclean", True)


def _write_trail(
    vault: Vault, going: dict[int, Experience], whole: Collection[str], proof: bool
) -> None:
    made = vault.db.execute(
        "INSERT INTO erasures (time, count) VALUES (?, ?)", (now(), len(going))
    ).lastrowid
    if not proof:
        for name in whole if vault.keys.auditable else ():
            _forget(vault, name)
        return
    row = vault.db.execute("SELECT coalesce(max(id), 0) FROM erased").fetchone()[0]
    for experience in going.values():
        for words in sorted({experience.text, experience.prompt, experience.rejected} - {""}):
            # The number in them: equal texts have other digests, so that none can be counted.
            row += 1
            digests = _digests(vault, row, experience.source, words)
            vault.db.execute("INSERT INTO erased VALUES (?, ?, ?, ?)", (row, made, *digests))


def _digests(vault: Vault, row: int, source: str, words: str) -> tuple[bytes, bytes]:
    digest = vault.keys.digest
    return digest(f"source:{row}:{source}"), digest(f"text:{row}:{words}")


def _forget(vault: Vault, name: str) -> None:
    """Take the digests of earlier erasures of a source out of the trail."""
    found = vault.db.execute("SELECT id, source FROM erased").fetchall()
    rows = [(row,) for row, of in found if vault.keys.digest(f"source:{row}:{name}") == of]
    vault.db.executemany("DELETE FROM erased WHERE id = ?", rows)


def proof(vault: Vault, text: str) -> dict[str, Any]:
    """Where `text` is, and when it was erased; see `Buffer.proof`."""
    clean_text = scrub(text)[0]
    held = [
        number
        for number, x in vault.bodies()
        if clean_text in (x.text, x.prompt, x.rejected)
    ]  # fmt: skip
    rows = vault.db.execute(
        "SELECT erased.id, time, digest FROM erased JOIN erasures ON erasure_id = erasures.id "
        "ORDER BY erased.id"
    ).fetchall()
    times = [
        time for row, time, of in rows if vault.keys.digest(f"text:{row}:{clean_text}") == of
    ]  # fmt: skip
    return {"held": held, "erased": times}


def erased_counts(vault: Vault) -> Counter[str]:
    """How many experiences were erased, in how many erasures."""
    row = vault.db.execute("SELECT coalesce(sum(count), 0), count(*) FROM erasures").fetchone()
    return Counter(erased=row[0], erasures=row[1])
