"""A task in words for a terminal: what it asks, what a guess is worth, examples by window."""

from __future__ import annotations

import inspect
import itertools
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hybrid_sleep.eval.tasks import TASKS, load
from hybrid_sleep.eval.tasks.base import IGNORED, SPLITS, Task
from hybrid_sleep.validation import check_choice, check_count

COLUMNS = 100
INDENT = 12
SHORTEST_RUN = 10  # as many equal tokens in a row are shown as one and a number


def listing() -> str:
    """Every task: its name, what it is in a line, its parameters with their defaults."""
    entries = []
    for name, task in sorted(TASKS.items()):
        parameters = inspect.signature(task).parameters.values()
        chosen = ", ".join(f"{p.name}={_value(p.default)}" for p in parameters)
        entries.append("\n".join([name, *_wrapped(_about(task), "  "), *_wrapped(chosen, "    ")]))
    return "\n\n".join(entries)


def show(
    name: str,
    params: Mapping[str, Any],
    split: str = "test",
    seed: int = 0,
    count: int = 1,
) -> str:
    """`show_lines` as one text."""
    return "\n".join(show_lines(name, params, split, seed, count))


def show_lines(
    name: str,
    params: Mapping[str, Any],
    split: str = "test",
    seed: int = 0,
    count: int = 1,
) -> Iterator[str]:
    """The task `name` with `params`, and the first `count` examples of (split, seed), as they come.

    An example is its tokens by window (`0 x 12` stands for twelve in a row), with the labels below
    the tokens at whose places they stand, and then `describe`. Raises ValueError for whatever
    `load` or `Task.examples` refuse.
    """
    task = load(name, **params)
    check_choice("split", split, SPLITS)
    check_count("seed", seed, 0)
    check_count("count", count)
    yield from _wrapped(f"{name}: {_about(task)}", "")
    yield ""
    yield from _facts(task)
    for number, example in enumerate(task.examples(split, seed, count), 1):
        yield from ("", f"{split} example {number}, seed {seed}", *_windows(task, example), "")
        for line in task.describe(example).splitlines():
            yield from _wrapped(line, "")


def _about(task: Task | type[Task]) -> str:
    """The first paragraph of a task's docstring."""
    paragraph = (inspect.getdoc(task) or "").partition("\n\n")[0]
    return " ".join(paragraph.split())


def _value(value: Any) -> str:
    """A parameter as KEY=VALUE on a command line has it."""
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _facts(task: Task) -> Iterator[str]:
    cut = [min(task.window, task.length - at) for at in range(0, task.length, task.window)]
    sizes = [(size, len(list(run))) for size, run in itertools.groupby(cut)]
    windows = " and ".join(f"{times} of {size}" for size, times in sizes)
    parameters = ", ".join(f"{key}={_value(value)}" for key, value in task.params.items())
    yield from _fact("parameters", parameters)
    tokens = f"{task.length} tokens out of {task.vocab_size}"
    yield from _fact("example", f"{tokens}, in windows: {windows}")
    yield from _fact("difficulty", task.difficulty)
    floor = ", ".join(f"{level}: {_share(share)}" for level, share in task.floor().items())
    yield from _fact("floor", f"best guess without memory, by {task.difficulty}: {floor}")
    majority, word = task.majority(), _word(task)
    guess = f" ({' '.join(map(word, majority.guess))})" if majority.guess else ""
    yield from _fact(
        "majority",
        f"most frequent label{guess}: {_share(majority.per_label)} of labels, "
        f"{_share(majority.exact)} of examples",
    )
    yield from _fact("chance", f"uniform guess: {_share(task.chance())} of questions")


def _fact(name: str, text: str) -> list[str]:
    return _wrapped(text, " " * INDENT, name)


def _share(share: float) -> str:
    """A share to three digits."""
    if share in (0, 1):
        return str(int(share))
    return f"{share:.3f}" if share >= 0.001 else f"{share:.1e}"


def _word(task: Task) -> Callable[[int], str]:
    """What shows a token of `task`: its text where it has one."""
    decode = getattr(task, "decode", None)
    return (lambda token: decode([token]) or f"<{token}>") if decode else str


def _windows(task: Task, example: Mapping[str, Any]) -> Iterator[str]:
    """The tokens of each window, with a line of labels below those that have some."""
    word = _word(task)
    tokens = [word(token) for token in example["input_ids"]]
    labels = ["." if label == IGNORED else word(label) for label in example["labels"]]
    for number, start in enumerate(range(0, task.length, task.window), 1):
        cells = list(_cells(*(row[start : start + task.window] for row in (tokens, labels))))
        supervised = any(below.strip() != "." for _, below in cells)
        first = f"window {number}"
        for line in _lines(cells):
            above, below = (" ".join(row).rstrip() for row in zip(*line, strict=True))
            yield f"{first:{INDENT}}{above}"
            if supervised:
                yield f"{'  labels':{INDENT}}{below}"
            first = ""


def _cells(tokens: Sequence[str], labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a token and the label at its place, padded to one width."""
    for (token, label), run in itertools.groupby(zip(tokens, labels, strict=True)):
        times = len(list(run))
        shown = [token] * times
        if label == "." and times >= SHORTEST_RUN:
            shown = [f"{token} x {times}"]
        for text in shown:
            width = max(len(text), len(label))
            yield text.rjust(width), label.rjust(width)


def _lines(cells: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Cells, as many to a line as fit into it."""
    line: list[tuple[str, str]] = []
    width = INDENT
    for cell in cells:
        if line and width + len(cell[0]) + 1 > COLUMNS:
            yield line
            line, width = [], INDENT
        line.append(cell)
        width += len(cell[0]) + 1
    yield line


def _wrapped(text: str, indent: str, name: str = "") -> list[str]:
    """`text` in lines of at most COLUMNS, `name` in the indent of the first."""
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=name.ljust(len(indent)),
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
