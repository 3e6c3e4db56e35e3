"""When a sleep is due: against a clock walked through two days, and a store that is known."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hybrid_sleep.parametric.awake import awake, due_now
from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.options import MemoryOptions, changed_options, chosen_options
from hybrid_sleep.parametric.pressure import Limits, Measures, pressure
from hybrid_sleep.parametric.schedule import Schedule, due
from hybrid_sleep.parametric.store import FactStore
from hybrid_sleep.support.io import write_json_atomic

NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)
REST, FULL = pressure(Measures()), pressure(Measures(load=1.5))


def ago(**much):
    return NOON - timedelta(**much)


def asked(schedule=None, now=NOON, felt=FULL, **given):
    return due(now, schedule or Schedule(), felt, **{"waiting": 1, **given})


@pytest.mark.parametrize(
    ("given", "sleep", "why"),
    [
        ({}, True, "the pressure is 1.50, of load"),
        ({"felt": REST, "tokens": 4096}, True, "4096 tokens of experience wait"),
        (
            {"felt": REST, "tokens": 4095}, False,
            "nothing asks for it yet: a pressure of 0.00 of 1 and 4095 waiting tokens of 4096",
        ),
        (
            {"felt": REST, "schedule": Schedule(tokens=None), "tokens": 10**6}, False,
            "nothing asks for it yet: a pressure of 0.00 of 1",
        ),
        (
            {"schedule": Schedule(pressure=None)}, False,
            "nothing asks for it yet: 0 waiting tokens of 4096",
        ),
        ({"waiting": 0}, False, "nothing is new since the last sleep"),
        (
            {"active": ago(minutes=29)}, False,
            "it was used 29 min ago, and is idle only after 0.5 h",
        ),
        ({"active": ago(minutes=30)}, True, "the pressure is 1.50, of load"),
        (
            {"tried": ago(hours=5, minutes=59)}, False,
            "the last sleep was 6.0 h ago, and 6 h lie between two",
        ),
        ({"tried": ago(hours=6)}, True, "the pressure is 1.50, of load"),
        # A clock that was ahead must not keep a memory awake for years.
        (
            {"active": ago(days=-900), "tried": ago(days=-900)}, True,
            "the pressure is 1.50, of load",
        ),
        (
            {"schedule": Schedule(window=("22:00", "06:00"))}, False,
            "the pressure is 1.50, of load, but 12:00 is outside 22:00 to 06:00",
        ),
        (
            {"schedule": Schedule(window=("22:00", "06:00")), "tried": ago(hours=48)}, True,
            "the pressure is 1.50, of load, and it is overdue after 48.0 h, outside 22:00 to 06:00",
        ),
        (
            {"schedule": Schedule(window=("22:00", "06:00")), "since": ago(hours=47)}, False,
            "the pressure is 1.50, of load, but 12:00 is outside 22:00 to 06:00",
        ),
        (
            {"schedule": Schedule(window=("22:00", "06:00"), overdue=None), "since": ago(days=9)},
            False, "the pressure is 1.50, of load, but 12:00 is outside 22:00 to 06:00",
        ),
        ({"schedule": Schedule(window=("09:30", "12:01"))}, True, "the pressure is 1.50, of load"),
        # What was tried counts before what waits since longer.
        (
            {"schedule": Schedule(window=("22:00", "06:00")), "tried": ago(hours=8),
             "since": ago(days=9)},
            False, "the pressure is 1.50, of load, but 12:00 is outside 22:00 to 06:00",
        ),
    ],
)  # fmt: skip
def test_due_and_why(given, sleep, why):
    found = asked(**given)
    assert (found.sleep, found.why, bool(found)) == (sleep, why, sleep)
    assert found.to_dict() == {"sleep": sleep, "why": why}


@given(
    start=st.integers(0, 1439), length=st.integers(1, 1439), at=st.integers(0, 1439),
    zone=st.integers(-12, 14), second=st.sampled_from([0, 59]),
)  # fmt: skip
@example(start=60, length=60, at=120, zone=0, second=0)
@example(start=1400, length=60, at=20, zone=0, second=0)
def test_a_window_is_so_many_minutes_from_its_start_on_across_midnight_or_not(
    start, length, at, zone, second
):
    clock = [f"{m // 60 % 24:02}:{m % 60:02}" for m in (start, start + length)]
    place = timezone(timedelta(hours=zone))
    now = datetime(2026, 3, 10, at // 60, at % 60, second, tzinfo=place)
    inside = (at - start) % 1440 < length
    assert Schedule(window=tuple(clock)).within(now) is inside
    assert asked(Schedule(window=tuple(clock)), now).sleep is inside


def test_a_machine_asked_every_quarter_of_an_hour_sleeps_once_a_night():
    schedule = Schedule(window=("23:00", "05:00"), tokens=100)
    used, slept, nights = None, None, []
    for quarter in range(4 * 24 * 3):
        now = NOON + timedelta(minutes=15 * quarter)
        if 8 <= now.hour < 20 or now.hour == 23:
            used = now
        if due(now, schedule, REST, waiting=5, tokens=500, active=used, tried=slept):
            slept = now
            nights.append(now)
    assert [x - NOON for x in nights] == [
        timedelta(hours=12, minutes=15) + timedelta(days=n) for n in range(3)
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pressure": None, "tokens": None}, "pressure or tokens must ask for a sleep"),
        ({"pressure": 0}, "pressure must be a finite number above 0"),
        ({"tokens": 0}, "tokens must be an integer of at least 1"),
        ({"idle": -1}, "idle must be a finite number of at least 0"),
        ({"rest": -1}, "rest must be a finite number of at least 0"),
        ({"overdue": 0}, "overdue must be a finite number above 0"),
        ({"window": ("22:00", "22:00")}, "window must be two different times of day"),
        ({"window": ("22:00",)}, "window must be two different times of day"),
        ({"window": ("22:00", "24:00")}, "window must be times of day such as '22:00', got"),
        # What YAML makes of 22:00 without quotes.
        ({"window": (1320, "06:00")}, "window must be times of day such as '22:00', got 1320"),
    ],
)
def test_what_no_schedule_can_be(given, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**given)


def test_it_is_kept_with_the_other_options_and_old_folders_have_the_default(tmp_path):
    options = MemoryOptions(schedule=Schedule(window=("22:00", "06:00"), tokens=None, idle=0.0))
    again = MemoryOptions.from_dict(json.loads(json.dumps(options.to_dict())))
    assert again == options and again.schedule.window == ("22:00", "06:00")
    old = options.to_dict()
    del old["schedule"]
    write_json_atomic(tmp_path / "memory.json", old)
    assert chosen_options(tmp_path / "memory.json", None).schedule == Schedule()
    given = {"schedule": {"window": ["01:00", "05:00"]}, "schedule.idle": 2, "cap": 7}
    changed = changed_options(MemoryOptions(), given)
    assert changed.schedule == Schedule(window=("01:00", "05:00"), idle=2) and changed.cap == 7
    for wrong in ({"x": 1}, {"schedule": 1}, {"schedule.x": 1}, {"cap.x": 1}):
        with pytest.raises(ValueError, match="options must be those of a memory, got"):
            changed_options(MemoryOptions(), wrong)
    with pytest.raises(ValueError, match="options must have values of the right kind"):
        changed_options(MemoryOptions(), {"strengths": 1})


@pytest.fixture
def store(tmp_path):
    with FactStore.open(tmp_path / "memory", "0" * 64) as made:
        yield made


def experienced(store, number, created, tokens=10, state="waiting"):
    """A row as a buffer writes it, of which nobody can read what it says."""
    store.database.execute("INSERT OR IGNORE INTO sources VALUES (1, 'key', 'name')")
    store.database.execute(
        "INSERT INTO experiences VALUES (?, 1, 'text', ?, NULL, ?, 'w', 1, 1, 1, ?, 1, 'b', 's')",
        (number, state, created.isoformat(), tokens),
    )


def backdated(store, commit, then):
    store.database.execute("UPDATE commits SET time = ? WHERE id = ?", (then.isoformat(), commit))


def test_hours_awake_count_every_kind_of_sleep_and_what_waits(store):
    nothing = awake(store, 10, NOON)
    assert (nothing.experiences, nothing.facts, nothing.active, nothing.since) == (0, 0, None, None)
    assert nothing.measures == Measures(load=0.0)
    experienced(store, 1, ago(hours=30))
    experienced(store, 2, ago(hours=2), tokens=7)
    experienced(store, 3, ago(hours=1), state="slept")
    found = awake(store, 10, NOON)
    assert (found.experiences, found.tokens) == (2, 17)
    assert found.measures.hours == 30 and found.since == ago(hours=30)
    assert found.active == ago(hours=1) and found.tried is None
    for kind, hours, status in (
        ("wake", 20, "committed"), ("sleep", 12, "committed"), ("experience", 8, "committed"),
        ("experience", 4, "rolled back"), ("sleep", 3, "nothing to do"),
    ):  # fmt: skip
        backdated(store, store.commit(kind, status=status), ago(hours=hours))
    found = awake(store, 10, NOON)
    # The newest sleep that changed anything; the newest that was tried.
    assert found.measures.hours == 8 and found.tried == ago(hours=3)
    # A sleep is no use of the memory, what a person takes back is.
    backdated(store, store.commit("experience"), ago(minutes=9))
    assert awake(store, 10, NOON).active == ago(hours=1)
    backdated(store, store.undo().id, ago(minutes=8))
    assert awake(store, 10, NOON).active == ago(minutes=8)


def test_facts_wait_until_the_weights_come_from_a_sleep_over_these(store):
    (number,) = store.add([Fact("Ada", "lives in", "Lisbon")])
    store.database.execute("UPDATE facts SET created = ?", (ago(hours=40).isoformat(),))
    assert awake(store, 10, NOON).facts == 1 and awake(store, 10, NOON).measures.hours == 40
    store.commit("sleep", states={number: "active"}, report={"ids": [number]})
    assert awake(store, 10, NOON).facts == 0
    store.commit("experience")
    assert awake(store, 4, NOON).facts == 1
    assert awake(store, 4, NOON).measures == Measures(degraded=0.0, load=0.25, hours=0.0)
    store.record_audit({number: {}}, {number: "degraded"})
    assert awake(store, 4, NOON).measures.degraded == 1.0


def test_facts_alone_are_no_reason_for_a_sleep_over_experience(store):
    (number,) = store.add([Fact("Ada", "lives in", "Lisbon")])
    store.commit("wake", states={number: "active"})
    store.record_audit({number: {}}, {number: "degraded"})
    now = datetime.now(UTC) + timedelta(hours=7)
    options = MemoryOptions(schedule=Schedule(tokens=50))

    def why(kind, **given):
        return due_now(store, options, kind, now=now, **given).why

    assert why("full") == why("facts") == "the pressure is 10.00, of degraded"
    assert why("experience") == "nothing is new since the last sleep"
    experienced(store, 1, now - timedelta(hours=2), tokens=49)
    assert "nothing asks for it yet" in why("experience") and "0.29" in why("experience")
    experienced(store, 2, now - timedelta(hours=1), tokens=1)
    assert why("experience") == "50 tokens of experience wait"
    assert why("facts") == "the pressure is 10.00, of degraded"
    assert "used 1 min ago" in why("full", active=now - timedelta(minutes=1))
    # Later than now is a wrong clock, and hides nothing.
    experienced(store, 3, now + timedelta(days=400))
    assert "used 1 min ago" in why("full", active=now - timedelta(minutes=1))
    lower = MemoryOptions(schedule=Schedule(), limits=Limits(hours=2))
    assert due_now(store, lower, "experience", now=now).why.endswith("of hours")
    with pytest.raises(ValueError, match="kind must be one of 'facts', 'experience', 'full'"):
        why("nap")
    for name, kind in product(("now", "active"), ("full", "facts")):
        with pytest.raises(ValueError, match=f"{name} must have a time zone"):
            due_now(store, options, kind, **{"now": now, name: datetime(2026, 1, 1)})
