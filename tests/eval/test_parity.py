"""Parity: counted bit by bit, in both layouts, with a floor that no answer raises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hybrid_sleep.eval import tasks

VARIANTS = [
    {},
    {"elements": 24, "windows": 3, "prefixes": [5, 24]},
    {"elements": 12, "prefixes": [12]},
    {"elements": 20, "layout": "tagging", "windows": 2},
]


def by_params(params):
    return ",".join(f"{key}={value}" for key, value in params.items()) or "default"


def test_sequences_read_by_hand():
    bits = [1, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0]
    task = tasks.load("parity", elements=12, prefixes=[1, 4, 12])
    # Tokens: bits, then 2 for the first bit, 3 for the first four, 4 for all twelve.
    tokens = [*bits, 3, 1, 2, 1, 4, 1]
    assert task.parse(tokens) == {"word": bits, "queries": [(4, 1), (1, 1), (12, 1)]}
    assert task.describe({"input_ids": tokens}) == (
        "word: 1 0 1 1 0 0 0 1 0 1 0 0\n"
        "parity of the first 4: 1\nparity of the first 1: 1\nparity of the first 12: 1"
    )
    tags = tasks.load("parity", elements=12, layout="tagging").parse([*bits, 2])
    assert [answer for _, answer in tags["queries"]] == [1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_every_label_counts_bits(params, split):
    task = tasks.load("parity", **params)
    size = task.elements
    batch = task.batch(split, 5, 100)
    examples = list(task.examples(split, 5, 100))
    assert batch["input_ids"].tolist() == [example["input_ids"] for example in examples]
    assert batch["labels"].tolist() == [example["labels"] for example in examples]
    for example in examples:
        tokens, labels = example["input_ids"], example["labels"]
        bits = tokens[:size]
        assert set(bits) <= {0, 1}
        if task.layout == "tagging":
            assert labels == [-100] + [sum(bits[: t + 1]) % 2 for t in range(size)]
            assert tokens[size:] == [2]
            continue
        counts = [task.prefixes[token - 2] for token in tokens[size::2]]
        assert sorted(counts) == params.get("prefixes", [1, 2, 4, 8, 16, 32])
        answers = [sum(bits[:t]) % 2 for t in counts]
        assert labels == [-100] * size + [x for a in answers for x in (-100, a)]
        assert tokens[size + 1 :: 2] == answers
    assert tasks.load("parity", **task.params).params == task.params


def test_the_stream_never_changes():
    """A seed in an old result must mean the same examples for ever."""
    (example,) = tasks.load("parity", elements=16, prefixes=[1, 16]).examples("test", 0, 1)
    bits = [1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1]
    assert example["input_ids"] == [*bits, 2, 1, 3, 1]
    assert example["meta"]["difficulty"] == [1, 16]


def test_splits_never_share_a_word_and_miss_none():
    task = tasks.load("parity", elements=12, prefixes=[12])
    words = {
        split: {tuple(row) for row in task.batch(split, 0, count)["input_ids"][:, :12].tolist()}
        for split, count in (("train", 40_000), ("test", 4000))
    }
    assert not words["train"] & words["test"]
    assert len(words["train"] | words["test"]) > 0.999 * 2**12
    assert len(words["test"]) == pytest.approx(2**12 / 16, rel=0.2)


def test_floor_by_enumeration():
    """Every word of 12 bits, three questions: no answer tells anything of another."""
    words = np.array(list(itertools.product((0, 1), repeat=12)))
    parities = words.cumsum(axis=1) % 2
    for s, t in itertools.combinations(range(11), 2):
        task = tasks.load("parity", elements=12, prefixes=[s + 1, t + 1, 12])
        rows, counts = np.unique(parities[:, [s, t, 11]], axis=0, return_counts=True)
        assert len(rows) == 8 and set(counts) == {len(words) * task.majority().exact}
    task = tasks.load("parity", elements=12)
    assert task.majority().per_label == task.chance() == 0.5
    assert task.floor() == dict.fromkeys([1, 2, 4, 8, 12], 0.5)
    tagging = tasks.load("parity", elements=12, layout="tagging")
    assert tagging.majority().exact == 2**-12
    assert tagging.floor() == {1: 1.0, 2: 0.5, 4: 0.5, 8: 0.5, 12: 0.5}


def test_guessing_scores_the_floor():
    task = tasks.load("parity", elements=32, prefixes=[7, 32])
    batch = task.batch("test", 0, 4000)
    for guess in (0, 1):
        score = task.score(torch.full_like(batch["labels"], guess), batch)
        assert score["per_label"] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 8000))
        assert score["exact"] == pytest.approx(0.25, abs=4 * math.sqrt(0.1875 / 4000))


@pytest.mark.parametrize(
    "params, message",
    [
        ({"group": "S3"}, r"elements, layout, windows, prefixes, got group='S3'"),
        ({"elements": 11}, r"elements must .*4096.*got 11.*2048"),
        ({"elements": True}, r"elements must be an integer.*got True"),
        ({"windows": 8}, r"windows must .*12 elements.*got 8"),
        ({"layout": "tags"}, r"layout must .*'recall', 'tagging', got 'tags'"),
        ({"layout": "tagging", "prefixes": [1]}, r"prefixes must be None .*got \[1\]"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=message):
        tasks.load("parity", **params)
