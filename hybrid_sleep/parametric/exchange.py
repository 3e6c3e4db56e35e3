"""Facts as JSON Lines: one fact a line, with where it came from and the words of its relation.

    {"subject": "Ada Byron", "relation": "lives in", "object": "Lisbon", "source": "...", "span":
     [0, 26], "words": {"statements": ["{} lives in"], ...}, "state": "active", "version": 1, ...}

All but the first three may be left out. State, version and time of creation are for the reader: in
another store, a fact starts anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.records import StoredFact
from hybrid_sleep.support.io import read_text, unreadable

NEEDED = ("subject", "relation", "object")
TAKEN = (*NEEDED, "source", "span", "words")
SHOWN = ("state", "version", "created")


def to_lines(known: Iterable[tuple[StoredFact, Relation]]) -> Iterator[str]:
    """A line of JSON, without its end, for each fact and its relation."""
    for stored, relation in known:
        fact, words = stored.fact, relation.to_dict()
        line: dict[str, Any] = {name: getattr(fact, name) for name in (*NEEDED, "source")}
        del words["name"]
        line |= {"span": stored.span, "words": words}
        line |= {name: getattr(stored, name) for name in SHOWN}
        yield json.dumps(line, ensure_ascii=False)


def read_lines(
    path: str | os.PathLike,
) -> tuple[list[Fact], list[Relation], list[tuple[int, int] | None]]:
    """Facts, relations and spans of a file that `to_lines` wrote, or that someone else did.

    OSError or ValueError, naming the file and its line, for one that is no fact, and for two that
    contradict each other.
    """
    facts, relations, spans = [], {}, []
    first: dict[tuple[str, str], tuple[int, Fact]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            fact, relation, span = _parsed(line)
            earlier, other = first.setdefault(fact.key, (number, fact))
            if other.object.casefold() != fact.object.casefold():
                raise ValueError(f"facts must not contradict each other, as line {earlier} does")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise unreadable(path, f"line {number}: {error}") from error
        facts.append(fact)
        spans.append(span)
        if relation is not None:
            relations[relation.name.casefold()] = relation
    return facts, list(relations.values()), spans


def _parsed(line: str) -> tuple[Fact, Relation | None, tuple[int, int] | None]:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"a fact must be a JSON object, got {line.strip()[:40]!r}")
    if unknown := content.keys() - {*TAKEN, *SHOWN}:
        raise ValueError(
            f"fields must be out of {', '.join((*TAKEN, *SHOWN))}, got {min(unknown)!r}"
        )
    source, span, words = (content.get(name) for name in ("source", "span", "words"))
    needed: dict[str, Any] = {name: content.get(name) for name in NEEDED}
    fact = Fact(**needed, source=source)
    if not (source is None or isinstance(source, str)):
        raise ValueError(f"source must be a text, got {source!r}")
    if words is not None and not isinstance(words, dict):
        raise ValueError(f"words must be a JSON object, got {words!r}")
    relation = None if words is None else Relation.from_dict({**words, "name": fact.relation})
    return fact, relation, None if span is None else _span(span, source)


def _span(span: Any, source: str | None) -> tuple[int, int]:
    whole = isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
    if not whole or not 0 <= span[0] < span[1] <= len(source or ""):
        raise ValueError(f"span must be [start, end] within source, got {span!r}")
    return span[0], span[1]
