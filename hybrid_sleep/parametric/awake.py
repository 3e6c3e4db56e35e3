"""What a store says of the time since the last sleep; no model is needed for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from hybrid_sleep.parametric.experience.schema import WAITING as UNSLEPT
from hybrid_sleep.parametric.pressure import Measures, pressure
from hybrid_sleep.parametric.schedule import Due, due
from hybrid_sleep.parametric.schema import COMMITTED, DEGRADED, WAITING, WRITTEN
from hybrid_sleep.validation import check_choice

if TYPE_CHECKING:
    from hybrid_sleep.parametric.options import MemoryOptions
    from hybrid_sleep.parametric.store import FactStore

SLEEPS = ("facts", "experience", "full")
# What the commits of sleeps are called; others are of someone who used the memory.
ASLEEP = ("sleep", "experience")


@dataclass(frozen=True)
class Awake:
    """Since the last sleep.

    experiences, tokens: that wait. facts: those that a sleep would be over, 0 if it had nothing to
    do. active: when the memory was used last. tried: when the last sleep was, whatever came of it.
    since: when the first thing came that is known of, for where none was. measures: what of the
    pressure is known without a model.
    """

    experiences: int
    tokens: int
    facts: int
    active: datetime | None
    tried: datetime | None
    since: datetime | None
    measures: Measures


def awake(store: FactStore, cap: int, now: datetime) -> Awake:
    """What `store` says at `now`; cap: facts to keep at most."""
    history, facts = store.history(), store.facts()
    count, tokens, oldest = store.database.execute(
        "SELECT count(*), coalesce(sum(tokens), 0), min(created) FROM experiences WHERE state = ?",
        (UNSLEPT,),
    ).fetchone()
    (newest,) = store.database.execute("SELECT max(created) FROM experiences").fetchone()
    tried = [x.time for x in history if x.kind in ASLEEP]
    slept = [x.time for x in history if x.kind in ASLEEP and x.status == COMMITTED]
    used = [x.time for x in history if x.kind not in ASLEEP] + [x.created for x in facts]
    begun = [x.time for x in history[:1]] + [x.created for x in facts if x.state in WAITING]
    since = _first(begun + [oldest] * (oldest is not None))
    last = _last(slept) or since
    written = [x for x in facts if x.state in WRITTEN]
    lost = sum(x.state == DEGRADED for x in written)
    news = {x.fact.key: x.id for x in facts if x.state in (*WRITTEN, *WAITING)}
    return Awake(
        count,
        tokens,
        0 if slept_on(store, set(news.values())) else len(news),
        _last(used + [newest] * (newest is not None)),
        _last(tried),
        since,
        Measures(
            degraded=lost / len(written) if written else None,
            load=len(written) / cap,
            hours=None if last is None else max(0.0, (now - last).total_seconds() / 3600),
        ),
    )


def slept_on(store: FactStore, ids: set[int]) -> bool:
    """Whether the weights come from a sleep over these very facts."""
    head = store.head
    if head is None or head.effective is None:
        return False
    commit = next(x for x in store.history() if x.id == head.effective)
    return commit.kind == "sleep" and set(commit.report.get("ids", ())) == ids


def due_now(
    store: FactStore,
    options: MemoryOptions,
    kind: str = "full",
    *,
    now: datetime | None = None,
    active: datetime | None = None,
) -> Due:
    """Whether the schedule of `options` asks for a sleep of `kind` (one of `SLEEPS`); see `due`.

    now: None for the clock of this machine, in its zone. active: when the memory was used last, if
    the caller knows of later than what the store has. What only facts ask for is no reason for a
    sleep over experience alone. Raises ValueError for another kind, and a time without a zone.
    """
    check_choice("kind", kind, SLEEPS)
    now = datetime.now().astimezone() if now is None else now
    for name, moment in (("now", now), ("active", active)):
        if moment is not None and moment.tzinfo is None:
            raise ValueError(f"{name} must have a time zone, got {moment!r}")
    found = awake(store, options.cap, now)
    measures = Measures(hours=found.measures.hours) if kind == "experience" else found.measures
    facts = 0 if kind == "experience" else found.facts
    experiences, tokens = (0, 0) if kind == "facts" else (found.experiences, found.tokens)
    known = [x for x in (active, found.active) if x is not None and x <= now]
    return due(
        now, options.schedule, pressure(measures, options.limits), waiting=facts + experiences,
        tokens=tokens, active=max(known, default=None), tried=found.tried, since=found.since,
    )  # fmt: skip


def _first(times: list[str]) -> datetime | None:
    return min(map(datetime.fromisoformat, times), default=None)


def _last(times: list[str]) -> datetime | None:
    return max(map(datetime.fromisoformat, times), default=None)
