"""What a buffer keeps, of whom and how much, and what it does not."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from experiences import WEIGHTS, contents, correction, encode, opened, text
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_sleep.parametric.experience.buffer import Buffer
from hybrid_sleep.parametric.experience.experience import Experience, Limits
from hybrid_sleep.parametric.store import FactStore

LONG = "The meeting about the harbour wall and its lamps is in the old hall on Monday at noon."


@pytest.fixture
def buffer(tmp_path):
    store, made = opened(tmp_path)
    with store:
        yield made


def test_an_experience_comes_back_as_it_was_given(buffer, tmp_path):
    one = text("Bo moved to Faro.", provenance={"file": "a.txt", "line": 3})
    added = buffer.add(one, [1.0, 2.0, 6.0])
    two = correction("Where is Bo?", "In Lisbon.", "In Faro.", "bo")
    assert (added.id, buffer.add(two, [4.0]).id) == (1, 2)
    kept = buffer.experiences()
    assert [x.experience for x in kept] == [one, two]
    assert [x.surprise for x in kept] == [3.0, 4.0]
    assert [x.percentile for x in kept] == [25.0, 75.0]
    assert [x.importance for x in kept] == [1.0, 1.5]
    # The rejected answer is no part of what is learned.
    assert bytes(kept[1].ids) == b"Where is Bo?In Faro." and kept[1].start == 12
    with FactStore.open(tmp_path, write=False) as store:
        reader = Buffer(store, encode)
        assert contents(reader) == contents(buffer)
        with pytest.raises(PermissionError):
            reader.add(one, [1.0])


def test_secrets_are_taken_out_of_all_of_it(buffer):
    card, mark = "4111 1111 1111 1111", "[Card Number removed]"
    made = correction(f"Is it {card}?", f"No, {card}.", f"Yes, {card}!", provenance={"n": card})
    added = buffer.add(made, [1.0])
    assert added.scrubbed == {"Card Number": 4}
    kept = buffer.get(1)
    expected = correction(f"Is it {mark}?", f"No, {mark}.", f"Yes, {mark}!", provenance={"n": mark})
    assert kept.experience == expected
    assert bytes(kept.ids) == f"Is it {mark}?Yes, {mark}!".encode()
    assert buffer.summary()["scrubbed"] == {"Card Number": 4}


def test_without_consent_or_with_wrong_parts_it_is_refused(buffer):
    for wrong in (False, None, 1, "yes"):
        with pytest.raises(ValueError, match="consent"):
            buffer.add(text("a b c", consent=wrong), [1.0])
    for losses in ([], [float("nan")], [-1.0], [float("inf")]):
        with pytest.raises(ValueError, match="losses"):
            buffer.add(text("a b c"), losses)
    for parts in (
        {"kind": "exchange"},
        {"kind": "correction", "prompt": "p"},
        {"kind": "correction", "prompt": "p", "rejected": "a b"},
        {"kind": "dream"},
        {"prompt": "p"},
        {"weights": "x"},
        {"provenance": {"a": object()}},
        {"provenance": {1: 2}},
    ):
        with pytest.raises(ValueError):
            Experience("ada", "a b", **{"weights": WEIGHTS, **parts})
    assert contents(buffer)[0] == [] and buffer.summary()["offered"] == 0


def test_near_duplicates_are_dropped_and_counted_within_a_source(buffer):
    buffer.add(text(LONG), [1.0])
    for same in (LONG, LONG.replace(" ", "  "), LONG + " ."):
        assert buffer.add(text(same), [1.0]).duplicate == 1
    assert buffer.add(text(LONG, "bo"), [1.0]).duplicate is None
    summary = buffer.summary()
    assert summary["duplicates"] == summary["sources"]["ada"]["duplicates"] == 3
    # A sleep takes what two sources say once.
    chosen = buffer.chosen(10_000, band=(0, 100))
    assert chosen.left_out == {"a duplicate": 1}


def test_a_number_or_name_that_changed_is_no_duplicate(buffer):
    for changed in ("Monday", "Tuesday", "Monday the 3rd", "Monday the 4th"):
        assert buffer.add(text(LONG.replace("Monday", changed)), [1.0]).duplicate is None
    buffer.add(correction("Where?", "Here.", LONG), [1.0])
    assert buffer.add(correction("Where?", "Here.", LONG + " ."), [1.0]).duplicate is None
    assert buffer.add(correction("Where?", "There.", LONG), [1.0]).duplicate == 5


words = st.sampled_from(("ada", "bo", "cy"))


@settings(max_examples=12)
@given(st.lists(st.tuples(words, st.integers(1, 500)), min_size=6, max_size=14), st.integers(0, 2))
def test_bounds_and_shares_hold_and_all_that_went_is_counted(tmp_path_factory, offers, seed):
    limits = Limits(rows=5, bytes=9000, share=0.5)
    store, buffer = opened(tmp_path_factory.mktemp("bound"), limits=limits, seed=seed)
    with store:
        gone = set()
        for number, (source, size) in enumerate(offers, 1):
            added = buffer.add(text(f"{number} " + "x" * size, source), [1.0])
            gone |= set(added.evicted)
            assert (added.id is None) == (number in added.evicted)
            summary = buffer.summary()
            assert sum(summary["states"].values()) <= limits.rows
            assert summary["bytes"] <= limits.bytes
            for of in summary["sources"].values():
                assert of["waiting"] <= 2 and of["bytes"] <= 4500
        assert set(buffer.ids()) == set(range(1, len(offers) + 1)) - gone
        assert summary["evicted"] == len(gone) and summary["offered"] == len(offers)
        json.dumps(summary, allow_nan=False)


def test_what_stays_is_a_weighted_reservoir(tmp_path):
    store, buffer = opened(tmp_path, limits=Limits(rows=4, share=1.0), seed=7)
    with store:
        keys = {}
        for number in range(1, 15):
            right = number % 3 == 0
            made = correction(f"{number}?", "no", f"{number}") if right else text(f"It is {number}")
            buffer.add(made, [1.0])
            drawn = hashlib.sha256(f"7:{number}".encode()).digest()[:6]
            u = (int.from_bytes(drawn, "big") + 0.5) / 2**48
            keys[number] = u ** (1 / (1.5 if right else 1))
        assert buffer.ids() == sorted(sorted(keys, key=keys.get)[-4:])
        # What was slept over is worth less than what waits.
        first = buffer.ids()[0]
        buffer.slept([first])
        assert first in buffer.add(text("It is 15"), [1.0]).evicted


def test_what_is_larger_than_a_share_is_refused(tmp_path):
    store, buffer = opened(tmp_path, limits=Limits(bytes=4000))
    with store:
        with pytest.raises(ValueError, match="at most 2000 bytes"):
            buffer.add(text("x" * 600), [1.0])
        assert buffer.ids() == [] and buffer.summary()["offered"] == 0
        assert buffer.add(text("x" * 60), [1.0]).id == 1


def test_states_follow_a_commit_and_its_undoing(buffer, tmp_path):
    for number in (1, 2, 3):
        buffer.add(text(f"It is {number}"), [float(number)])
    store = buffer._vault
    store.db.execute(
        "INSERT INTO commits (id, kind, time, status, digest, report) "
        "VALUES (1, 'sleep', '', 'committed', '', '{}')"
    )
    buffer.slept([1, 2], 1)
    assert buffer.ids("slept") == [1, 2] and buffer.get(1).commit == 1
    assert buffer.get(1).percentile is None and buffer.get(3).percentile == 50.0
    with pytest.raises(ValueError, match="that wait"):
        buffer.slept([1, 3])
    # Part of a transaction of the store, it goes with it.
    with pytest.raises(KeyError), store.transaction("commit"):
        buffer.slept([3], 1)
        raise KeyError
    assert buffer.ids("waiting") == [3]
    assert buffer.waiting_again(1) == 2 and buffer.ids("waiting") == [1, 2, 3]


def test_a_sleep_gets_weights_and_a_budget(buffer):
    for number in range(10):
        buffer.add(text(f"It is {number}"), [float(number)])
    buffer.add(correction("Is it?", "No", "Yes"), [99.0])
    chosen = buffer.chosen(1000)
    # At 4.5, 13.6, 22.7 ... 95.5: two are known already; the correction is taken.
    assert sorted(x.id for x in chosen.experiences) == list(range(3, 12))
    assert chosen.left_out == {"known already": 2}
    assert dict(zip((x.id for x in chosen.experiences), chosen.weights, strict=True)) == {
        **dict.fromkeys(range(3, 11), 1.0), 11: 1.5,
    }  # fmt: skip
    assert chosen.tokens == 8 * len("It is 0") + len("Is it?Yes")
    few = buffer.chosen(20, seed=1)
    assert few.tokens <= 20 and few == buffer.chosen(20, seed=1)
    assert math.isclose(few.tokens, few.to_dict()["tokens"])


def test_a_ciphertext_in_anothers_place_is_found_out(buffer):
    for source in ("ada", "bo"):
        for number in (1, 2):
            buffer.add(text(f"It is {number}", source), [1.0])
    db = buffer._vault.db
    body = db.execute("SELECT body FROM experiences WHERE id = 1").fetchone()[0]
    for other in (2, 3):
        was = db.execute("SELECT body FROM experiences WHERE id = ?", (other,)).fetchone()[0]
        db.execute("UPDATE experiences SET body = ? WHERE id = ?", (body, other))
        with pytest.raises(ValueError, match="not where it was written"):
            buffer.get(other)
        db.execute("UPDATE experiences SET body = ? WHERE id = ?", (was, other))
    assert buffer.get(2).experience.text == "It is 2"


def test_a_missing_package_is_named(buffer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(ImportError, match=r"datasketch .*hybrid-sleep\[memory\]"):
        buffer.add(text("a b c"), [1.0])
