"""The tables in which facts, their edits and commits are kept, and how their file is opened."""

from __future__ import annotations

import datetime
import sqlite3
from pathlib import Path

from hybrid_sleep.parametric.durable import transaction
from hybrid_sleep.parametric.experience.schema import TABLES
from hybrid_sleep.support.io import unreadable

# In the weights are active facts and degraded ones, which an audit found forgotten. Pending ones
# wait to be written, quarantined ones cannot be; retired ones were replaced, forgotten or pruned.
ACTIVE, DEGRADED, PENDING, QUARANTINED = "active", "degraded", "pending", "quarantined"
WRITTEN, WAITING, RETIRED = (ACTIVE, DEGRADED), (PENDING, QUARANTINED), "retired"
STATES = (*WAITING, *WRITTEN, RETIRED)
# A commit that is not in effect is a record of what was tried.
COMMITTED = "committed"
STATUSES = (COMMITTED, "rolled back", "nothing to do")

APPLICATION = 0x68736661  # "hsfa", says whose file it is
WAIT = 30.0  # seconds for a writer, or a reader, to end what it is at

VERSION = 2
SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE relations (key TEXT PRIMARY KEY, words TEXT NOT NULL)",
    f"""CREATE TABLE facts (
        id INTEGER PRIMARY KEY,
        subject TEXT NOT NULL, relation TEXT NOT NULL, object TEXT NOT NULL,
        subject_key TEXT NOT NULL, relation_key TEXT NOT NULL, version INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN {STATES}),
        created TEXT NOT NULL,
        source TEXT, span_start INTEGER, span_end INTEGER,
        supersedes INTEGER REFERENCES facts (id),
        UNIQUE (subject_key, relation_key, version))""",
    "CREATE INDEX facts_by_state ON facts (state)",
    f"""CREATE TABLE commits (
        id INTEGER PRIMARY KEY,
        parent INTEGER REFERENCES commits (id),
        kind TEXT NOT NULL, time TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN {STATUSES}),
        digest TEXT NOT NULL,
        file TEXT, file_digest TEXT,
        behind INTEGER REFERENCES commits (id),
        weights TEXT, weights_digest TEXT,
        learned INTEGER REFERENCES commits (id),
        effective INTEGER REFERENCES commits (id),
        report TEXT NOT NULL)""",
    """CREATE TABLE changes (
        commit_id INTEGER NOT NULL REFERENCES commits (id),
        fact_id INTEGER NOT NULL REFERENCES facts (id),
        before TEXT NOT NULL, after TEXT NOT NULL,
        PRIMARY KEY (commit_id, fact_id))""",
    "CREATE INDEX changes_by_fact ON changes (fact_id)",
    """CREATE TABLE edits (
        fact_id INTEGER NOT NULL REFERENCES facts (id),
        commit_id INTEGER NOT NULL REFERENCES commits (id),
        site TEXT NOT NULL, diagnostics TEXT NOT NULL,
        PRIMARY KEY (fact_id, commit_id, site))""",
    """CREATE TABLE audits (
        id INTEGER PRIMARY KEY,
        time TEXT NOT NULL,
        fact_id INTEGER NOT NULL REFERENCES facts (id),
        commit_id INTEGER REFERENCES commits (id),
        results TEXT NOT NULL)""",
    "CREATE INDEX audits_by_fact ON audits (fact_id)",
    *TABLES,
)


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def open_database(
    path: Path, base: str | None, model: str | None, write: bool
) -> sqlite3.Connection:
    """The database at `path`, checked. For `write` it is made if need be, which takes a `base`.

    Raises OSError or ValueError, before anything changes, where it is missing, damaged, something
    else, of a newer schema, or made for other weights than those of digest `base` (None: any).
    """
    if not path.exists() and (base is None or not write):
        raise FileNotFoundError(f"{path.parent} must hold facts, got no {path.name} in it")
    # A reader may have to roll back what a killed writer left half written, so it opens the file
    # for both; where that is not allowed, SQLite opens it for reading by itself.
    uri = f"{path.resolve().as_uri()}?mode={'rwc' if write else 'rw'}"
    try:
        db = sqlite3.connect(
            uri, uri=True, timeout=WAIT, isolation_level=None, check_same_thread=False
        )
    except sqlite3.Error as error:
        raise OSError(f"{path} cannot be opened: {error}") from error
    try:
        # The journal stays SQLite's own, a file that is deleted: the database is one file, which
        # can be copied, and read where nothing can be written. EXTRA syncs the folder as well.
        db.execute("PRAGMA synchronous = EXTRA")
        db.execute("PRAGMA foreign_keys = ON")
        version = _checked(path, db)
        if version == 0 and (base is None or not write):
            raise ValueError(f"{path} must hold facts, or be made for a model, got an empty file")
        if version == 0:
            _create(db, base, model)
        kept = dict(db.execute("SELECT name, value FROM meta"))["base"]
        if base is not None and base != kept:
            raise ValueError(
                f"model must have the weights for which {path.parent} was made, SHA-256 {kept}, "
                f"got {base}"
            )
        if not write:
            db.execute("PRAGMA query_only = ON")
    except sqlite3.Error as error:
        db.close()
        raise _reason(path, error) from error
    except BaseException:
        db.close()
        raise
    return db


def _checked(path: Path, db: sqlite3.Connection) -> int:
    """Version of the schema, 0 for an empty file; ValueError unless it is one to work with."""
    application, version, tables = (
        db.execute(query).fetchone()[0]
        for query in (
            "PRAGMA application_id",
            "PRAGMA user_version",
            "SELECT count(*) FROM sqlite_master",
        )  # fmt: skip
    )
    if not (application or version or tables):
        return 0
    if application != APPLICATION:
        raise ValueError(f"{path} must be a store of facts, got the database of something else")
    if version != VERSION:
        which = "a newer version" if version > VERSION else "a version before the first release"
        raise ValueError(
            f"schema of {path} must be {VERSION}, got {version}; {which} of hybrid_sleep wrote it"
        )
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise unreadable(path, found)
    return version


def _create(db: sqlite3.Connection, base: str | None, model: str | None) -> None:
    with transaction(db, "schema"):
        for statement in SCHEMA:
            db.execute(statement)
        rows = {"base": base, "model": model or "", "created": now()}
        db.executemany("INSERT INTO meta VALUES (?, ?)", rows.items())
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {VERSION}")


def _reason(path: Path, error: sqlite3.Error) -> OSError | ValueError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return unreadable(path, error)
    return OSError(f"{path} cannot be opened: {error}")
