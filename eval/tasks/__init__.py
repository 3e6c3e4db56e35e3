"""Synthetic tasks by name: `load("rule110", width=24, states=4, steps=8)`.

A task is one module with a subclass of `Task`, named in `TASKS` below.
"""

from __future__ import annotations

import inspect
from typing import Any

from hybrid_sleep.eval.tasks.ancestor import Ancestor
from hybrid_sleep.eval.tasks.automaton import Automaton
from hybrid_sleep.eval.tasks.base import IGNORED, LONGEST_EXAMPLE, SPLITS, Task
from hybrid_sleep.eval.tasks.circuit import Circuit
from hybrid_sleep.eval.tasks.depo import Depo
from hybrid_sleep.eval.tasks.gsm_infinite import GsmInfinite, GsmSymbolic
from hybrid_sleep.eval.tasks.mqar import Mqar
from hybrid_sleep.eval.tasks.parity import Parity
from hybrid_sleep.eval.tasks.rule110 import Rule110
from hybrid_sleep.eval.tasks.word_problem import WordProblem
from hybrid_sleep.validation import check_choice

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Ancestor, Automaton, Circuit, Depo, GsmInfinite, GsmSymbolic, Mqar, Parity, Rule110,
        WordProblem,
    )  # fmt: skip
}

__all__ = [
    "IGNORED",
    "SPLITS",
    "TASKS",
    "Ancestor",
    "Automaton",
    "Circuit",
    "Depo",
    "GsmInfinite",
    "GsmSymbolic",
    "Mqar",
    "Parity",
    "Rule110",
    "Task",
    "WordProblem",
    "load",
]


def load(name: str, **params: Any) -> Task:
    """The task called `name`, with the parameters it takes.

    Raises ValueError for a name or a parameter that does not exist (listing those that do), and
    for a parameter out of range. An example has at most a million tokens.
    """
    check_choice("name", name, tuple(sorted(TASKS)))
    allowed = inspect.signature(TASKS[name]).parameters
    for param in params:
        if param not in allowed:
            raise ValueError(
                f"parameters of task {name!r} must be among {', '.join(allowed)}, "
                f"got {param}={params[param]!r}"
            )
    task = TASKS[name](**params)
    if task.length > LONGEST_EXAMPLE:
        raise ValueError(
            f"examples must have at most {LONGEST_EXAMPLE:,} tokens, got {task.length:,} with "
            + ", ".join(f"{key}={value!r}" for key, value in params.items())
        )
    return task
