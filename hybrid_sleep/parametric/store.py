"""A folder of facts: what is known, since when and from where, and the edits that made it so.

    facts.db                      facts, relations, commits, edits and audits (`schema.py`)
    commit-000001.safetensors     the factors that a commit adds
    weights-000002.safetensors    the weights that a sleep over experience trained
    pristine.safetensors          the weights of the edited sites as they were before any edit

The weights after a commit are the pristine ones, or those trained last, plus its factors and those
behind it. Files are written first, then one transaction refers to them, so a process killed at any
moment leaves the state before a commit or the one after; files that no commit refers to go at the
next opening.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.parametric.durable import read_tensors, reading, transaction
from hybrid_sleep.parametric.exchange import read_lines, to_lines
from hybrid_sleep.parametric.facts import Fact, Relation, check_facts
from hybrid_sleep.parametric.files import (
    check_factors,
    read_factors,
    read_pristine,
    remove_orphans,
    save_pristine,
    write_factors,
    write_weights,
)
from hybrid_sleep.parametric.records import (
    Commit,
    File,
    StoredFact,
    commit_before,
    explain,
    names_at,
    read_commit,
    read_commits,
    read_fact,
    read_facts,
    read_files,
)
from hybrid_sleep.parametric.schema import (
    COMMITTED,
    RETIRED,
    STATES,
    STATUSES,
    WAITING,
    WRITTEN,
    now,
    open_database,
)
from hybrid_sleep.parametric.states import check_states, settled
from hybrid_sleep.support.io import sole_writer, unreadable
from hybrid_sleep.validation import check_choice, check_count

if TYPE_CHECKING:
    from torch import Tensor

    from hybrid_sleep.parametric.factors import Factors

DATABASE = "facts.db"
KINDS = ("wake", "sleep", "forget", "experience")


class FactStore:
    """Facts, edits and commits in a folder; see the module's docstring and `FactStore.open`.

    A fact is known by its subject and relation, whatever their case; another object makes another
    version of it. At most one version is in the weights, and at most one later one waits. States
    change by commits, but for what `add` and `record_audit` say. One thread at a time may use it.
    """

    def __init__(self, folder: Path, db: sqlite3.Connection, held: ExitStack, write: bool):
        self.folder, self.writable, self.database = folder, write, db
        self._db, self._held = db, held
        self.meta: dict[str, str] = dict(db.execute("SELECT name, value FROM meta"))

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        base: str | None = None,
        *,
        model: str | None = None,
        write: bool = True,
    ) -> FactStore:
        """The store in `folder`, which for `write` is made if need be; close it, or use `with`.

        base: digest of the pristine weights; None, where the store exists, for whichever it has.
        model: a name to remember. write: as the only one; readers may read beside it.

        Raises, before anything changes: BlockingIOError if it is open for writing already,
        FileNotFoundError if there is nothing to read, ValueError if the store has another base, a
        newer schema or is damaged.
        """
        folder = Path(folder)
        with ExitStack() as held:
            if write:
                held.enter_context(sole_writer(folder))
            db = open_database(folder / DATABASE, base, model, write)
            held.callback(db.close)
            store = cls(folder, db, held, write)
            for name, _ in store.files():
                if not (folder / name).is_file():
                    raise unreadable(folder / name, "it is no file")
            if write:
                written = ((x.file, x.weights) for x in store.history())
                used = {file[0] for files in written for file in files if file}
                remove_orphans(folder, used)
            store._held = held.pop_all()
        return store

    def close(self) -> None:
        """Let others write; the store cannot be used any more."""
        self._held.close()

    def __enter__(self) -> FactStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Facts

    def add(
        self,
        facts: Iterable[Fact],
        relations: Iterable[Relation] = (),
        spans: Sequence[tuple[int, int] | None] | None = None,
    ) -> list[int]:
        """Keep `facts` as pending, all or none, and return their ids; durable on return.

        A fact that is known already, and not retired, is no new one. One with another object is a
        new version: what it contradicts is retired at once if it is not in the weights, otherwise
        by the commit that writes the new one. relations: the words for theirs; given again, the
        new words count. spans: where each stands in its source; found from its words if None.

        Raises ValueError, before anything changes, for what is no fact or relation and for facts
        that contradict each other.
        """
        facts, relations = list(facts), list(relations)
        for name, values, kind in (("facts", facts, Fact), ("relations", relations, Relation)):
            if wrong := [x for x in values if not isinstance(x, kind)]:
                raise ValueError(f"{name} must each be a {kind.__name__}, got {wrong[0]!r}")
        check_facts(facts)
        found = [_span(fact) for fact in facts] if spans is None else list(spans)
        if len(found) != len(facts):
            raise ValueError(f"spans must be one for each of {len(facts)} facts, got {len(found)}")
        with self.transaction("facts"):
            for relation in relations:
                row = (relation.name.casefold(), _json(relation.to_dict()))
                self._db.execute("INSERT OR REPLACE INTO relations VALUES (?, ?)", row)
            return [self._add(fact, span) for fact, span in zip(facts, found, strict=True)]

    def _add(self, fact: Fact, span: tuple[int, int] | None) -> int:
        versions = self._versions(fact.key)
        standing = [known for known in versions if known.state != RETIRED]
        replaced = standing[-1].id if standing else None
        while standing and standing[-1].fact.object.casefold() != fact.object.casefold():
            if standing[-1].state in WRITTEN:
                break
            self._set_state(standing.pop().id, RETIRED)
        else:
            if standing:
                return standing[-1].id
        start, end = span or (None, None)
        words = (fact.subject, fact.relation, fact.object, *fact.key)
        row = (*words, len(versions) + 1, WAITING[0], now(), fact.source, start, end, replaced)
        made = self._db.execute(
            "INSERT INTO facts (subject, relation, object, subject_key, relation_key, version, "
            "state, created, source, span_start, span_end, supersedes) "
            f"VALUES ({', '.join('?' * len(row))})",
            row,
        )
        assert made.lastrowid is not None
        return made.lastrowid

    def facts(self, state: str | Collection[str] = STATES) -> list[StoredFact]:
        """All facts in `state`, or in one of several; the oldest first."""
        states = (state,) if isinstance(state, str) else tuple(state)
        for one in states:
            check_choice("state", one, STATES)
        return read_facts(self._db, f"state IN ({', '.join('?' * len(states))})", states)

    def fact(self, fact_id: int) -> StoredFact:
        """The fact with this id; ValueError if there is none."""
        return read_fact(self._db, fact_id)

    def find(self, subject: str, relation: str | None = None) -> list[StoredFact]:
        """Facts about `subject`, whatever the case, that are not retired; the oldest first."""
        found = read_facts(
            self._db, "subject_key = ? AND state != ?", (subject.casefold(), RETIRED)
        )
        return [x for x in found if relation is None or x.fact.key[1] == relation.casefold()]

    def relation(self, name: str) -> Relation:
        """The words of a relation: those that were given with it, or plain ones."""
        query = "SELECT words FROM relations WHERE key = ?"
        row = self._db.execute(query, (name.casefold(),)).fetchone()
        return Relation.plain(name) if row is None else Relation.from_dict(json.loads(row[0]))

    def explain(self, fact_id: int) -> dict[str, Any]:
        """What is kept about a fact, as plain data for JSON.

        The fact itself, when it came and from where; its `versions`, and `conflicts`: others that
        stand; `commits` that changed its state, `edits` with their diagnostics, its last `audit`.
        """
        with reading(self._db):
            return explain(self._db, self.fact(fact_id))

    def _versions(self, key: tuple[str, str]) -> list[StoredFact]:
        return read_facts(self._db, "subject_key = ? AND relation_key = ?", key)

    # Commits

    @property
    def base(self) -> str:
        """Digest of the pristine weights that the store was made for."""
        return self.meta["base"]

    @property
    def head(self) -> Commit | None:
        """The newest commit; None before the first."""
        found = read_commits(self._db, "id = (SELECT max(id) FROM commits)")
        return found[0] if found else None

    def history(self) -> list[Commit]:
        """All commits, the oldest first."""
        return read_commits(self._db, "TRUE")

    def commit(
        self,
        kind: str,
        *,
        states: Mapping[int, str] | None = None,
        factors: Mapping[str, Factors] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        replace: bool = False,
        digest: str | None = None,
        report: Mapping[str, Any] | None = None,
        edits: Mapping[int, Mapping[str, Any]] | None = None,
        audits: Mapping[int, Mapping[str, Any]] | None = None,
        status: str = COMMITTED,
    ) -> int:
        """Record a change of the weights and all that goes with it, at once; returns its id.

        kind: one of `KINDS`. states: the new state of facts by id. When one is written (active or
        degraded), earlier versions of it are retired; one that would wait where a later version
        stands is retired instead. factors: by site, added to those before, or for `replace` the
        only ones from here on (none at all if None). weights: what takes the place of pristine
        ones from here on, all of it, by parameter; as before if None. digest: of the weights
        afterwards, as before if None. edits: diagnostics by fact and site. audits: results by fact.
        status: "rolled back" and "nothing to do" are records alone, without states or factors.

        Raises ValueError, before anything changes, for unknown kinds, facts and states, a retired
        fact to be brought back, two versions of one fact to be written, and factors that do not fit
        together or are not finite.
        """
        check_choice("kind", kind, KINDS)
        check_choice("status", status, STATUSES)
        states, factors = dict(states or {}), dict(factors or {})
        if status != COMMITTED and (states or factors or weights or replace):
            raise ValueError(
                f"a commit that is {status} must have no states, no factors and no weights"
            )
        touched = {*states, *(edits or {}), *(audits or {})}
        for site, part in factors.items():
            touched |= check_factors(site, part)
        check_states(self._db, states, touched)
        made_edits = [(f, s, _json(x)) for f, by in (edits or {}).items() for s, x in by.items()]
        made_audits = [(f, _json(x)) for f, x in (audits or {}).items()]
        text = _json(dict(report or {}))
        head = self.head
        number = 1 if head is None else head.id + 1
        self._check_writable()
        file = write_factors(self.folder, number, factors) if factors else None
        trained = write_weights(self.folder, number, weights) if weights else None
        before = head.effective if head else None
        learned = number if trained else head.learned if head else None
        behind = before if status == COMMITTED and not replace else None
        effective = number if status == COMMITTED else before
        was = head.digest if head else self.base
        with self.transaction("commit"):
            self._insert(
                (number, number - 1 or None, kind, now(), status, digest or was),
                (*(file or (None, None)), behind, *(trained or (None, None)), learned),
                (effective, text),
                states,
            )
            self._db.executemany(
                "INSERT INTO edits (commit_id, fact_id, site, diagnostics) VALUES (?, ?, ?, ?)",
                [(number, *edit) for edit in made_edits],
            )
            self._insert_audits(number, made_audits)
        return number

    def undo(self, report: Mapping[str, Any] | None = None) -> Commit:
        """Take the newest commit in effect back by a new one, which is returned.

        Its factors and digest are those before the commit it takes back, and facts have the states
        they had then, but for those that commit wrote, which are retired: nobody asked for them to
        be written again. As in an editor, another undo goes further back, and one behind a new
        commit takes that back first.

        Raises ValueError, before anything changes, where there is no commit to take back, and where
        `trim` removed what was before it.
        """
        head = self.head
        if head is None or head.effective is None:
            raise ValueError(f"{self.folder} must have a commit to take back, got none in effect")
        undone, target = self._commit(head.effective), commit_before(self._db, head)
        for name in sorted(names_at(self._db, target)):
            if not (self.folder / name).is_file():
                raise ValueError(
                    f"{self.folder} must have the files from before commit {undone.id} to take it "
                    f"back, got no {name}; the option undos says how many commits are kept for that"
                )
        digest = target.digest if target else self.base
        effective = target.effective if target else None
        text = _json({"undone": undone.id, **(report or {})})
        query = "SELECT fact_id, before FROM changes WHERE commit_id = ?"
        with self.transaction("undo"):
            states = {
                number: RETIRED if undone.kind == "wake" and before in WAITING else before
                for number, before in self._db.execute(query, (undone.id,))
            }
            self._insert(
                (head.id + 1, head.id, "undo", now(), COMMITTED, digest),
                (None, None, None, None, None, target.learned if target else None),
                (effective, text),
                states,
            )
        return self._commit(head.id + 1)

    def trim(self, undos: int) -> None:
        """Remove the files that not even `undos` undos in a row would bring back into effect."""
        check_count("undos", undos, minimum=0)
        self._check_writable()
        at, used = self.head, names_at(self._db, self.head)
        for _ in range(undos):
            at = commit_before(self._db, at)
            used |= names_at(self._db, at)
        remove_orphans(self.folder, used)

    def record_audit(
        self,
        results: Mapping[int, Mapping[str, Any]],
        states: Mapping[int, str] | None = None,
    ) -> None:
        """Keep how facts tested, by id; `states` says which are found active or degraded.

        Raises ValueError, before anything changes, for facts that are not there, and for states of
        any that are not in the weights.
        """
        states = dict(states or {})
        check_states(self._db, states, {*results, *states}, WRITTEN)
        for number in states:
            if self.fact(number).state not in WRITTEN:
                raise ValueError(f"states must be of facts in the weights, got fact {number}")
        rows = [(number, _json(x)) for number, x in results.items()]
        with self.transaction("audit"):
            head = self.head
            self._insert_audits(head.id if head else None, rows)
            for number, state in states.items():
                self._set_state(number, state)

    def _insert(
        self,
        named: tuple[Any, ...],
        made_of: tuple[Any, ...],
        told: tuple[Any, ...],
        states: Mapping[int, str],
    ) -> None:
        """A row of `commits`, its columns in three parts, and the new states of facts."""
        row = (*named, *made_of, *told)
        self._db.execute(f"INSERT INTO commits VALUES ({', '.join('?' * len(row))})", row)
        for known, state in settled(self._db, states):
            self._db.execute(
                "INSERT INTO changes VALUES (?, ?, ?, ?)", (row[0], known.id, known.state, state)
            )
            self._set_state(known.id, state)

    def _insert_audits(self, commit: int | None, rows: Iterable[tuple[int, str]]) -> None:
        self._db.executemany(
            "INSERT INTO audits (time, commit_id, fact_id, results) VALUES (?, ?, ?, ?)",
            [(now(), commit, *row) for row in rows],
        )

    def _commit(self, number: int) -> Commit:
        return read_commit(self._db, number)

    # Tensors

    def files(self, commit: int | None = None) -> list[File]:
        """Name and digest of the files of `factors`, in order."""
        at = self.head if commit is None else self._commit(commit)
        return read_files(self._db, at.effective) if at else []

    def factors(self, commit: int | None = None) -> list[dict[str, Factors]]:
        """The factors, by site, that make the weights after `commit` (None: the newest), in order.

        OSError or ValueError, naming the file, if one is damaged.
        """
        return [read_factors(self.folder / name, digest) for name, digest in self.files(commit)]

    def weights(self, commit: int | None = None) -> dict[str, Tensor]:
        """What takes the place of pristine weights after `commit` (None: the newest), by parameter.

        OSError or ValueError, naming the file, if it is damaged.
        """
        at = self.head if commit is None else self._commit(commit)
        if at is None or at.learned is None:
            return {}
        file = self._commit(at.learned).weights
        assert file is not None
        return read_tensors(self.folder / file[0], file[1])

    def keys(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By site, the keys `[p, d]` that edits are to leave as they are, and facts `[p]`: whose.

        Those of facts in the weights; what was replaced or forgotten is protected no more.
        """
        import torch

        with reading(self._db):
            ids, factors = [known.id for known in self.facts(WRITTEN)], self.factors()
        live = torch.tensor(ids, dtype=torch.int64)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for by_site in factors:
            for site, part in by_site.items():
                kept = torch.isin(part.facts, live)
                parts.setdefault(site, []).append((part.keys[kept], part.facts[kept]))
        return {
            site: (torch.cat([keys for keys, _ in of]), torch.cat([facts for _, facts in of]))
            for site, of in parts.items()
        }

    def save_pristine(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the weights of sites as they are before any edit; those kept already stay.

        Raises ValueError, before anything changes, if one that is kept has another shape or dtype.
        """
        self._check_writable()
        save_pristine(self.folder, tensors)

    def pristine(self) -> dict[str, Tensor]:
        """What `save_pristine` kept, by name, on the CPU."""
        return read_pristine(self.folder)

    # Exchange

    def export_lines(self) -> Iterator[str]:
        """Facts as JSON Lines, the newest version of each unless retired; see `exchange.py`."""
        with reading(self._db):
            newest = {x.fact.key: x for x in self.facts((*WAITING, *WRITTEN))}
            known = [(x, self.relation(x.fact.relation)) for x in newest.values()]
        return to_lines(known)

    def import_lines(self, path: str | os.PathLike) -> list[int]:
        """Add the facts of such a file, as `add` does; returns their ids.

        OSError or ValueError, before anything changes, naming the line that is damaged.
        """
        return self.add(*read_lines(path))

    # Housekeeping

    def transaction(self, what: str) -> AbstractContextManager[None]:
        """What the block does with the store is one step, durable at its end or undone; within
        another one it is part of that."""
        self._check_writable()
        return transaction(self._db, what)

    def _check_writable(self) -> None:
        if not self.writable:
            raise PermissionError(f"{self.folder} must be open for writing, got a store to read")

    def _set_state(self, number: int, state: str) -> None:
        self._db.execute("UPDATE facts SET state = ? WHERE id = ?", (state, number))


def _span(fact: Fact) -> tuple[int, int] | None:
    """Where in its source a fact stands: from its subject to the first object behind it."""
    words = f"{re.escape(fact.subject)}.*?{re.escape(fact.object)}"
    match = re.search(words, fact.source or "", re.DOTALL)
    return match.span() if match else None


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
