"""Break-even against trying every number of questions, and by hand."""

from __future__ import annotations

import itertools

import pytest

from hybrid_sleep.eval.benchmarks import break_even

MANY = 60


@pytest.mark.parametrize(
    ("invested", "saved"),
    list(itertools.product((-20, -7, -1, 0, 1, 7, 20, 21), (-7, -2, 0, 2, 5, 7))),
)
def test_break_even_by_trying_every_number_of_questions(invested, saved):
    ahead = [invested <= count * saved for count in range(MANY)]
    verdict = break_even.break_even(invested, saved)
    if verdict["pays"] == "always":
        assert all(ahead)
    elif verdict["pays"] == "never":
        assert not any(ahead)
    else:
        changes = [count for count in range(1, MANY) if ahead[count] != ahead[count - 1]]
        if verdict["pays"] == "from":
            assert changes == [verdict["questions"]] and ahead[-1]
        else:
            assert verdict["pays"] == "up to"
            assert changes == [verdict["questions"] + 1] and ahead[0]


def test_rivals_by_adding_up_what_each_would_pay():
    price = {"read": 50.0, "read_kept": 20.0, "ask": 2.0, "ask_kept": 5.0}
    keeping_all = [price["read_kept"] + q * price["ask_kept"] for q in range(MANY)]
    rereading = [q * (price["read_kept"] + price["ask_kept"]) for q in range(MANY)]
    sleeping = [price["read"] + q * price["ask"] for q in range(MANY)]
    for rival, paid in (("keeping", keeping_all), ("rereading", rereading)):
        first = next(q for q in range(MANY) if sleeping[q] <= paid[q])
        assert break_even.against(rival, price) == {"pays": "from", "questions": first}
    # 30 more at first, 3 less a question; 50 at first, 23 less a question.
    assert [break_even.against(rival, price)["questions"] for rival in break_even.RIVALS] == [10, 3]


def test_verdicts_of_a_row_by_hand():
    row = {
        "what": "wake",
        "windows": 8,
        "flops": {
            "token": {"slept": 1.0, "kept": 3.0},
            "read": {"1": 10, "4": 70},
            "read_kept": 10,
            "ask": 5,
            "ask_kept": 9,
        },
        "seconds": {
            "token": {"fresh": [9.0, 9.0], "slept": [1.0, 2.0], "kept": [4.0, 4.0]},
            "copying": {"kept": [1.0, 2.0]},
            "read": {"1": [10.0, 12.0], "4": [40.0, 42.0]},
            "read_kept": [11.0, 11.0],
            "ask": [5.0, 5.0],
            "ask_kept": [10.0, 11.0],
        },
        "joules": None,
    }
    result = {"rows": [{"what": "sleep"}, row], "answer": 2}
    break_even.judge(result)
    found = {(b["passes"], b["unit"], b["rival"]): b for b in result["break_even"]}
    assert len(found) == len(result["break_even"]) == 2 * 2 * 2
    # A question: 5 + 2 tokens of 1, or 9 + 2 of 3: 8 saved. Depth 1 invests nothing, depth 4 60.
    assert found[1, "flops", "keeping"]["pays"] == "always"
    assert found[4, "flops", "keeping"]["questions"] == 8
    # 70 against 10 + 15 - 7 a question.
    assert found[4, "flops", "rereading"]["questions"] == 4
    # First repeat: asking 7 or 10 + 8 - 3 copies = 15; second: 9 or 11 + 8 - 6 = 13.
    # Invested 29 and 31, saved 8 and 4; of two, the later one.
    seconds = found[4, "seconds", "keeping"]
    assert (seconds["pays"], seconds["questions"]) == ("from", 8)
    assert seconds["kinds"] == {"from": 2} and seconds["range"] == [4, 8]
    # Depth 1: gained 1, saved 8; invested 1, saved 4.
    assert found[1, "seconds", "keeping"]["kinds"] == {"always": 1, "from": 1}
    assert found[1, "seconds", "keeping"]["range"] == [1, 1]


def test_the_middle_of_several_verdicts():
    verdicts = {
        "a": {"pays": "from", "questions": 30},
        "b": {"pays": "always", "questions": None},
        "c": {"pays": "never", "questions": None},
        "d": {"pays": "from", "questions": 4},
        "e": {"pays": "up to", "questions": 1},
    }
    for names, middle in (("b", "b"), ("dbc", "d"), ("cdbea", "a"), ("ced", "e"), ("dab", "d")):
        found = break_even.together([verdicts[name] for name in names])
        pays = {name: found[name] for name in ("pays", "questions")}
        if names == "ced":
            assert pays["pays"] in ("never", "up to")
        else:
            assert pays == verdicts[middle]
        assert ("kinds" in found) == (len(names) > 1)
    found = break_even.together(list(verdicts.values()))
    assert found["kinds"] == {"from": 2, "always": 1, "never": 1, "up to": 1}
    assert found["range"] == [4, 30] and found["quartiles"] == [10.5, 23.5]
    assert break_even.together([verdicts["b"]] * 3)["range"] is None
