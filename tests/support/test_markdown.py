"""Tables in Markdown."""

from __future__ import annotations

import pytest

from hybrid_sleep.support.markdown import table


def test_the_last_alignment_holds_for_the_rest():
    assert table(["a", "b", "c"], [["x", 1, 2.5]], "lr") == [
        "| a | b | c |", "| :--- | ---: | ---: |", "| x | 1 | 2.5 |",
    ]  # fmt: skip
    assert table(["a"], [], "lr") == ["| a |", "| :--- |"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"row must be 2 cells long, got \['x'\]"):
        table(["a", "b"], [["x"]])
