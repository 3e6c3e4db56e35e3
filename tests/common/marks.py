"""Marks on single cases of a test."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that `make test` leaves out: another one shows the same there, in less time."""
    return pytest.param(*values, marks=pytest.mark.slow)
