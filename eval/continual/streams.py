"""The streams by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from hybrid_sleep.eval.continual.automata import RuleStream
from hybrid_sleep.eval.continual.facts import FactStream
from hybrid_sleep.eval.continual.intents import Banking77, Clinc150
from hybrid_sleep.eval.continual.stream import TaskStream
from hybrid_sleep.validation import check_choice

STREAMS: dict[str, type[TaskStream]] = {
    kind.name: kind for kind in (RuleStream, FactStream, Clinc150, Banking77)
}


def new_stream(name: str, settings: Mapping[str, Any]) -> TaskStream:
    """The stream `name` with `settings`, fields of its class, where they are not to be the default.

    Raises ValueError for another name, for a setting that it does not have, for one that it needs
    and was not given, and what the class raises.
    """
    check_choice("stream", name, tuple(STREAMS))
    kind: Any = STREAMS[name]
    known = {field.name: field.default is MISSING for field in fields(kind)}
    for key in settings:
        if key not in known:
            names = ", ".join(known)
            raise ValueError(f"settings of stream {name} must be of {names}, got {key!r}")
    for key, needed in known.items():
        if needed and key not in settings:
            raise ValueError(f"{key} must be given for stream {name}")
    return kind(**settings)
