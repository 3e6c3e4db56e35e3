"""The answer in a free-text reply."""

from __future__ import annotations

import re

_NUMBER = r"(?P<sign>-?)\$?(?P<whole>\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?P<rest>\.\d+)?"
_BETWEEN = r"[\s*_$\\(\[]*"
_LINK = r"(?:is|was|equals|=|:)"
_RULES = tuple(
    re.compile(rule, re.IGNORECASE)
    for rule in (
        rf"oxed\{{{_BETWEEN}{_NUMBER}",
        rf"\b(?:answer|solution)\b{_BETWEEN}(?:{_LINK}{_BETWEEN})+(?:\w+\s*=\s*)?{_NUMBER}",
        rf"(?:\b(?:is|equals)\b|=){_BETWEEN}(?:equal\s+to\s+)?{_NUMBER}",
        _NUMBER,
    )
)


def parse_answer(reply: str) -> int | None:
    r"""The integer that a reply gives as its answer, or None.

    The first rule that finds anything decides, and of several finds the last one counts:
    1. `\boxed{12}` (or `oxed{12}`, as an escaped `\b` leaves it);
    2. `answer` or `solution`, then `:`, `=`, `is`, `was` or `equals`, then a number;
    3. `is`, `equals` or `=`, then a number;
    4. any number.
    Case, spaces, `*`, `_`, `$` and opening brackets in between are ignored. `1,000` and `1{,}000`
    are 1000, `12.` and `12.0` are 12; a find that is no integer, such as `12.5`, is None.
    """
    for rule in _RULES:
        finds = list(rule.finditer(reply))
        if finds:
            found = finds[-1]
            if (found["rest"] or "").strip(".0"):
                return None
            return int(found["sign"] + re.sub(r"\D", "", found["whole"]))
    return None
