"""Rule 110: golden values, an independent formulation, splits that never meet, exact floors."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks import rule110

TABLE = {"111": "0", "110": "1", "101": "1", "100": "0", "011": "1", "010": "1", "001": "1"}
START = "101110110000101011110111"
GOLDEN = {
    1: "111011110001111110011100",
    4: "001111111101001100000000",
    8: "111000110001110100000011",
    16: "100001110011011101100110",
    32: "111100011101111001111101",
}


def naive(ring: str, steps: int, boundary: str = "ring") -> str:
    """Rule 110 read off its table, one neighbourhood at a time."""
    for _ in range(steps):
        left, right = (ring[-1], ring[0]) if boundary == "ring" else ("0", "0")
        padded = left + ring + right
        ring = "".join(TABLE.get(padded[i : i + 3], "0") for i in range(len(ring)))
    return ring


def test_golden_states():
    task = tasks.load("rule110", width=24, states=4, steps=8)
    for steps, ended in GOLDEN.items():
        assert task.rollout(START, steps) == ended
    assert task.rollout(START) == GOLDEN[8]
    assert task.rollout(START, 0) == START
    lonely = "0" * 23 + "1"
    assert task.rollout(lonely, 1) == "0" * 22 + "11"
    assert task.rollout(lonely, 4) == "0" * 19 + "11111"
    assert task.rollout(lonely, 32) == "110001110101101111011111"
    assert task.rollout("1" * 24, 1) == "0" * 24
    assert task.rollout("0" * 24, 32) == "0" * 24
    assert task.rollout("01" * 12, 1) == "1" * 24
    assert task.rollout("01" * 12, 2) == "0" * 24


@given(st.integers(3, 40), st.integers(0, 40), st.data())
def test_rollout_equals_the_table(width, steps, data):
    ring = data.draw(st.text("01", min_size=width, max_size=width))
    task = tasks.load("rule110", width=width, steps=steps)
    assert task.rollout(ring) == naive(ring, steps)


def test_rollout_keeps_the_form_it_was_given():
    task = tasks.load("rule110", width=24)
    ring = [int(cell) for cell in START]
    ended = [int(cell) for cell in GOLDEN[4]]
    assert task.rollout(ring, 4) == ended
    stacked = np.array([ring, ring[::-1]], dtype=np.int32)
    result = task.rollout(stacked, 4)
    assert result.dtype == np.int32
    assert result[0].tolist() == ended
    assert result[1].tolist() == task.rollout(ring[::-1], 4)


def test_a_zero_boundary_is_another_task():
    task = tasks.load("rule110", width=24, states=4, steps=8)
    rings = [ring for ex in task.examples("test", 0, 200) for ring in ex["meta"]["context"]]
    answers = [label for ex in task.examples("test", 0, 200) for label in ex["meta"]["answers"]]
    assert answers == [int(naive(ring, 8)[0]) for ring in rings]
    zero = [int(naive(ring, 8, boundary="zero")[0]) for ring in rings]
    assert answers != zero
    # Why it is rejected: an edge that has turned on stays on, so that one guess is nearly right.
    assert np.mean(zero) > 0.98
    assert 0.45 < np.mean(answers) < 0.63


def test_an_example_is_cells_separator_labels():
    task = tasks.load("rule110", width=5, states=3, steps=2)
    assert (task.length, task.window, task.vocab_size) == (19, 5, 3)
    assert tasks.load(task.name, **task.params).params == {"width": 5, "states": 3, "steps": 2}
    for example in task.examples("train", 3, 50):
        rings = example["meta"]["context"]
        answers = [int(naive(ring, 2)[0]) for ring in rings]
        assert example["input_ids"] == [int(c) for ring in rings for c in ring] + [2] + answers
        assert example["labels"] == [-100] * 16 + answers
        assert example["meta"]["answers"] == answers
        assert "after 2 steps" in task.describe(example)


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize(
    "params",
    [
        {"width": 3, "states": 1, "steps": 1},
        {"width": 12, "states": 2, "steps": 4},
        {"width": 24, "states": 4, "steps": 32},
        {"width": 70, "states": 1, "steps": 3},
    ],
    ids=lambda params: "x".join(map(str, params.values())),
)
def test_a_batch_is_the_same_examples(split, params):
    task = tasks.load("rule110", **params)
    batch = task.batch(split, 11, 300)
    examples = list(task.examples(split, 11, 300))
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert batch["input_ids"].tolist() == [example["input_ids"] for example in examples]
    assert batch["labels"].tolist() == [example["labels"] for example in examples]
    # The stream does not depend on how much of it is asked for.
    endless = itertools.islice(task.examples(split, 11), 300)
    assert [example["input_ids"] for example in endless] == batch["input_ids"].tolist()
    assert task.batch(split, 11, 7)["input_ids"].equal(batch["input_ids"][:7])
    if task.length > 5:
        assert not task.batch(split, 12, 300)["input_ids"].equal(batch["input_ids"])


def test_the_stream_never_changes():
    """A seed in an old result must mean the same examples for ever."""
    task = tasks.load("rule110", width=12, states=2, steps=4)
    seen = ["".join(ex["meta"]["context"]) for ex in task.examples("test", 0, 3)]
    assert seen == [
        "000000101111110101111100",
        "010010100010100001111100",
        "000110101011101111010000",
    ]
    seen = ["".join(ex["meta"]["context"]) for ex in task.examples("train", 5, 2)]
    assert seen == ["010010100001111110100001", "000101110000001100100101"]


@pytest.mark.parametrize("width, states", [(3, 1), (4, 2), (4, 4), (17, 1)])
def test_splits_never_meet_and_miss_nothing(width, states):
    """Few enough contexts that draws see nearly all of them, each in one split only."""
    task = tasks.load("rule110", width=width, states=states, steps=2)
    contexts = 1 << (width * states)
    context = slice(0, width * states)
    split_contexts = {}
    for split in tasks.SPLITS:
        rows = torch.cat([task.batch(split, seed, 3 * contexts)["input_ids"] for seed in (0, 1)])
        weights = 2 ** torch.arange(width * states)
        split_contexts[split] = set((rows[:, context] * weights).sum(1).tolist())
    train, test = split_contexts["train"], split_contexts["test"]
    assert not train & test
    assert train and test
    assert len(train | test) > 0.99 * contexts
    assert len(test) == pytest.approx(max(1, contexts / 16), rel=0.05)


def test_a_context_keeps_its_split_whatever_the_steps():
    short, long = (tasks.load("rule110", width=6, states=2, steps=steps) for steps in (1, 30))
    assert short.batch("test", 0, 500)["input_ids"][:, :12].equal(
        long.batch("test", 0, 500)["input_ids"][:, :12]
    )


def test_floor_of_the_long_task():
    task = tasks.load("rule110", width=24, states=4, steps=32)
    assert rule110.count_ones(24, 32) == (9423121, 16777216)
    assert task.floor() == {32: (9423121 / 16777216) ** 4}
    assert task.floor()[32] == pytest.approx(0.0995, abs=5e-5)
    assert task.majority() == ((9423121 / 16777216) ** 4, 9423121 / 16777216, (1,))


@pytest.mark.parametrize(
    "steps, share", [(1, 0.6250), (2, 0.5313), (4, 0.5352), (8, 0.5406), (12, 0.5435), (16, 0.5559)]
)
def test_floor_at_other_steps(steps, share):
    task = tasks.load("rule110", width=24, states=4, steps=steps)
    assert task.majority().per_label == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize("width", [3, 4, 7, 10])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 9])
def test_floor_equals_a_count_by_the_table(width, steps):
    rings = ["".join(ring) for ring in itertools.product("01", repeat=width)]
    ones = Fraction(sum(naive(ring, steps)[0] == "1" for ring in rings), len(rings))
    task = tasks.load("rule110", width=width, states=2, steps=steps)
    assert Fraction(*rule110.count_ones(min(width, max(3, 2 * steps + 1)), steps)) == ones
    assert task.floor() == {steps: float(max(ones, 1 - ones)) ** 2}
    assert task.majority().guess == (ones >= Fraction(1, 2),)


def test_guessing_the_majority_scores_the_floor():
    task = tasks.load("rule110", width=24, states=4, steps=16)
    batch = task.batch("test", 0, 20_000)
    majority = task.majority()
    score = task.score(torch.full_like(batch["labels"], *majority.guess), batch)
    assert majority.exact == task.floor()[16]
    assert score["exact"] == pytest.approx(majority.exact, abs=0.01)
    assert score["per_label"] == pytest.approx(majority.per_label, abs=0.01)


def test_a_ring_too_wide_to_enumerate_is_sampled(monkeypatch):
    monkeypatch.setattr(rule110, "ENUMERATED_CELLS", 16)
    monkeypatch.setattr(rule110, "SAMPLED_STATES", 1 << 20)
    rule110.count_ones.cache_clear()
    ones, of = rule110.count_ones(24, 32)
    rule110.count_ones.cache_clear()
    assert of == 1 << 20
    error = (ones / of * (1 - ones / of) / of) ** 0.5
    assert ones / of != 9423121 / 16777216
    assert ones / of == pytest.approx(9423121 / 16777216, abs=5 * error)


def test_score_counts_whole_examples_and_labels():
    task = tasks.load("rule110", width=4, states=2, steps=1)
    examples = list(task.examples("test", 0, 4))
    predictions = torch.tensor([example["labels"] for example in examples])
    predictions[:, :9] = 7  # unsupervised positions may hold anything
    everything = {"exact": 1.0, "per_question": 1.0, "per_label": 1.0}
    by_steps = {"by_difficulty": {1: 1.0}, "questions": {1: 4}}
    assert task.score(predictions, examples) == {**everything, **by_steps}
    predictions[0, -1] = 1 - predictions[0, -1]
    predictions[1, -2:] = 1 - predictions[1, -2:]
    half = {"exact": 0.5, "per_question": 0.5, "per_label": 5 / 8}
    by_steps = {"by_difficulty": {1: 0.5}, "questions": {1: 4}}
    assert task.score(predictions, examples) == {**half, **by_steps}
    assert task.score(predictions, task.batch("test", 0, 4)) == half


def test_several_numbers_of_steps_are_told_apart_by_the_separator():
    task = tasks.load("rule110", width=5, states=2, steps=[3, 0, 1])
    assert task.vocab_size == 5
    assert task.params["steps"] == [0, 1, 3]
    examples = list(task.examples("test", 0, 300))
    seen = dict.fromkeys((0, 1, 3), 0)
    for example in examples:
        read = task.parse(example["input_ids"])
        steps = {2: 0, 3: 1, 4: 3}[example["input_ids"][10]]
        assert read["steps"] == steps == example["meta"]["difficulty"]
        assert read["rings"] == example["meta"]["context"]
        for ring, answer, token in zip(
            read["rings"], read["answers"], example["labels"][-2:], strict=True
        ):
            assert answer == token == int(naive(ring, steps)[0])
        seen[steps] += 1
    assert min(seen.values()) > 70
    batch = task.batch("test", 0, 300)
    assert batch["input_ids"].tolist() == [e["input_ids"] for e in examples]
    assert batch["labels"].tolist() == [e["labels"] for e in examples]
    # The same rings as with one number of steps: what is asked changes nothing of the past.
    alone = tasks.load("rule110", width=5, states=2, steps=3).batch("test", 0, 300)["input_ids"]
    assert (batch["input_ids"][:, :10] == alone[:, :10]).all()


def test_floor_of_several_numbers_of_steps():
    task = tasks.load("rule110", width=5, states=2, steps=[0, 2])
    rings = ["".join(bits) for bits in itertools.product("01", repeat=5)]
    ones = sum(naive(ring, 2)[0] == "1" for ring in rings) / 32
    assert task.floor() == {0: 0.25, 2: max(ones, 1 - ones) ** 2}
    assert task.majority().exact == (0.25 + max(ones, 1 - ones) ** 2) / 2
    assert task.majority().per_label == (0.5 + max(ones, 1 - ones)) / 2
    assert task.chance() == 0.25


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tasks.load("rule30"), r"name must .*'rule110', .*got 'rule30'"),
        (lambda: tasks.load("rule110", depth=3), r"width, states, steps, got depth=3"),
        (lambda: tasks.load("rule110", width=2), r"width must .*at least 3 .*100000, got 2"),
        (lambda: tasks.load("rule110", width=8.0), r"width must be an integer.*got 8\.0"),
        (lambda: tasks.load("rule110", states=0), r"states must .*at least 1 .*got 0"),
        (lambda: tasks.load("rule110", steps=-1), r"steps must .*at least 0 .*got -1"),
        (lambda: tasks.load("rule110", steps=True), r"steps must be an integer.*got True"),
        (lambda: tasks.load("rule110", steps=[2, 2]), r"steps must .*different.*got \[2, 2\]"),
        (lambda: tasks.load("rule110", steps=[]), r"steps must .*different.*got \[\]"),
        (lambda: TASK.parse([0, 1, 2]), r"input_ids must .*separator.*got \[0, 1, 2\]"),
        (lambda: TASK.examples("dev", 0, 1), r"split must be one of 'train', 'test', got 'dev'"),
        (lambda: TASK.examples("test", -1, 1), r"seed must .*at least 0, got -1"),
        (lambda: TASK.batch("test", 0, 0), r"count must .*at least 1, got 0"),
        (lambda: TASK.rollout("0110", 1), r"width=5"),
        (lambda: TASK.rollout("01x01", 1), r"bits must .*0 and 1, got '01x01'"),
        (lambda: TASK.rollout([0, 1, 2, 0, 1], 1), r"0 and 1"),
        (lambda: TASK.rollout("01101", -1), r"steps must .*got -1"),
        (lambda: TASK.score(torch.zeros(2, 5), TASK.batch("test", 0, 2)), r"shape.*got \(2, 5\)"),
        (lambda: TASK.score(torch.zeros(0), []), r"labels must have shape .count, T., got \(0,\)"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TASK = tasks.load("rule110", width=5, states=2, steps=3)
