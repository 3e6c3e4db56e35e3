"""What a store of facts keeps of a fact and of a commit, as it is read from the database."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.schema import RETIRED

# Name and digest of each, in order.
Files = tuple[tuple[str, str], ...]


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

    digest: of the weights after it. files: of the factors that make them, in order.
    effective: the newest commit that no undo has taken back by then, None for pristine weights.
    """

    id: int
    parent: int | None
    kind: str
    time: str
    status: str
    digest: str
    files: Files
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


def read_commits(db: sqlite3.Connection, where: str, values: Sequence[Any] = ()) -> list[Commit]:
    """The commits for which `where` holds, an SQL condition with `values`; the oldest first."""
    rows = db.execute(
        "SELECT id, parent, kind, time, status, digest, files, effective, report "
        f"FROM commits WHERE {where} ORDER BY id",
        values,
    )
    return [
        Commit(
            number, parent, kind, time, status, digest,
            tuple((name, of) for name, of in json.loads(files)), effective,
            json.loads(report),
        )
        for number, parent, kind, time, status, digest, files, effective, report in rows
    ]  # fmt: skip


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
