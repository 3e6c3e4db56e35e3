"""Break-even against trying every number of questions, and by hand."""

from __future__ import annotations

import itertools

import pytest

from hybrid_sleep.eval.costs import break_even
from hybrid_sleep.eval.costs.break_even import Price, Verdict
from hybrid_sleep.eval.costs.cost import DecodeRow, Flops, Seconds

MANY = 60


@pytest.mark.parametrize(
    ("invested", "saved"),
    list(itertools.product((-20, -7, -1, 0, 1, 7, 20, 21), (-7, -2, 0, 2, 5, 7))),
)
def test_break_even_by_trying_every_number_of_questions(invested, saved):
    ahead = [invested <= count * saved for count in range(MANY)]
    verdict = break_even.break_even(invested, saved)
    if verdict.pays == "always":
        assert all(ahead)
    elif verdict.pays == "never":
        assert not any(ahead)
    else:
        changes = [count for count in range(1, MANY) if ahead[count] != ahead[count - 1]]
        if verdict.pays == "from":
            assert changes == [verdict.questions] and ahead[-1]
        else:
            assert verdict.pays == "up to"
            assert changes == [verdict.questions + 1] and ahead[0]


def test_alternatives_by_adding_up_what_each_would_pay():
    price = Price(once=50.0, question=2.0, once_kept=20.0, question_kept=5.0)
    sleeping = [50 + 2 * q for q in range(MANY)]
    assert [price.total("sleep", q) for q in range(MANY)] == sleeping
    for way, paid in (
        ("keeping", [20 + 5 * q for q in range(MANY)]),
        ("recomputing", [q * (20 + 5) for q in range(MANY)]),
    ):
        assert [price.total(way, q) for q in range(MANY)] == paid
        first = next(q for q in range(MANY) if sleeping[q] <= paid[q])
        assert price.against(way) == Verdict("from", first)
    # 30 more at first, 3 less a question; 50 at first, 23 less a question.
    assert [price.against(way).questions for way in break_even.ALTERNATIVES] == [10, 3]


def test_verdicts_of_a_row_by_hand():
    row = DecodeRow(
        what="decode", model="m", repeats=2, depths=[1, 4], question=1, answer=2, windows=8,
        past=8, ratio={}, bytes={},
        flops=Flops(
            token={"slept": 1.0, "kept": 3.0}, read={1: 10, 4: 70}, read_kept=10, ask=5, ask_kept=9,
        ),
        seconds=Seconds(
            token={"fresh": [9.0, 9.0], "slept": [1.0, 2.0], "kept": [4.0, 4.0]},
            copying=[1.0, 2.0],
            read={1: [10.0, 12.0], 4: [40.0, 42.0]},
            read_kept=[11.0, 11.0],
            ask=[5.0, 5.0],
            ask_kept=[10.0, 11.0],
        ),
    )  # fmt: skip
    # A question: 5 + 2 tokens of 1, or 9 + 2 of 3: 8 saved. Depth 1 invests nothing, depth 4 60.
    assert row.break_even("flops", 1, "keeping") == Verdict("always")
    assert row.break_even("flops", 4, "keeping") == Verdict("from", 8)
    # 70 against 10 + 15 - 7 a question.
    assert row.break_even("flops", 4, "recomputing") == Verdict("from", 4)
    # First round: asking 7 or 10 + 8 - 3 copies = 15; second: 9 or 11 + 8 - 6 = 13.
    # Invested 29 and 31, saved 8 and 4; of two, the later one.
    seconds = row.break_even("seconds", 4, "keeping")
    assert (seconds.pays, seconds.questions) == ("from", 8)
    assert seconds.kinds == {"from": 2} and seconds.range == [4, 8]
    # Depth 1: gained 1, saved 8; invested 1, saved 4.
    seconds = row.break_even("seconds", 1, "keeping")
    assert seconds.kinds == {"always": 1, "from": 1} and seconds.range == [1, 1]


def test_the_middle_of_several_verdicts():
    verdicts = {
        "a": Verdict("from", 30),
        "b": Verdict("always"),
        "c": Verdict("never"),
        "d": Verdict("from", 4),
        "e": Verdict("up to", 1),
    }
    for names, middle in (("b", "b"), ("dbc", "d"), ("cdbea", "a"), ("ced", "e"), ("dab", "d")):
        found = break_even.together([verdicts[name] for name in names])
        if names == "ced":
            assert found.pays in ("never", "up to")
        else:
            expected = verdicts[middle]
            assert (found.pays, found.questions) == (expected.pays, expected.questions)
        assert (found.kinds is not None) == (len(names) > 1)
    found = break_even.together(list(verdicts.values()))
    assert found.kinds == {"from": 2, "always": 1, "never": 1, "up to": 1}
    assert found.range == [4, 30] and found.quartiles == [10.5, 23.5]
    assert break_even.together([verdicts["b"]] * 3).range is None
    assert [str(verdicts[name]) for name in "abe"] == ["from 30", "always", "up to 1"]
