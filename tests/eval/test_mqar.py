"""MQAR: zoology's documented example, laws of the draws by enumeration, what leaves the window."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.eval import tasks

SMALL = {"vocab_size": 24, "length": 16, "pairs": 4}
VARIANTS = [
    {},
    SMALL,
    {**SMALL, "random_non_queries": False},
    {"vocab_size": 90, "length": 48, "pairs": [2, 12, 6], "windows": 2, "power_a": 1.0},
    {"vocab_size": 201, "length": 10, "pairs": [1, 2]},
    {"vocab_size": 60, "length": 24, "pairs": 6, "windows": 6},
]
# 99.9 % quantiles of chi-square, by degrees of freedom.
CHI_SQUARE = {2: 13.82, 11: 31.26, 19: 43.82}


def by_params(params):
    return ",".join(f"{key}={value}" for key, value in params.items()) or "default"


def chi_square(seen, expected) -> float:
    seen, expected = np.asarray(seen, float), np.asarray(expected, float)
    expected = expected * seen.sum() / expected.sum()
    return float(((seen - expected) ** 2 / expected).sum())


def of_zoology(task, input_ids, labels):
    """Its inputs and labels, which are shifted already: without the window's blanks before it."""
    tokens, shifted = input_ids[-16:], labels[-16:]
    assert not any(input_ids[:-16]) and {*labels[:-16]} == {-100}
    return tokens, shifted[1:] + [-100]


def test_the_documented_example():
    """`multiquery_ar(vocab_size=12, num_kv_pairs=2, input_seq_len=16, random_non_queries=False)`,
    of which the documentation shows 15 places."""
    inputs = [2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0]
    labels = [-100] * 6 + [7] + [-100] * 5 + [8] + [-100] * 3
    task = tasks.load("mqar", vocab_size=12, pairs=2, length=16, random_non_queries=False)
    shown = [0] * 8 + inputs
    assert task.parse(shown) == {"pairs": [(2, 8), (4, 7)], "queries": [(14, 4, 7), (20, 2, 8)]}
    # Few enough examples exist that it is drawn itself.
    found = {}
    for split in tasks.SPLITS:
        batch = task.batch(split, 0, 100_000)
        same = (batch["input_ids"] == torch.tensor(shown)).all(1)
        if same.any():
            found[split] = batch["labels"][same].unique(dim=0).tolist()
    ((row,),) = found.values()
    assert of_zoology(task, shown, row) == (inputs, labels)


def test_an_example_in_words():
    task = tasks.load("mqar", vocab_size=12, pairs=2, length=16, random_non_queries=False)
    tokens = [0] * 8 + [2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0]
    assert task.describe({"input_ids": tokens}) == (
        "pairs: 2 has 8, 4 has 7\n"
        "4 at offset 2 of the questions: 7\n"
        "2 at offset 8 of the questions: 8"
    )


def test_the_stream_never_changes():
    """A seed in an old result must mean the same examples for ever."""
    task = tasks.load("mqar", **SMALL)
    (example,) = task.examples("train", 0, 1)
    assert example["input_ids"] == GOLDEN
    answers = {at: label for at, label in enumerate(example["labels"]) if label != -100}
    assert answers == GOLDEN_ANSWERS
    assert example["meta"] == {"task": "mqar", **task.params, "difficulty": [4] * 4}


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_every_key_is_asked_once_after_its_window(params, split):
    task = tasks.load("mqar", **params)
    half, end = task.vocab_size // 2, task.windows * task.window
    for example in task.examples(split, 3, 60):
        tokens, labels = example["input_ids"], example["labels"]
        held = {}
        for start in range(0, end, task.window):
            part = tokens[start : start + task.window]
            while part and part[0] == 0:
                part = part[1:]
            assert len(part) * task.windows == 2 * len(example["meta"]["difficulty"])
            held |= zip(part[::2], part[1::2], strict=True)
        assert all(0 < key < half <= value < task.vocab_size for key, value in held.items())
        m = len(held)
        assert len(set(held.values())) == m and set(example["meta"]["difficulty"]) == {m}
        assert m in task.levels
        asked = [at for at, token in enumerate(tokens) if at >= end and token in held]
        assert sorted(tokens[at] for at in asked) == sorted(held)
        assert all((at - end) % 2 == 0 and at < end + task.params["length"] - 2 * m for at in asked)
        expected = [-100] * len(tokens)
        for at in asked:
            expected[at + 1] = held[tokens[at]]
        assert labels == expected
        read = task.parse(tokens)
        assert read["pairs"] == list(held.items())
        assert read["queries"] == [(at, tokens[at], held[tokens[at]]) for at in asked]
        if not task.random_non_queries:
            assert all(tokens[at] == 0 for at in range(end, len(tokens)) if at not in asked)


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_a_batch_is_the_same_examples(split, params):
    task = tasks.load("mqar", **params)
    batch = task.batch(split, 11, 70)
    examples = list(task.examples(split, 11, 70))
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert batch["input_ids"].tolist() == [example["input_ids"] for example in examples]
    assert batch["labels"].tolist() == [example["labels"] for example in examples]
    assert batch["input_ids"].shape == (70, task.length)
    endless = itertools.islice(task.examples(split, 11), 70)
    assert [example["input_ids"] for example in endless] == batch["input_ids"].tolist()
    assert task.batch(split, 11, 7)["input_ids"].equal(batch["input_ids"][:7])
    assert not task.batch(split, 12, 70)["input_ids"].equal(batch["input_ids"])
    assert tasks.load("mqar", **task.params).params == task.params


