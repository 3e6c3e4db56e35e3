"""The stream of facts: every telling by hand, no question told, what holds and what held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybrid_sleep.eval.continual import facts
from hybrid_sleep.eval.continual.facts import FORMS, FactStream, Telling
from hybrid_sleep.eval.tasks.sampling import Stream

SMALL = {
    "sessions": 2, "subjects": 2, "relations": 2, "objects": 4, "updates": 1,
    "contradictions": 1, "controls": 1,
}  # fmt: skip
# What is drawn, and out of how many: four objects, which fact of s1 is contradicted and by what;
# four objects, which of four is contradicted and by what, which of s1 is updated and to what.
DRAWS = [
    (4, 3), (4, 0), (4, 1), (4, 2), (2, 1), (3, 1),
    (4, 0), (4, 1), (4, 2), (4, 3), (4, 0), (3, 2), (2, 0), (3, 0),
]  # fmt: skip
TOLD = [
    [Telling(0, 0, 3), Telling(0, 1, 0), Telling(1, 0, 1), Telling(1, 1, 2, first=0)],
    [
        Telling(2, 0, 0, first=3), Telling(2, 1, 1), Telling(3, 0, 2), Telling(3, 1, 3),
        Telling(1, 0, 2, former=1),
    ],
]  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    left = list(DRAWS)

    class Scripted(Stream):
        def below(self, n):
            expected, drawn = left.pop(0)
            assert n == expected
            return drawn

    with monkeypatch.context() as patch:
        patch.setattr(facts, "Stream", Scripted)
        stream = FactStream(**SMALL)
    assert not left
    return stream


def test_what_sessions_tell_and_ask_by_hand(small):
    assert small.told == TOLD
    # The fact of s1 and r0 is asked where it was told last.
    assert small.questions(0) == [TOLD[0][0], TOLD[0][1], TOLD[0][3]]
    assert small.questions(1) == TOLD[1]
    # r0: o3 alone; r1: o0 or o2. Then r0: o2 twice of o0, o2, o2; r1: o1 or o3.
    assert [small.floor(0), small.floor(1)] == [2 / 3, 3 / 5]
    assert small.tasks == ["session 1", "session 2"]


def test_rows_by_hand(small):
    # 0 to 5 are <s> and the words, 6 to 9 subjects, 10 and 11 relations, then objects of each.
    assert (small.vocab_size, small.length, small.begin, small.pad) == (20, 6, 0, None)
    rows = small.rows([TOLD[0][3]] * 5, FORMS)
    assert [small.words(row) for row in rows.tolist()] == [
        "<s> s1 's r1 is o2", "<s> r1 of s1 is o2", "<s> s1 has as r1 o2", "<s> as r1 s1 has o2",
        "<s> of s1 r1 is o2",
    ]  # fmt: skip
    assert rows[0].tolist() == [0, 7, 2, 11, 1, 18]
    # The fourth of its session's facts keeps the fourth form for the question, the sixth the first.
    assert small.asked(TOLD[0][3]) == FORMS[3] and small.asked(TOLD[1][1]) == FORMS[0]
    # An update keeps the form of the fact.
    assert small.asked(TOLD[1][4]) == small.asked(TOLD[0][2]) == FORMS[2]


def drawn(stream, task, count=400, **how):
    return {tuple(row) for row in stream.batch(task, count, Stream(5), **how).tolist()}


def told(stream, facts):
    """All rows that tell `facts`, in every form but the one that is asked."""
    return {
        tuple(stream.rows([x], [form])[0].tolist())
        for x in facts for form in FORMS if form != stream.asked(x)
    }  # fmt: skip


def test_the_later_of_two_objects_holds_from_the_middle_on(small):
    *same, last = TOLD[0]
    first = Telling(1, 1, 0)
    assert drawn(small, 0) == drawn(small, 0, progress=0.5) == told(small, [*same, last])
    assert drawn(small, 0, progress=0.49) == told(small, [*same, first])
    assert drawn(small, 0, progress=None) == told(small, [*same, first, last])


def test_what_was_updated_is_left_out_where_rows_are_to_be_true(small):
    assert drawn(small, 0, after=1) == told(small, TOLD[0])
    assert drawn(small, 0, after=2) == told(small, [x for x in TOLD[0] if x.of != (1, 0)])
    assert drawn(small, 1, after=2) == told(small, TOLD[1])


@pytest.mark.parametrize("seed", range(4))
def test_no_row_for_training_begins_as_a_question(seed):
    stream = FactStream(seed=seed)
    rows = {
        tuple(row[:-1]) for task in range(3) for how in (0.0, 1.0, None)
        for row in stream.batch(task, 2000, Stream(seed), progress=how).tolist()
    }  # fmt: skip
    asked = [
        tuple(stream.rows([x], [stream.asked(x)])[0, :-1].tolist())
        for task in range(3) for x in stream.questions(task)
    ]  # fmt: skip
    assert len(set(asked)) == len(asked) == 3 * 24
    assert not rows & set(asked)
    # All but a few of 4 forms of 24, 28 and 28 facts came up, of which 4 are told twice.
    assert len(rows) > 0.95 * 4 * (24 + 24 + 24)
    # Every form is told of others.
    shapes = {tuple(i if i < 6 else -1 for i in row) for row in asked}
    assert shapes == {tuple(i if i < 6 else -1 for i in row) for row in rows}


@pytest.mark.parametrize("seed", range(4))
def test_only_what_is_no_control_changes(seed):
    stream = FactStream(seed=seed, sessions=4, updates=10)
    holds = {}
    for session, told in enumerate(stream.told):
        new = [x for x in told if x.former is None]
        assert [x.subject for x in new] == [12 * session + i // 2 for i in range(24)]
        assert len({x.of for x in told}) == len(told)
        assert sum(x.first is not None for x in told) == 4
        updates = [x for x in told if x.former is not None]
        assert len(updates) == (10 if session else 0)
        for x in updates:
            assert x.former == holds[x.of] != x.object and x.subject >= 3 and x.first is None
        for x in told:
            assert 0 <= x.object < 16 and x.first != x.object
            assert x.first is None or x.subject >= 3
            holds[x.of] = x.object
    # Every fact is asked once, as it holds in the end.
    asked = [x for task in range(4) for x in stream.questions(task)]
    assert len(asked) == 96 and {x.of: x.object for x in asked} == holds
    assert FactStream(**stream.settings) == stream
    assert FactStream(**stream.settings).told == stream.told
    assert FactStream(**{**stream.settings, "seed": seed + 9}).told != stream.told


class Knows(nn.Module):
    """Answers for each of `facts` its object, in all forms that `forms` gives for it."""

    def __init__(self, stream, facts, forms=lambda fact: FORMS):
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(1))
        self.vocab, self.read = stream.vocab_size, []
        self.answers = {
            tuple(row[:-1]): row[-1]
            for x in facts for row in stream.rows([x] * len(forms(x)), forms(x)).tolist()
        }  # fmt: skip

    def forward(self, input_ids, use_cache=False):
        self.read += input_ids.tolist()
        logits = torch.zeros(*input_ids.shape, self.vocab)
        for row, ids in enumerate(input_ids[:, -5:].tolist()):
            logits[row, -1, self.answers.get(tuple(ids), 1)] = 1
        return type("Output", (), {"logits": logits})


def test_accuracy_is_of_what_holds_in_the_end(small):
    assert small.accuracy(Knows(small, TOLD[0]), 0) == 1
    assert small.accuracy(Knows(small, TOLD[0]), 1) == 0
    assert small.accuracy(Knows(small, TOLD[1]), 1) == 1
    assert small.accuracy(Knows(small, TOLD[0][:1]), 0) == 1 / 3
    # What was contradicted counts with its later object.
    assert small.accuracy(Knows(small, [Telling(1, 1, 0)]), 0) == 0
    assert small.accuracy(Knows(small, [Telling(1, 1, 2)]), 0) == 1 / 3
    # Asked as told is another question.
    assert small.accuracy(Knows(small, TOLD[0], small.told_in), 0) == 0
    model = Knows(small, TOLD[1])
    assert small.accuracy(model, 1, context=[0, 5]) == 1
    assert {tuple(ids[:3]) for ids in model.read} == {(0, 5, 0)}


def test_what_became_of_old_answers_is_measured_apart(small):
    def apart(facts, learned, forms=lambda fact: FORMS):
        found = small.apart(Knows(small, facts, forms), learned, lambda task: [task])
        return list(found.values())

    names = list(small.apart(Knows(small, []), 0, lambda task: []))
    assert names == [
        "updates: new", "updates: former", "contradictions: later", "contradictions: earlier",
        "controls", "asked as told",
    ]  # fmt: skip
    assert apart(TOLD[0], 0) == [None] * 6
    assert apart(TOLD[0], 1) == [None, None, 1, 0, 1, 1]
    # After both: 8 facts hold, 3 of them since the first session; two were contradicted.
    assert apart(TOLD[0], 2) == [0, 1, 0.5, 0, 1, 3 / 8]
    assert apart(TOLD[1], 2) == [1, 0, 0.5, 0, 0, 5 / 8]
    assert apart([Telling(2, 0, 3), Telling(1, 1, 0), Telling(0, 1, 0)], 2) == [
        0, 0, 0, 1, 0.5, 1 / 8,
    ]  # fmt: skip
    assert apart(TOLD[0] + TOLD[1], 2, small.told_in) == [0, 0, 0, 0, 0, 1]
    # What stands in front is that of the session that told a fact last.
    model = Knows(small, [])
    small.apart(model, 2, lambda task: [task])
    seen = {(ids[0], tuple(i - 6 for i in ids[2:] if 6 <= i < 10)) for ids in model.read}
    assert seen == {(0, (0,)), (0, (1,)), (1, (1,)), (1, (2,)), (1, (3,))}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sessions": 0}, "sessions must be"),
        ({"objects": 1}, "objects must be an integer of at least 2"),
        ({"controls": 13}, "controls must be .* at most 12, got 13"),
        ({"updates": 19}, "updates must be .* at most 18, got 19"),
        ({"contradictions": 19}, "contradictions must be .* at most 18, got 19"),
        ({"seed": -1}, "seed must be"),
        ({"controls": 0, "updates": 24}, "updates must leave every session a fact .* session 1"),
    ],
)
def test_streams_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FactStream(**given)
