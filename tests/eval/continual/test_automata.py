"""The stream of automaton rules: rows by hand, every state in one split, accuracy as greedy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from hybrid_sleep.eval.continual.automata import BEGIN, SEPARATOR, TAG, RuleStream, step
from hybrid_sleep.eval.continual.bench import new_model
from hybrid_sleep.eval.tasks.sampling import Stream

# The new cell for the neighbourhoods 111, 110, ..., 000, as in Wolfram's pictures.
PICTURES = {
    110: (0, 1, 1, 0, 1, 1, 1, 0),
    30: (0, 0, 0, 1, 1, 1, 1, 0),
    90: (0, 1, 0, 1, 1, 0, 1, 0),
}


@pytest.mark.parametrize("rule", PICTURES)
def test_a_step_is_what_the_picture_of_the_rule_says(rule):
    after = dict(zip(itertools.product((1, 0), repeat=3), PICTURES[rule], strict=True))
    rings = np.array(list(itertools.product((0, 1), repeat=5)))
    for ring, new in zip(rings, step(rings, rule), strict=True):
        assert [after[ring[i - 1], ring[i], ring[(i + 1) % 5]] for i in range(5)] == list(new)


def test_rows_by_hand():
    stream = RuleStream((90, 110), width=4)
    states = np.array([[1, 0, 0, 0]])
    # Rule 90 is the exclusive or of both neighbours.
    assert stream.rows(0, states).tolist() == [
        [BEGIN, TAG, 1, 0, 0, 0, SEPARATOR, 0, 1, 0, 1]
    ]
    assert stream.rows(1, states)[0, 1] == TAG + 1
    assert stream.vocab_size == TAG + 2 and stream.length == 11
    untagged = RuleStream((90, 110), width=4, tags=False)
    assert untagged.rows(1, states)[0, :2].tolist() == [BEGIN, SEPARATOR]


def test_every_state_is_in_one_split_whatever_the_rule():
    stream = RuleStream(width=9)
    both = [stream.states(test) for test in (False, True)]
    seen = {tuple(row) for part in both for row in part.tolist()}
    assert len(seen) == 512 == len(both[0]) + len(both[1])
    assert 16 <= len(both[1]) <= 64
    tests = {tuple(row) for row in both[1].tolist()}
    drawn = stream.batch(1, 400, Stream(0))[:, 2:11]
    assert not {tuple(row) for row in drawn.tolist()} & tests


class Scripted(nn.Module):
    """Says that the cells one step later are those of `rule`, but for `wrong` of the rows."""

    def __init__(self, stream, rule, wrong=()):
        super().__init__()
        self.stream, self.rule, self.wrong = stream, rule, wrong
        self.dummy = nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {})()

    def forward(self, input_ids, use_cache=False):
        w = self.stream.width
        after = torch.from_numpy(step(input_ids[:, -2 * w - 1 : -w - 1].numpy(), self.rule))
        for row in self.wrong:
            after[row, w // 2] ^= 1
        logits = torch.zeros(*input_ids.shape, self.stream.vocab_size)
        logits[:, -w - 1 : -1] = nn.functional.one_hot(after, self.stream.vocab_size).float()
        return type("Output", (), {"logits": logits})


def test_a_row_counts_if_all_of_its_cells_are_right():
    stream = RuleStream((110, 30), width=8)
    count = len(stream.states(test=True))
    assert stream.accuracy(Scripted(stream, 110), 0) == 1
    assert stream.accuracy(Scripted(stream, 110, wrong=(0, 3)), 0) == 1 - 2 / count
    assert stream.accuracy(Scripted(stream, 30), 0) < 0.1
    assert stream.accuracy(Scripted(stream, 30), 1, context=[BEGIN, 0, 1]) == 1


def test_the_floor_is_the_best_that_one_answer_for_all_gets():
    stream = RuleStream((0, 110), width=6)
    assert stream.floor(0) == 1
    answers = [tuple(row) for row in step(stream.states(test=True), 110).tolist()]
    best = max(answers.count(one) for one in set(answers))
    assert stream.floor(1) == best / len(answers)


def test_accuracy_is_what_greedy_decoding_answers():
    stream = RuleStream((110,), width=5)
    model = new_model(stream, seed=3)
    # Random logits that prefer cells, so that some rows come out right.
    with torch.no_grad():
        model.lm_head.weight[2:] -= 10 * model.lm_head.weight[:1].abs().mean()
    rows = stream.rows(0, stream.states(test=True))
    made = model.generate(rows[:, : stream.answer - 1], max_new_tokens=5, do_sample=False)
    right = (made[:, -5:] == rows[:, -5:]).all(-1).double().mean()
    assert stream.accuracy(model, 0) == float(right)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rules": (256,)}, "rules must be .* got 256"),
        ({"rules": (30, 30)}, r"rules must be one or more, each once, got \[30, 30\]"),
        ({"rules": ()}, "rules must be one or more"),
        ({"width": 2}, "width must be"),
    ],
)
def test_streams_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RuleStream(**given)