def gaps_of(task, count):
    """The gap of each pair's question [count, pairs], pairs as they were shown."""
    batch = task.batch("train", 0, count)["input_ids"].numpy()
    pairs, asked = batch[:, task.window - 2 * task.most : task.window], batch[:, task.window :]
    keys = pairs[:, ::2]
    return np.stack([(asked == key[:, None]).argmax(1) // 2 for key in keys.T], axis=1)


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_gaps_are_drawn_one_after_another(power_a):
    task = tasks.load("mqar", vocab_size=60, length=12, pairs=2, power_a=power_a)
    gaps = gaps_of(task, 20_000)
    weights = [i ** (power_a - 1) for i in range(1, 5)]
    law = {}
    for first, second in itertools.permutations(range(4), 2):
        rest = sum(weights) - weights[first]
        law[first, second] = weights[first] / sum(weights) * weights[second] / rest
    seen = [int(((gaps == pair).all(1)).sum()) for pair in law]
    assert chi_square(seen, list(law.values())) < CHI_SQUARE[11]
    if power_a < 1:
        assert chi_square(seen, np.ones(12)) > CHI_SQUARE[11]


def test_keys_and_values_are_drawn_evenly_and_apart():
    task = tasks.load("mqar", vocab_size=12, length=12, pairs=3)
    # As many of each split as there are sets of pairs in it: together they are even.
    batches = [task.batch("train", 0, 56_250), task.batch("test", 0, 3750)]
    shown = torch.cat([batch["input_ids"][:, :6] for batch in batches]).numpy()
    for offset, orders in ((0, 60), (1, 120)):
        counts = np.unique(shown[:, offset::2], axis=0, return_counts=True)[1]
        assert len(counts) == orders
        assert chi_square(counts, np.ones(orders)) < orders + 4 * math.sqrt(2 * orders)
    assert len(np.unique(shown, axis=0)) > 0.99 * 60 * 120


def test_random_blanks_are_any_tokens_but_keys_of_the_example():
    task = tasks.load("mqar", vocab_size=20, length=12, pairs=2)
    batch = task.batch("train", 0, 20_000)
    asked = batch["input_ids"][:, task.window :].numpy()
    keys = batch["input_ids"][:, [4, 6]].numpy()
    is_key = (asked[:, :, None] == keys[:, None]).any(2)
    assert (is_key.sum(1) == 2).all()
    # Below 10, each token but 0 is a key of 2 in 9 examples.
    expected = np.where((np.arange(20) > 0) & (np.arange(20) < 10), 7 / 9, 1)
    assert chi_square(np.bincount(asked[~is_key], minlength=20), expected) < CHI_SQUARE[19]


def test_numbers_of_pairs_are_equally_frequent():
    task = tasks.load("mqar", vocab_size=90, length=48, pairs=[2, 6, 12])
    assert task.window == 44 and task.length == 88
    counts = [len(example["meta"]["difficulty"]) for example in task.examples("train", 0, 3000)]
    assert chi_square(np.unique(counts, return_counts=True)[1], np.ones(3)) < CHI_SQUARE[2]


def test_one_number_of_pairs_alone_keeps_tokens_and_layout():
    task = tasks.load("mqar", vocab_size=90, length=48, pairs=[2, 6, 12])
    only = task.only(6)
    for example in only.examples("test", 0, 50):
        assert example["meta"]["difficulty"] == [6] * 6
        assert task.parse(example["input_ids"]) == only.parse(example["input_ids"])
    assert (only.length, only.window, only.params) == (task.length, task.window, task.params)
    assert list(only.floor()) == [6]
    assert {len(e["meta"]["difficulty"]) for e in task.examples("test", 0, 50)} == {2, 6, 12}


def test_splits_never_share_a_set_of_pairs_however_it_is_shown():
    """300 sets of two pairs: few enough to see nearly all of them in either order."""
    task = tasks.load("mqar", vocab_size=12, length=8, pairs=2)
    sets, shown = {}, {}
    for split in tasks.SPLITS:
        rows = [tuple(row) for row in task.batch(split, 0, 6000)["input_ids"][:, :4].tolist()]
        shown[split] = set(rows)
        sets[split] = {frozenset([row[:2], row[2:]]) for row in rows}
    assert not sets["train"] & sets["test"]
    assert len(sets["train"] | sets["test"]) == 300
    assert 8 <= len(sets["test"]) <= 32
    assert all(len(shown[split]) == 2 * len(sets[split]) for split in tasks.SPLITS)


def test_pairs_have_left_when_they_are_asked_for():
    """Without a state-space layer nothing of the pairs is left, whatever their number."""
    task = tasks.load("mqar", vocab_size=40, length=16, pairs=[2, 4], windows=2)
    batch = task.batch("train", 0, 12)
    torch.manual_seed(0)
    config = HybridSleepConfig(
        vocab_size=task.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        layer_types=["full_attention"],
        window=task.window,
    )
    model = HybridSleepForCausalLM(config).eval()
    end = task.windows * task.window
    other = batch["input_ids"].clone()
    other[:, :end] = other[torch.randperm(12), :end]
    with torch.no_grad():
        logits, changed = (model(input_ids=ids).logits for ids in (batch["input_ids"], other))
    assert not logits[:, :end].equal(changed[:, :end])
    assert logits[:, end:].equal(changed[:, end:])


@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_floor_equals_a_count(params):
    task = tasks.load("mqar", **params)
    floor, majority, chance = task.floor(), task.majority(), task.chance()
    count = 4000
    examples = list(task.examples("test", 0, count))
    drawn, labels = random.Random(0), [e["labels"] for e in examples]
    constant = task.score(np.full((count, task.length), *majority.guess), examples)
    values = range(task.vocab_size // 2, task.vocab_size)
    guess = [[drawn.choice(values) for _ in row] for row in labels]
    guessed = task.score(np.array(guess), examples)
    for score in (constant, guessed):
        assert list(score["by_difficulty"]) == list(floor)
        for level, share in score["by_difficulty"].items():
            error = math.sqrt(chance / score["questions"][level])
            assert share == pytest.approx(floor[level], abs=4 * error)
        error = math.sqrt(chance / sum(score["questions"].values()))
        assert score["per_label"] == pytest.approx(majority.per_label, abs=4 * error)
    error = math.sqrt(majority.exact / count)
    assert constant["exact"] == pytest.approx(majority.exact, abs=4 * error)


def test_majority_of_one_pair_by_enumeration():
    majority = tasks.load("mqar", vocab_size=35, length=10, pairs=[1, 2]).majority()
    labels = [(v,) for v in range(17, 35)], list(itertools.permutations(range(17, 35), 2))
    for guess in (17, 34):
        shares = [sum(set(row) == {guess} for row in rows) / len(rows) for rows in labels]
        assert majority.exact == pytest.approx(sum(shares) / 2, rel=1e-12)
    assert majority.per_label == 1 / 18


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tasks.load("mqar", keys=3), r"vocab_size, length, pairs.*got keys=3"),
        (lambda: tasks.load("mqar", length=65), r"length must be even .*32, got 65"),
        (lambda: tasks.load("mqar", length=30), r"length must .*4 \* pairs = 32, got 30"),
        (lambda: tasks.load("mqar", pairs=0), r"pairs must .*at least 1 .*100000, got 0"),
        (lambda: tasks.load("mqar", pairs=[]), r"pairs must .*different.*got \[\]"),
        (lambda: tasks.load("mqar", pairs=[2, 2]), r"pairs must .*different.*got \[2, 2\]"),
        (lambda: tasks.load("mqar", pairs="8"), r"pairs must .*at least 1 .*got '8'"),
        (
            lambda: tasks.load("mqar", vocab_size=17),
            r"vocab_size must .*at least 18.*8 different.*got 17",
        ),
        (
            lambda: tasks.load("mqar", vocab_size=31, pairs=1),
            r"vocab_size .*must .*256.*got 31 .*224",
        ),
        (lambda: tasks.load("mqar", power_a=0), r"power_a must .*above 0, got 0"),
        (lambda: tasks.load("mqar", power_a=True), r"power_a must .*above 0, got True"),
        (
            lambda: tasks.load("mqar", random_non_queries=1),
            r"random_non_queries must be True or False, got 1",
        ),
        (lambda: tasks.load("mqar", windows=0), r"windows must .*at least 1 .*got 0"),
        (lambda: tasks.load("mqar", windows=3), r"windows must .*pairs=8, got 3"),
        (lambda: tasks.load("mqar", pairs=[4, 6], windows=4), r"windows must .*\[4, 6\], got 4"),
        (lambda: TASK.only(3), r"difficulty must .*pairs=\[4\], got 3"),
        (lambda: TASK.examples("dev", 0, 1), r"split must be one of 'train', 'test', got 'dev'"),
        (lambda: TASK.batch("test", 0, 0), r"count must .*at least 1, got 0"),
        (lambda: TASK.parse(GOLDEN[:-1]), r"1 windows of 8 tokens"),
        (lambda: TASK.parse([12, *GOLDEN[1:]]), r"1 windows of 8 tokens"),
        (lambda: TASK.parse([1, 2, *GOLDEN[2:]]), r"1 windows of 8 tokens"),
        (lambda: TASK.parse([0, 0, *GOLDEN[2:]]), r"1 windows of 8 tokens"),
        (lambda: TASK.parse(GOLDEN[:8] + [0] * 8), r"1 windows of 8 tokens"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TASK = tasks.load("mqar", **SMALL)
GOLDEN = [6, 19, 8, 15, 3, 13, 10, 22, 10, 9, 8, 14, 3, 20, 6, 0]
GOLDEN_ANSWERS = {9: 22, 11: 15, 13: 13, 15: 19}
