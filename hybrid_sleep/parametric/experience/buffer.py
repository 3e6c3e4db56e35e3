"""Experiences kept until a sleep: append-only, bounded, without secrets, encrypted, erased at last.

They are in the database of the facts (`schema.py`), and their keys in the folder beside it
(`keys.py`). What the text, token ids, provenance and signatures say reaches the disk as ciphertext.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hybrid_sleep.parametric.experience import erasure
from hybrid_sleep.parametric.experience.bounds import evict, worth
from hybrid_sleep.parametric.experience.choice import (
    BAND,
    Candidate,
    Chosen,
    choose,
    percentiles,
)
from hybrid_sleep.parametric.experience.duplicates import Index, signature
from hybrid_sleep.parametric.experience.experience import IMPORTANCE, Experience, Kept, Limits
from hybrid_sleep.parametric.experience.schema import SLEPT, WAITING
from hybrid_sleep.parametric.experience.scrub import scrub, scrub_data
from hybrid_sleep.parametric.experience.sealed import Sealed
from hybrid_sleep.parametric.experience.summary import SCRUBBED, summary
from hybrid_sleep.parametric.experience.vault import BODY, SIGNATURE, Vault, packed
from hybrid_sleep.parametric.schema import now
from hybrid_sleep.parametric.store import FactStore
from hybrid_sleep.validation import check_choice, check_count, check_number

Encode = Callable[[Experience], tuple[Sequence[int], int]]


@dataclass(frozen=True)
class Added:
    """What became of an experience: its id, or None where it is not in the buffer.

    duplicate: id of the one that says the same. scrubbed: secrets taken out, by kind. evicted: ids
    that went for it, its own if it was worth least.
    """

    id: int | None
    duplicate: int | None = None
    scrubbed: dict[str, int] = field(default_factory=dict)
    evicted: tuple[int, ...] = ()


class Buffer:
    """The experiences in a store of facts.

    store: open; for writing, or to read alone. encode: gives token ids of prompt and text, and the
    index of the first that is a target; it is not shown the rejected answer of a correction.
    limits: what is kept at most. seed: decides what goes where the buffer is full. similar: least
    share of common shingles of near-duplicates.

    Raises FileNotFoundError, naming the key, where one is missing, ValueError for what is out of
    range or damaged.
    """

    def __init__(
        self,
        store: FactStore,
        encode: Encode,
        *,
        limits: Limits | None = None,
        seed: int = 0,
        similar: float = 0.9,
    ):
        if check_number("similar", similar, above=0) > 1:
            raise ValueError(f"similar must be at most 1, got {similar!r}")
        self.limits, self.seed, self.similar = limits or Limits(), seed, similar
        self._encode = encode
        self._vault = Vault(store.database, store.folder, store.writable)
        self._indexes: dict[str, Index] = {}
        if store.writable:
            erasure.clean(self._vault)

    def add(self, experience: Experience, losses: Sequence[float]) -> Added:
        """Keep an experience, whole or not at all; durable on return.

        losses: of its tokens (nats). Secrets are taken out of text and provenance first. Where its
        source has said the same already, it is counted and left out. Where the buffer or its
        source's share is full, what is worth least goes (`bounds.py`): of the source that takes
        most, those slept over first, and of the rest a weighted random sample stays.

        Raises ValueError, before anything changes, without consent, for losses that are none and
        for an experience larger than the share of a source.
        """
        vault = self._vault
        vault.check_writable()
        if experience.consent is not True:
            raise ValueError(
                "consent must be True for an experience to be kept and learned from, got "
                f"{experience.consent!r}"
            )
        surprise = _mean(losses)
        experience, scrubbed = _scrubbed(experience)
        ids, start = self._encoded(experience)
        made = signature(experience)
        name = experience.source
        known = self._index(name).find(experience, made) if name in vault.sources else None
        if known is not None:
            with vault.transaction("experience"):
                vault.count(vault.sources[name].id, "duplicates")
                self._tally(vault.sources[name].id, scrubbed)
            return Added(None, known, dict(scrubbed))
        body = packed(experience, ids, start)
        # A nonce and a tag each, by NIST SP 800-38D.
        size = len(body) + len(made) + 2 * (12 + 16)
        if size > self.limits.bytes_of_one:
            raise ValueError(
                f"experience must take at most {self.limits.bytes_of_one} bytes, the share of a "
                f"source, got {size}"
            )
        importance = IMPORTANCE[experience.kind]
        key = vault.sources[name].key if name in vault.sources else vault.keys.make()
        with vault.transaction("experience"):
            source = vault.sources.get(name) or vault.add_source(name, key)
            number = vault.progress("offered") + 1
            vault.set_progress("offered", number)
            row = (
                number, source.id, experience.kind, WAITING, now(), experience.weights, surprise,
                importance, worth(self.seed, number, importance), len(ids), size,
                vault.seal(key, name, BODY, number, body),
                vault.seal(key, name, SIGNATURE, number, made),
            )  # fmt: skip
            vault.db.execute(
                "INSERT INTO experiences (id, source_id, kind, state, created, weights, surprise, "
                "importance, worth, tokens, size, body, signature) "
                f"VALUES ({', '.join('?' * len(row))})",
                row,
            )
            self._tally(source.id, scrubbed)
            evicted = evict(vault, self.limits, source.id)
        vault.sources.setdefault(name, source)
        self._index(name)
        for gone in evicted:
            for index in self._indexes.values():
                index.remove(gone)
        if number not in evicted and number not in self._index(name):
            self._index(name).add(number, made)
        return Added(None if number in evicted else number, None, dict(scrubbed), tuple(evicted))

    def get(self, number: int) -> Kept:
        """The experience with this id; ValueError if it is not there."""
        return self._read([number])[0]

    def ids(self, state: str | None = None) -> list[int]:
        """The ids of all experiences in `state`, or in any; the oldest first."""
        if state is not None:
            check_choice("state", state, (WAITING, SLEPT))
        rows = self._vault.db.execute(
            "SELECT id FROM experiences WHERE state = coalesce(?, state) ORDER BY id", (state,)
        )
        return [row[0] for row in rows]

    def experiences(self, state: str | None = None) -> list[Kept]:
        """All experiences in `state`, "waiting" or "slept", or in any; the oldest first."""
        return self._read(self.ids(state))

    def chosen(
        self,
        tokens: int,
        *,
        seed: int = 0,
        band: tuple[float, float] = BAND,
        share: float = 0.5,
    ) -> Chosen:
        """Waiting experiences of at most `tokens` tokens for a sleep; see `choice.choose`."""
        percentile, vault = self._percentiles(), self._vault
        rows = vault.db.execute(
            "SELECT id, source_id, kind, tokens FROM experiences WHERE state = ? ORDER BY id",
            (WAITING,),
        ).fetchall()
        names = {source.id: name for name, source in vault.sources.items()}
        candidates = [Candidate(n, names[of], kind, x, percentile[n]) for n, of, kind, x in rows]
        source_of = {one.id: one.source for one in candidates}
        index = Index(self.similar, lambda number: vault.body(number)[0])

        def known(number: int) -> bool:
            made = vault.signature(number, source_of[number])
            if index.find(vault.body(number)[0], made) is not None:
                return True
            index.add(number, made)
            return False

        taken, left_out = choose(
            candidates, tokens, seed=seed, band=band, share=share, known=known
        )  # fmt: skip
        kept = tuple(self._read(taken))
        weights = tuple(one.importance for one in kept)
        return Chosen(kept, weights, sum(len(one.ids) for one in kept), left_out)

    def slept(self, ids: Collection[int], commit: int | None = None) -> None:
        """Note that a sleep, recorded as `commit`, was over these; durable on return.

        Within a transaction of the store it is part of that, so that a commit and its experiences
        are one. Raises ValueError, before anything changes, for ids of none that wait.
        """
        waiting = set(self.ids(WAITING))
        if wrong := sorted(set(ids) - waiting):
            raise ValueError(f"ids must be of experiences that wait, got {wrong}")
        with self._vault.transaction("slept"):
            self._vault.db.executemany(
                "UPDATE experiences SET state = ?, commit_id = ? WHERE id = ?",
                [(SLEPT, commit, number) for number in ids],
            )

    def waiting_again(self, commit: int) -> int:
        """Let those wait again that the sleep of `commit`, taken back, was over; how many."""
        with self._vault.transaction("slept"):
            changed = self._vault.db.execute(
                "UPDATE experiences SET state = ?, commit_id = NULL WHERE commit_id = ?",
                (WAITING, commit),
            )
        return changed.rowcount

    def erase(
        self,
        source: str | None = None,
        *,
        ids: Collection[int] | None = None,
        proof: bool = True,
    ) -> int:
        """Erase all of `source`, or experiences by their ids; returns how many they were.

        Their keys go (what stays of a source is encrypted anew), their rows, the files derived of
        their sources, and what is left of them in free pages and the journal. The trail keeps when,
        how many, and for `proof` digests; without it also those of a whole source's past go.
        What was erased before a kill is erased after it; the rest follows at the next opening.

        Raises ValueError, before anything changes, for what is not in the buffer, OSError where the
        database cannot be rewritten at this moment.
        """
        try:
            return erasure.erase(self._vault, source, ids, proof)
        finally:
            self._indexes.clear()

    def derived(self, path: str | os.PathLike, source: str) -> Path:
        """Register a file or folder made of `source`, before it is written; returns its full path.

        It is erased with the source, or with any of its experiences. A path is relative to the
        folder of the store, in which it must be. Raises ValueError for others, and for an unknown
        source.
        """
        return erasure.register(self._vault, Path(path), source)

    def sealed(self, path: str | os.PathLike, sources: Collection[str]) -> Sealed:
        """A folder for what is made of several `sources`, encrypted by a key made of all of theirs.

        It is registered as `derived` of each. Raises ValueError as that does.
        """
        with self._vault.transaction("derived"):
            whole = [self.derived(path, source) for source in sorted(set(sources))]
        keys = [self._vault.sources[source].key for source in set(sources)]
        return Sealed(whole[0], self._vault.keys, self._vault.keys.joint(keys))

    def doom(self, path: str | os.PathLike) -> None:
        """Have what is `derived` at `path` erased by the next `clean`, or opening.

        Within a transaction of the store it is part of that.
        """
        erasure.doom(self._vault, Path(path))

    def clean(self) -> None:
        """Take away what is to be erased; nothing happens where nothing is. Raises OSError where
        the database cannot be rewritten at this moment."""
        erasure.clean(self._vault)

    def proof(self, text: str) -> dict[str, Any]:
        """What can be shown of `text`, as it was given to `add`.

        held: ids of experiences in which it is the text, the prompt or the rejected answer.
        erased: times at which such experiences were erased.
        """
        return erasure.proof(self._vault, text)

    def summary(self) -> dict[str, Any]:
        """Counts for a report, plain data for JSON; names of sources are in it, no content."""
        return {**summary(self._vault), "limits": asdict(self.limits)}

    def _encoded(self, experience: Experience) -> tuple[tuple[int, ...], int]:
        shown = replace(experience, kind="exchange", rejected="") if experience.rejected else None
        ids, start = self._encode(shown or experience)
        for one in (ids := tuple(ids)):
            check_count("token id", one, minimum=0)
        check_count("start", start, minimum=0, maximum=max(0, len(ids) - 1))
        if not ids:
            raise ValueError("encode must give at least one token, got none")
        return ids, start

    def _read(self, numbers: Sequence[int]) -> list[Kept]:
        percentile = self._percentiles()
        found: list[Kept] = []
        for number in numbers:
            experience, ids, start = self._vault.body(number)
            state, created, surprise, importance, commit = self._vault.db.execute(
                "SELECT state, created, surprise, importance, commit_id FROM experiences "
                "WHERE id = ?",
                (number,),
            ).fetchone()
            found.append(
                Kept(
                    number, experience, ids, start, state, created, surprise,
                    percentile.get(number), importance, commit,
                )
            )  # fmt: skip
        return found

    def _percentiles(self) -> dict[int, float]:
        """By id, of all that wait."""
        rows = self._vault.db.execute(
            "SELECT id, surprise FROM experiences WHERE state = ?", (WAITING,)
        ).fetchall()
        of = percentiles([surprise for _, surprise in rows])
        return {number: x for (number, _), x in zip(rows, of, strict=True)}

    def _index(self, name: str) -> Index:
        if name not in self._indexes:
            index = Index(self.similar, lambda number: self._vault.body(number)[0])
            for number, made in self._vault.signatures(name):
                index.add(number, made)
            self._indexes[name] = index
        return self._indexes[name]

    def _tally(self, source: int, scrubbed: Counter[str]) -> None:
        self._vault.count(source, "offered")
        for kind, count in scrubbed.items():
            self._vault.count(source, f"{SCRUBBED}{kind}", count)


def _scrubbed(experience: Experience) -> tuple[Experience, Counter[str]]:
    """An experience without secrets, and how many there were of each kind."""
    parts: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for name in ("text", "prompt", "rejected"):
        parts[name], found = scrub(getattr(experience, name))
        counts.update(found)
    provenance, found = scrub_data(dict(experience.provenance))
    counts.update(found)
    if experience.rejected and parts["rejected"].strip() == parts["text"].strip():
        raise ValueError(
            "a correction must differ from what it corrects by more than secrets, got "
            f"{parts['text']!r} for both"
        )
    return replace(experience, **parts, provenance=provenance), counts


def _mean(losses: Sequence[float]) -> float:
    """The mean loss per token; ValueError unless they are finite and at least 0."""
    losses = [check_number("losses", float(x), least=0) for x in losses]
    if not losses:
        raise ValueError("losses must be one for each token, got none")
    return math.fsum(losses) / len(losses)
