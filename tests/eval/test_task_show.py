"""Tasks in words: a page read as a whole, and what holds for every task."""

from __future__ import annotations

import itertools
import re

import pytest

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.show import listing, show, show_lines

SMALL = {
    "ancestor": {"nodes": 10, "hops": [1, 3], "order": "random", "queries": 2},
    "automaton": {"cells": 12, "steps": [1, 3], "rules": [30, 110], "windows": 2},
    "circuit": {"wires": 2, "levels": 3, "order": "random", "windows": 2, "asked": 3},
    "depo": {"nodes": 8, "hops": 4, "queries": 4, "alphabet": 8, "longest": 1},
    "gsm_infinite": {"ops": [1, 2], "length": 48, "windows": 2, "noise": False},
    "mqar": {"vocab_size": 64, "length": 32, "pairs": [2, 8], "windows": 2},
    "parity": {"elements": 24, "layout": "tagging"},
    "rule110": {"width": 9, "states": 3, "steps": [1, 2]},
    "word_problem": {"group": "S3", "elements": 8, "prefixes": [1, 4, 8]},
}


def test_a_page():
    assert show("word_problem", SMALL["word_problem"]) == PAGE


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("rule110", {"width": 10**11}),
        ("rule110", {"width": 1000, "states": 1000, "steps": 1}),
        ("rule110", {"width": 1000, "steps": 1000}),
        ("depo", {"nodes": 10**5}),
        ("depo", {"longest": 10**5, "shortest": 10**5}),
        ("depo", {"queries": 10**5}),
        ("mqar", {"length": 10**9}),
        ("parity", {"elements": 10**9}),
        ("word_problem", {"elements": 10**5}),
        ("gsm_infinite", {"length": 10**9}),
    ],
)
def test_sizes_that_would_take_hours_are_refused_at_once(name, params):
    with pytest.raises(ValueError, match=rf"^({'|'.join(params)}|examples) .*must .*at most"):
        show(name, params)


def test_lines_come_before_the_floor_is_known(monkeypatch):
    task = tasks.TASKS["rule110"]
    monkeypatch.setattr(task, "floor", lambda self: pytest.fail("too early"))
    lines = itertools.takewhile(
        lambda line: not line.startswith("difficulty"), show_lines("rule110", SMALL["rule110"])
    )
    assert any("width=9" in line for line in lines)


def test_equal_tokens_in_a_row_are_counted():
    params = {"vocab_size": 12, "pairs": 2, "length": 16, "random_non_queries": False}
    page = show("mqar", {**params, "length": 32}).splitlines()
    (first,) = (line for line in page if line.startswith("window 1"))
    task = tasks.load("mqar", **{**params, "length": 32})
    (example,) = task.examples("test", 0, 1)
    shown = example["input_ids"][24:28]
    assert first.split() == ["window", "1", "0", "x", "24", *map(str, shown)]


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_every_token_and_label_is_there_and_fits(name, split):
    task = tasks.load(name, **SMALL[name])
    page = show(name, SMALL[name], split=split, seed=3, count=2)
    assert max(map(len, page.splitlines())) <= 100
    examples = list(task.examples(split, 3, 2))
    for number, example in enumerate(examples, 1):
        _, _, part = page.partition(f"{split} example {number}, seed 3\n")
        part = part.partition("\n\n")[0]
        rows, below = [], []
        for line in part.splitlines():
            text = re.sub(r"(\S+) x (\d+)", lambda m: " ".join([m[1]] * int(m[2])), line[12:])
            (below if line.startswith("  labels") else rows).extend(text.split())
        words = getattr(task, "decode", None)
        if words:
            assert len(rows) == task.length
            told = " ".join(row for row in rows if not row.startswith("<"))
            assert told == " ".join(words([t]) for t in example["input_ids"] if words([t]))
            continue
        assert rows == [str(token) for token in example["input_ids"]]
        labels = [str(label) for label in example["labels"] if label != -100]
        assert [label for label in below if label != "."] == labels
        for line in task.describe(example).splitlines():
            assert " ".join(line.split()) in " ".join(page.split())


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_label_stands_below_its_place(name):
    """In each line the label's last letter is where the token's is."""
    lines = show(name, SMALL[name]).splitlines()
    task = tasks.load(name, **SMALL[name])
    (example,) = task.examples("test", 0, 1)
    supervised = sum(label != -100 for label in example["labels"])
    for above, below in zip(lines, lines[1:], strict=False):
        if below.startswith("  labels"):
            for match in re.finditer(r"\S+", below[12:]):
                end = 12 + match.end()
                assert above[end - 1] != " "
                supervised -= match[0] != "."
    assert supervised == 0


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_the_list_has_every_task_and_default(name):
    text = listing()
    assert max(map(len, text.splitlines())) <= 100
    entry = next(part for part in text.split("\n\n") if part.startswith(f"{name}\n"))
    chosen = dict(re.findall(r"(\w+)=(\[[^]]*\]|[^,\s]+)", entry))
    default = tasks.load(name).params
    assert list(chosen) and set(chosen) >= set(default)
    for key, value in chosen.items():
        if value != "null":
            assert str(default[key]).replace("'", '"').lower() == value.lower()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: show("depot", {}), r"name must .*'depo', .*got 'depot'"),
        (lambda: show("mqar", {"keys": 1}), r"parameters of .*pairs.*got keys=1"),
        (
            lambda: show("parity", {}, split="dev"),
            r"split must be one of 'train', 'test', got 'dev'",
        ),
        (lambda: show("parity", {}, count=0), r"count must .*at least 1, got 0"),
        (lambda: show("parity", {}, seed=-1), r"seed must .*at least 0, got -1"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


PAGE = """\
word_problem: Products of the first t of `elements` random elements of `group`: S3, S5, A5 or Z60.

parameters  group=S3, elements=8, layout=recall, windows=1, prefixes=[1, 4, 8]
example     14 tokens out of 9, in windows: 1 of 8 and 1 of 6
difficulty  elements
floor       best guess without memory, by elements: 1: 0.167, 4: 0.167, 8: 0.167
majority    most frequent label (0): 0.167 of labels, 0.005 of examples
chance      uniform guess: 0.167 of questions

test example 1, seed 0
window 1    1 2 4 4 2 4 0 0
window 2    8 2 7 4 6 1
  labels    . 2 . 4 . 1

word: 021 102 201 201 102 201 012 012
product of the first 8: 102
product of the first 4: 201
product of the first 1: 021"""
