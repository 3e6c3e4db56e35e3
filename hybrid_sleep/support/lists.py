"""Lists on a command line: `1-4`, `0,1,2`, `a,b`, read in one way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def parse_list(
    name: str, text: str, read: Callable[[str], Iterable[T]], allowed: str
) -> list[T]:
    """What `read` makes of each part of `text` between commas, in their order.

    Raises ValueError, saying what is `allowed`, for a part that `read` refuses with ValueError and
    for what comes twice.
    """
    try:
        found = [item for part in text.split(",") for item in read(part.strip())]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{name} must be {allowed}, each once, got {text!r}")
    return found


def parse_counts(name: str, text: str, minimum: int = 1) -> list[int]:
    """Integers from text such as `1,2,4`, or `1-4` for 1,2,3,4; ValueError naming `name`."""

    def read(part: str) -> Iterable[int]:
        first, dash, last = part.partition("-")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers or numbers[0] < minimum:
            raise ValueError
        return numbers

    return parse_list(name, text, read, f"integers of at least {minimum}, such as 1-4 or 1,2,4")


def parse_multiples(name: str, text: str) -> list[float]:
    """Numbers above 0 from text such as `1,3`, in ascending order; ValueError naming `name`."""

    def read(part: str) -> Iterable[float]:
        if not 0 < float(part) < float("inf"):
            raise ValueError
        return [float(part)]

    return sorted(parse_list(name, text, read, "numbers above 0, such as 1,3"))


def parse_names(name: str, text: str, known: Sequence[str]) -> list[str]:
    """Names out of `known` from text such as `a,b`, `all` or `none`; ValueError naming `name`."""
    if text in ("all", "none"):
        return list(known) if text == "all" else []

    def read(part: str) -> Iterable[str]:
        if part not in known:
            raise ValueError
        return [part]

    return parse_list(name, text, read, f"all, none, or some of {', '.join(known)}")
