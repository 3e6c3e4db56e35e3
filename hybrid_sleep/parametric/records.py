"""What a store of facts keeps of a fact and of a commit, as it is read from the database."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.schema import RETIRED

# Name and digest.
File = tuple[str, str]


@dataclass(frozen=True)
class StoredFact:
    """A version of a fact in a store.

    state: "pending" (to be written), "active" (in the weights), "degraded" (in the weights, but an
    audit found it forgotten), "quarantined" (cannot be written), "retired" (replaced, forgotten or
    pruned). span: where in `fact.source` it stands. supersedes: id of the version that it replaces.
    """

    id: int
    fact: Fact
    version: int
    state: str
    created: str
    span: tuple[int, int] | None = None
    supersedes: int | None = None


@dataclass(frozen=True)
class Commit:
    """A step of the weights, or, unless its status is "committed", the record of an attempt.

    digest: of the weights after it. file: of the factors that it adds, if any; behind: the commit
    whose factors come before, None where it replaced all. weights: the file of what it trained, if
    anything; learned: the commit whose weights take the place of pristine ones, None for none.
    effective: the newest commit that no undo has taken back by then, None for pristine weights.
    """

    id: int
    parent: int | None
    kind: str
    time: str
    status: str
    digest: str
    file: File | None
    behind: int | None
    weights: File | None
    learned: int | None
    effective: int | None
    report: dict[str, Any]


def read_facts(db: sqlite3.Connection, where: str, values: Sequence[Any]) -> list[StoredFact]:
    """The facts for which `where` holds, an SQL condition with `values`; the oldest first."""
    rows = db.execute(
        "SELECT id, subject, relation, object, source, version, state, created, span_start, "
        f"span_end, supersedes FROM facts WHERE {where} ORDER BY id",
        values,
    )
    return [
        StoredFact(
            number, Fact(subject, relation, object, source), version, state, created,
            None if start is None else (start, end), replaced,
        )
        for number, subject, relation, object, source, version, state, created, start, end, replaced
        in rows
    ]  # fmt: skip


def read_fact(db: sqlite3.Connection, number: int) -> StoredFact:
    """The fact with this id; ValueError if there is none."""
    found = read_facts(db, "id = ?", (number,))
    if not found:
        raise ValueError(f"fact_id must be one of a fact in the store, got {number!r}")
    return found[0]


def read_commits(db: sqlite3.Connection, where: str, values: Sequence[Any] = ()) -> list[Commit]:
    """The commits for which `where` holds, an SQL condition with `values`; the oldest first."""
    rows = db.execute(
        "SELECT id, parent, kind, time, status, digest, file, file_digest, behind, weights, "
        f"weights_digest, learned, effective, report FROM commits WHERE {where} ORDER BY id",
        values,
    )
    return [
        Commit(
            number, parent, kind, time, status, digest, (file, file_digest) if file else None,
            behind, (weights, weights_digest) if weights else None, learned, effective,
            json.loads(report),
        )
        for number, parent, kind, time, status, digest, file, file_digest, behind, weights,
        weights_digest, learned, effective, report in rows
    ]  # fmt: skip


def read_commit(db: sqlite3.Connection, number: int) -> Commit:
    """The commit with this id; ValueError if there is none."""
    found = read_commits(db, "id = ?", (number,))
    if not found:
        raise ValueError(f"commit must be the id of one in the store, got {number!r}")
    return found[0]


def commit_before(db: sqlite3.Connection, at: Commit | None) -> Commit | None:
    """The commit whose weights an undo behind `at` brings back; None for pristine ones."""
    if at is None or at.effective is None:
        return None
    parent = read_commit(db, at.effective).parent
    return None if parent is None else read_commit(db, parent)


def names_at(db: sqlite3.Connection, at: Commit | None) -> set[str]:
    """The names of all files that make the weights after `at`."""
    if at is None:
        return set()
    names = {name for name, _ in read_files(db, at.effective)}
    trained = None if at.learned is None else read_commit(db, at.learned).weights
    return names | ({trained[0]} if trained else set())


def read_files(db: sqlite3.Connection, commit: int | None) -> list[File]:
    """Of the factors that make the weights after `commit`, one in effect (None: no edit), in order.

    A commit refers to the one before it, so that what is kept of each has one size.
    """
    return db.execute(
        "WITH RECURSIVE chain (id, steps) AS (SELECT ?, 0 UNION ALL "
        "SELECT behind, steps + 1 FROM chain JOIN commits USING (id) WHERE behind IS NOT NULL) "
        "SELECT file, file_digest FROM chain JOIN commits USING (id) WHERE file IS NOT NULL "
        "ORDER BY steps DESC",
        (commit,),
    ).fetchall()


def explain(db: sqlite3.Connection, known: StoredFact) -> dict[str, Any]:
    """All that is kept about a fact, as plain data for JSON; see `FactStore.explain`."""
    versions = read_facts(db, "subject_key = ? AND relation_key = ?", known.fact.key)
    commits = db.execute(
        "SELECT id, kind, time, before, after FROM changes JOIN commits ON id = commit_id "
        "WHERE fact_id = ? ORDER BY id",
        (known.id,),
    )
    edits = db.execute(
        "SELECT commit_id, site, diagnostics FROM edits WHERE fact_id = ? ORDER BY commit_id, site",
        (known.id,),
    )
    audit = db.execute(
        "SELECT time, commit_id, results FROM audits WHERE fact_id = ? ORDER BY id DESC LIMIT 1",
        (known.id,),
    ).fetchone()
    standing = [x for x in versions if x.state != RETIRED]
    name = known.fact.object.casefold()
    return {
        "id": known.id,
        "subject": known.fact.subject,
        "relation": known.fact.relation,
        "object": known.fact.object,
        "state": known.state,
        "version": known.version,
        "created": known.created,
        "source": known.fact.source,
        "span": known.span,
        "supersedes": known.supersedes,
        "superseded_by": next((x.id for x in versions if x.supersedes == known.id), None),
        "conflicts": [x.id for x in standing if x.fact.object.casefold() != name],
        "versions": [
            {"id": x.id, "object": x.fact.object, "state": x.state, "created": x.created}
            for x in versions
        ],
        "commits": [
            dict(zip(("id", "kind", "time", "before", "after"), row, strict=True))
            for row in commits
        ],
        "edits": [
            {"commit": commit, "site": site, **json.loads(text)} for commit, site, text in edits
        ],
        "audit": audit and {"time": audit[0], "commit": audit[1], "results": json.loads(audit[2])},
    }
