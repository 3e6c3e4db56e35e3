"""One-sided automata: steps by hand and by another evaluation, floors by enumeration, splits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.automaton import ones_by_place

VARIANTS = [
    {},
    {"cells": 13, "steps": 0, "rules": 30},
    {"cells": 12, "steps": [1, 3, 9], "rules": [110, 30, 1, 255], "windows": 2, "asked": 3},
    {"cells": 40, "steps": [2, 5], "rules": list(range(256)), "windows": 2},
]


def by_params(params):
    kept = {**params, "rules": np.size(params.get("rules", 110))}
    return ",".join(f"{key}={value}" for key, value in kept.items())


def cell_after(rule, line, place, steps):
    """Cell `place` from the definition, by recursion; in front of the line are zeros."""
    if steps == 0:
        return line[place] if place >= 0 else 0
    a, b, c = (cell_after(rule, line, place - back, steps - 1) for back in (2, 1, 0))
    return int(f"{rule:08b}"[7 - int(f"{a}{b}{c}", 2)])


def test_steps_worked_out_by_hand():
    """Rule 110 sets a cell but after 000, 100 and 111. Rule 1 turns 000 on, the front as well."""
    task = tasks.load("automaton", cells=12, steps=[1, 2], rules=[1, 110], asked=3)
    line = [0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0]
    #       00.0 off, 0.01 on, 011 on, 111 off, 110 on, 100 off, 001 on, 010 on, 101 on...
    once = [0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0]
    #       000 off, 001 on, 011 on, 110 on, 101 on, 010 on, 101 on, 011 on, 111 off, 111 off...
    twice = [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0]
    assert task.rollout(line, 110, 1).tolist() == once
    assert task.rollout(line, 110, 2).tolist() == twice
    assert task.rollout([0] * 12, 1, 1).tolist() == [1] * 12
    # The front is on now: 111 is off, so all go off; and at the next step on again.
    assert task.rollout([0] * 12, 1, 2).tolist() == [0] * 12
    assert task.rollout([1, *[0] * 11], 1, 1).tolist() == [0, 0, 0, *[1] * 9]
    # 110 is 01101110: 1, 2, 3, 5 and 6 turn a cell on.
    told = [24 + 2 * n + (n in (1, 2, 3, 5, 6)) for n in range(8)]
    cells = [2 * place + value for place, value in enumerate(line)]
    tokens = [*told, *cells, 41, 42 + 3, 42 + 11, 42 + 10, 54]
    assert (task.vocab_size, task.length, task.window) == (55, 25, 20)
    assert task.parse(tokens) == {
        "rule": 110, "line": "011100101000", "steps": 2, "queries": [(3, 1), (11, 0), (10, 1)],
    }  # fmt: skip
    assert task.describe({"input_ids": tokens}) == (
        "rule 110 on 011100101000\nafter 1 step: 011010111100\nafter 2 steps: 011111110010\n"
        "cell 3: 1, cell 11: 0, cell 10: 1"
    )


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_every_label_is_the_cell_that_is_asked_for(params, split):
    task = tasks.load("automaton", **params)
    steps = set()
    for example in task.examples(split, 3, 24):
        tokens, labels = example["input_ids"], example["labels"]
        assert len(tokens) == len(labels) == task.length and max(tokens) < task.vocab_size
        read = task.parse(tokens)
        line = [*map(int, read["line"])]
        places = [token - task.first_place for token in tokens[task.context + 1 : -1]]
        assert len(set(places)) == task.asked
        values = [cell_after(read["rule"], line, place, read["steps"]) for place in places]
        assert read["queries"] == list(zip(places, values, strict=True))
        # The label of a question stands where the next one does.
        assert labels == [-100] * (task.context + 2) + values
        assert example["meta"]["difficulty"] == [read["steps"]] * task.asked
        steps.add(read["steps"])
    assert steps == set(task.steps)


@pytest.mark.parametrize(("rule", "steps"), [(110, 2), (30, 1), (1, 3), (90, 0)])
def test_floors_by_enumeration(rule, steps):
    ones = np.zeros(8)
    for line in itertools.product((0, 1), repeat=8):
        ones += [cell_after(rule, line, place, steps) for place in range(8)]
    ones /= 2**8
    assert ones_by_place(rule, steps, 8) == pytest.approx(ones, abs=1e-12)
    task = tasks.load("automaton", cells=12, steps=steps, rules=rule)
    wide = np.concatenate([ones, np.full(4, ones[-1])])
    assert task.floor() == {steps: pytest.approx(np.maximum(wide, 1 - wide).mean(), abs=1e-12)}
    majority = task.majority()
    assert majority.per_label == pytest.approx(max(wide.mean(), 1 - wide.mean()), abs=1e-12)
    assert majority.guess == (int(wide.mean() >= 0.5),)


def test_the_floor_of_several_rules_does_not_know_the_rule():
    """170 keeps a cell, 85 turns it round: each is as often on as off; 0 and 255 are constant."""
    task = tasks.load("automaton", cells=12, steps=1, rules=[0, 85, 170, 255])
    assert task.floor() == {1: 0.5}
    assert tasks.load("automaton", cells=12, steps=1, rules=[0, 170]).floor() == {1: 0.75}


def test_the_exact_majority_is_that_of_the_test_split():
    task = tasks.load("automaton", cells=12, steps=[2, 1], rules=0, asked=2)
    assert task.majority() == (1.0, 1.0, (0,)) and task.chance() == 0.5


def test_splits_are_apart_and_drawn_the_same_however_sliced():
    task = tasks.load("automaton", cells=12, asked=4)
    lines = {
        split: {tuple(e["input_ids"][:12]) for e in task.examples(split, seed, count)}
        for split, seed, count in (("train", 0, 20_000), ("test", 1, 2_000))
    }
    assert not lines["train"] & lines["test"]
    assert len(lines["train"] | lines["test"]) > 0.98 * 2**12
    task = tasks.load("automaton", rules=[110, 30])
    whole = task.batch("train", 7, 40)
    assert torch.equal(whole["input_ids"][:9], task.batch("train", 7, 9)["input_ids"])
    assert whole["labels"].tolist() == [e["labels"] for e in task.examples("train", 7, 40)]


def test_limited_to_some_steps_lines_stay_the_same():
    task = tasks.load("automaton", rules=[110, 30])
    hard = task.only(3)
    one, other = (t.batch("test", 2, 20)["input_ids"] for t in (task, hard))
    assert torch.equal(one[:, : task.context], other[:, : task.context])
    assert set(other[:, task.context].tolist()) == {task.first_step + 2}
    assert list(hard.floor()) == [3] and hard.floor()[3] == task.floor()[3]
    with pytest.raises(ValueError, match=r"difficulty must .*steps=\[1, 2, 3, 4\], got 5"):
        task.only(5)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"cells": 11}, "cells must be an integer of at least 12 and at most 1024, got 11"),
        ({"steps": 10}, "steps must be at most 9, got 10"),
        ({"rules": [110, 256]}, r"rules must be at most 255, got \[110, 256\]"),
        ({"rules": [110, 110]}, "rules must be an integer or a list of one or more different"),
        ({"windows": 5}, "windows must divide the 16 tokens of a context and leave at least 3"),
        ({"windows": 8}, "leave at least 3 to a window, got 8"),
        ({"asked": 15}, "asked must be an integer of at least 1 and at most 14, got 15"),
    ],
)
def test_bad_parameters_are_named(params, said):
    with pytest.raises(ValueError, match=said):
        tasks.load("automaton", **params)


def test_what_is_no_automaton_is_refused():
    task = tasks.load("automaton", cells=12, steps=[1, 2], rules=[1, 110], asked=2)
    tokens = next(task.examples("test", 0, 1))["input_ids"]
    task.parse(tokens)
    for place, token in ((0, 26), (8, 2), (9, 0), (20, 39), (21, tokens[22]), (23, 53)):
        with pytest.raises(ValueError, match="input_ids must be a rule, 12 cells in order"):
            task.parse([*tokens[:place], token, *tokens[place + 1 :]])
    with pytest.raises(ValueError, match="24 tokens"):
        task.parse(tokens[:-1])
    other = [24 + 2 * n for n in range(8)]
    with pytest.raises(ValueError, match="a rule"):
        task.parse([*other, *tokens[8:]])
