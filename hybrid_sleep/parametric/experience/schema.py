"""The tables of experiences: what they say is ciphertext, beside it are times, counts and sizes."""

from __future__ import annotations

KINDS = ("text", "exchange", "correction")
# An erased experience is a digest in the trail, nothing else.
WAITING, SLEPT, ERASED = STATES = ("waiting", "slept", "erased")
# Whose counts those of erased sources are added to.
NOBODY = 0

TABLES = (
    # key: name of its file in the folder of keys.
    "CREATE TABLE sources (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, name BLOB NOT NULL)",
    f"""CREATE TABLE experiences (
        id INTEGER PRIMARY KEY,
        source_id INTEGER NOT NULL REFERENCES sources (id),
        kind TEXT NOT NULL CHECK (kind IN {KINDS}),
        state TEXT NOT NULL CHECK (state IN {(WAITING, SLEPT)}),
        commit_id INTEGER REFERENCES commits (id),
        created TEXT NOT NULL, weights TEXT NOT NULL,
        surprise REAL NOT NULL, importance REAL NOT NULL, worth REAL NOT NULL,
        tokens INTEGER NOT NULL, size INTEGER NOT NULL,
        body BLOB NOT NULL, signature BLOB NOT NULL)""",
    # All that is asked at every write, so that no ciphertext is read for it.
    "CREATE INDEX experiences_by_worth ON experiences (source_id, state, worth, size)",
    """CREATE TABLE tallies (
        source_id INTEGER NOT NULL, what TEXT NOT NULL, count INTEGER NOT NULL,
        PRIMARY KEY (source_id, what))""",
    """CREATE TABLE derived (
        path TEXT NOT NULL, source_id INTEGER NOT NULL, doomed INTEGER NOT NULL DEFAULT FALSE,
        PRIMARY KEY (path, source_id))""",
    """CREATE TABLE erasures (
        id INTEGER PRIMARY KEY, time TEXT NOT NULL, count INTEGER NOT NULL)""",
    """CREATE TABLE erased (
        id INTEGER PRIMARY KEY,
        erasure_id INTEGER NOT NULL REFERENCES erasures (id),
        source BLOB NOT NULL, digest BLOB NOT NULL)""",
    # offered: how many experiences ever were. unclean: an erasure is not through yet.
    "CREATE TABLE progress (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    "INSERT INTO progress VALUES ('offered', 0), ('unclean', FALSE)",
)
