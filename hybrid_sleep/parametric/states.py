"""Which states facts may take together: at most one version of a fact is in the weights."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Mapping

from hybrid_sleep.parametric.records import StoredFact, read_fact, read_facts
from hybrid_sleep.parametric.schema import RETIRED, STATES, WAITING, WRITTEN
from hybrid_sleep.validation import check_choice


def settled(
    db: sqlite3.Connection, wanted: Mapping[int, str]
) -> Iterator[tuple[StoredFact, str]]:
    """Facts that change with the states `wanted`, by id, and to which.

    Versions behind one that is written, or that waits behind one that waits, are retired.
    """
    keys = {read_fact(db, number).fact.key for number in wanted}
    for key in sorted(keys):
        later: set[str] = set()
        for known in reversed(read_facts(db, "subject_key = ? AND relation_key = ?", key)):
            state = wanted.get(known.id, known.state)
            if later & set(WRITTEN) or (later and state in WAITING):
                state = RETIRED
            if state != RETIRED:
                later.add(state)
            if state != known.state:
                yield known, state


def check_states(
    db: sqlite3.Connection,
    states: Mapping[int, str],
    touched: Collection[int],
    allowed: tuple[str, ...] = STATES,
) -> None:
    """Raise ValueError unless all of `touched` are facts and may take the `states`, by id."""
    written: dict[tuple[str, str], int] = {}
    for number in sorted(touched):
        known = read_fact(db, number)
        state = states.get(number)
        if state is None:
            continue
        check_choice(f"state of fact {number}", state, allowed)
        if known.state == RETIRED and state != RETIRED:
            raise ValueError(
                f"state of fact {number} must stay 'retired', got {state!r}; add it again"
            )
        if state in WRITTEN and written.setdefault(known.fact.key, number) != number:
            raise ValueError(
                f"states must write one version of a fact, got {written[known.fact.key]} and "
                f"{number}, which contradict each other"
            )
