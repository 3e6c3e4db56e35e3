"""The packages that only who keeps experiences needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(name: str) -> Iterator[None]:
    """Import the package `name` in the block; an ImportError says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the package {name} must be installed to keep experiences "
            "(pip install 'hybrid-sleep[memory]')"
        ) from error
