"""Lists on a command line: what they mean, and that whatever is none is named."""

from __future__ import annotations

import pytest

from hybrid_sleep.support.lists import parse_counts, parse_multiples, parse_names


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("3", [3]),
        ("1-4", [1, 2, 3, 4]),
        ("4,1, 2", [4, 1, 2]),
        ("1-3,8,10-11", [1, 2, 3, 8, 10, 11]),
    ],
)
def test_counts(text, wanted):
    assert parse_counts("depths", text) == wanted


@pytest.mark.parametrize("text", ["", "0", "4-1", "1,,2", "-1", "1-", "1.5", "two", "1,1", "2,1-3"])
def test_what_is_no_list_of_counts(text):
    with pytest.raises(ValueError) as caught:
        parse_counts("depths", text)
    told = f"depths must be integers of at least 1, such as 1-4 or 1,2,4, each once, got {text!r}"
    assert str(caught.value) == told


def test_counts_may_begin_elsewhere():
    assert parse_counts("seeds", "0,1,2", minimum=0) == [0, 1, 2]
    with pytest.raises(ValueError, match="windows must be integers of at least 2"):
        parse_counts("windows", "1,8", minimum=2)


def test_multiples_are_sorted():
    assert parse_multiples("compute", "3,0.5,1") == [0.5, 1.0, 3.0]
    for text in ("", "0", "-1", "inf", "nan", "1,1.0", "x"):
        with pytest.raises(ValueError, match="compute must be numbers above 0"):
            parse_multiples("compute", text)


def test_names():
    known = ("once", "wider")
    assert parse_names("baselines", "wider, once", known) == ["wider", "once"]
    assert parse_names("baselines", "all", known) == list(known)
    assert parse_names("baselines", "none", known) == []
    for text in ("", "deeper", "once,once", "once,"):
        with pytest.raises(ValueError, match="must be all, none, or some of once, wider, each"):
            parse_names("baselines", text, known)
