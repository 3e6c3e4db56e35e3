"""Marks on single cases of a test."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that `make test` leaves out: another one shows the same there, in less time."""
    return pytest.param(*values, marks=pytest.mark.slow)


def halved(*axes: Iterable[Any]) -> list[Any]:
    """Every combination of one value of each axis; of neighbours one is slow, as on a chessboard.

    So each value is there without the slow ones, and of three axes or more each pair of values.
    """
    places = product(*(enumerate(axis) for axis in axes))
    cases = [(sum(i for i, _ in place), [value for _, value in place]) for place in places]
    return [slow(*case) if odd % 2 else pytest.param(*case) for odd, case in cases]
