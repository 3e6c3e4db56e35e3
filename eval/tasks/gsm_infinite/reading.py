"""Sentences of the problems, taken apart by the grammar that they are written in."""

from __future__ import annotations

import re
from functools import cache

from hybrid_sleep.eval.tasks.gsm_infinite.graph import COUNT
from hybrid_sleep.eval.tasks.gsm_infinite.themes import FIRST_NAMES, THEMES, Theme


def theme_of(question: str) -> Theme | None:
    """The theme in whose words a question is asked; None if it is no question."""
    found = [t for t in THEMES.values() if re.fullmatch(_grammar(t)["question"], question)]
    return found[0] if found else None


def read_statement(theme: Theme, sentence: str) -> tuple[str, str | None] | None:
    """Name and definition in `The NAME equals DEFINITION`, None where NAME only exists.

    None for a sentence (without its full stop) that the theme has not.
    """
    grammar = _grammar(theme)
    if found := re.fullmatch(grammar["exists"], sentence):
        return found[1], None
    found = re.fullmatch(grammar["equals"], sentence)
    return found and (found[1], found[2])


@cache
def _grammar(theme: Theme) -> dict[str, str]:
    """Patterns for `question`, `exists` and `equals`."""
    kind = f"(?:{'|'.join(theme.kinds)})"
    place = f"(?:{'|'.join(FIRST_NAMES)}) (?:{'|'.join(theme.sites)})"
    names = {
        sort: phrase.format(kind=kind, place=place) for sort, phrase in theme.phrases.items()
    }
    name = f"(?:{'|'.join(names.values())})"
    others = "|".join(phrase for sort, phrase in names.items() if sort != COUNT)
    one = f"the {name}"
    several = f"the sum of {one}(?: and {one}|(?:, {one})+, and {one})"
    operands = f"(?:{one}|{several}|the difference between {one} and {one})"
    return {
        "question": (
            f"How many {kind} {theme.things} does {place} have\\?|What is the (?:{others})\\?"
        ),
        "exists": f"The ({name}) exists, and its number is greater than 0",
        "equals": f"The ({name}) equals (\\d+|(?:\\d (?:plus|times) )?{operands})",
    }
