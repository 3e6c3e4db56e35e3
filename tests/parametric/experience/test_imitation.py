"""The reward for imitation: golden values, and its gradient against full enumeration."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from editable import tiny_hybrid, tiny_llama, word_tokenizer
from memories import OPEN, bits, same
from nights import CONTEXT, STUDY, expected, lessons, says
from torch import nn

from hybrid_sleep.parametric import Memory, MemoryOptions
from hybrid_sleep.parametric.experience.imitation import (
    Imitation,
    absolute_reward,
    advantages,
    levenshtein,
    prefixed,
    reward,
)
from hybrid_sleep.parametric.experience.on_policy import OnPolicy
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.lessons import Lesson, lesson_loss
from hybrid_sleep.parametric.mix import Row

TOKENIZER = word_tokenizer()


def ids(word):
    return list(map(ord, word))


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("abc", "abc", 0),
        ("bcd", "abcd", 1), ("ab", "ba", 2), ("flaw", "lawn", 2), ("intention", "execution", 5),
    ],
)  # fmt: skip
def test_the_distance_is_that_of_the_textbook(one, other, distance):
    assert levenshtein(ids(one), ids(other)) == distance == levenshtein(ids(other), ids(one))


def test_the_absolute_reward_is_a_share_of_the_longer_text_within_z0():
    for z0, want in ((2, 0.0), (3, 1 - 3 / 7), (9, 1 - 3 / 7)):
        assert absolute_reward(ids("kitten"), ids("sitting"), z0) == want
    assert absolute_reward([], [1, 2], 2) == 0.0 and absolute_reward([], [], 0) == 1.0
    assert absolute_reward([4, 5], [4, 5], 0) == 1.0
    # Put in at the front, all places differ and one token does.
    assert absolute_reward([1, 2, 3, 4], [2, 3, 4], 1) == 0.75


def test_rewards_are_weighed_and_the_semantic_one_gets_both_texts():
    asked = []

    def semantic(*texts):
        asked.append(texts)
        return 1.0

    written, row = (TOKENIZER(text).input_ids for text in ("Ada lives", "Bo lives"))
    half = Imitation(gamma=0.25, z0=5)
    assert reward(half, TOKENIZER, written, row, semantic) == 0.25 + 0.75 * (1 - 1 / 3)
    assert asked == [(TOKENIZER.decode(written), TOKENIZER.decode(row))]
    assert reward(Imitation(z0=5), TOKENIZER, written, row) == 1 - 1 / 3
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="semantic reward must be"):
            reward(half, TOKENIZER, written, row, lambda *_, wrong=wrong: wrong)
    assert advantages([1.0, 0.0, 0.5]) == [0.75, -0.75, 0.0] and advantages([0.25]) == [0.25]
    for wrong, message in (
        ({"alpha": 1.1}, "alpha must be at most 1"),
        ({"gamma": -1}, "gamma must be"),
        ({"z0": -1}, "z0 must be an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Imitation(**wrong)


def test_prefixes_are_uniform_over_what_is_taught():
    lesson = Lesson("dream", Row((4, 5, 6, 7, 8), 2), front=(9, 9))
    draws, seen = random.Random(0), []
    for _ in range(300):
        found = prefixed(lesson, draws)
        begun = len(found.ids) - found.tokens
        assert found.ids == lesson.ids and found.front == (9, 9, *lesson.ids[2:begun])
        seen.append(begun)
    counts = [seen.count(i) for i in range(6)]
    assert counts[:2] == [0, 0] and counts[5] == 0 and min(counts[2:5]) > 75
    assert prefixed(replace(lesson, front=None), draws).front is None


class Table(nn.Module):
    """Predicts by position alone."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(4, 5, generator=g, dtype=torch.float64))

    def forward(self, input_ids, attention_mask, use_cache):
        count, length = input_ids.shape
        return SimpleNamespace(logits=self.logits[:length].expand(count, length, 5))


@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_the_gradient_is_that_of_the_expected_reward_and_of_the_divergence(baseline):
    model, wanted, alpha = Table(), (3, 1, 2), 0.3
    teacher = Table().logits.detach()[1:].roll(1).log_softmax(-1)[:3]
    probabilities = model.logits[:3].softmax(-1)
    objective = torch.zeros((), dtype=torch.float64)
    estimate = torch.zeros_like(model.logits)
    for y in itertools.product(range(5), repeat=3):
        chance = probabilities[[0, 1, 2], list(y)].prod()
        r = absolute_reward(y, wanted, 2)
        objective = objective + chance * r
        made = Lesson("dream", Row((0, *y)), teacher, divergence=alpha,
                      policy=(1 - alpha) * (r - baseline))  # fmt: skip
        (gradient,) = torch.autograd.grad(lesson_loss(model, [made]), model.logits)
        estimate += chance.detach() * gradient
    said = model.logits[:3].log_softmax(-1)
    divergence = (teacher.exp() * (teacher - said)).sum(-1).mean()
    loss = alpha * divergence - (1 - alpha) * objective / 3
    (want,) = torch.autograd.grad(loss, model.logits)
    assert torch.allclose(estimate, want, rtol=0, atol=1e-14) and want.abs().max() > 0.01


def test_rows_on_policy_are_completed_rewarded_and_taught():
    llama = tiny_llama()
    model, course = copy.deepcopy(llama), lessons(llama)
    options = replace(STUDY, on_policy=1.0, imitation=Imitation(alpha=0.25, gamma=0.5))
    asked = []

    def semantic(*texts):
        asked.append(texts)
        return 0.5

    writer = OnPolicy(
        model, TOKENIZER, course, options, dict(model.named_parameters()), semantic=semantic
    )
    says(model, 17)
    rows, rewards = writer.step(2)
    pairs = zip(course[6:9], rows, strict=True)
    told = [(old, new) for old, new in pairs if old.teacher is not None]
    assert len(told) == len(rewards) == len(asked) == 2
    for (old, new), found, gain, texts in zip(
        told, rewards, advantages(rewards), asked, strict=True
    ):
        begun, first = len(new.ids) - new.tokens, len(old.ids) - old.tokens
        assert begun >= first and new.ids == (*old.ids[:begun], *[17] * (len(old.ids) - begun))
        taken = old.ids[begun:]
        assert texts == tuple(TOKENIZER.decode(list(x)) for x in (new.ids[begun:], taken))
        assert found == 0.25 + 0.5 * absolute_reward(new.ids[begun:], taken, 32)
        assert (new.divergence, new.policy) == (0.25, 0.75 * gain)
        want = expected(llama, [*CONTEXT, *new.ids], new.tokens)
        assert torch.allclose(new.teacher, want, rtol=0, atol=1e-12)
    again, same_rewards = writer.step(2)
    assert [x.ids for x in again] == [x.ids for x in rows] and same_rewards == rewards


def test_a_semantic_reward_is_given_where_it_counts_and_nowhere_else(tmp_path):
    study = StudyOptions(on_policy=0.5, imitation=Imitation(gamma=0.5, z0=3))
    assert StudyOptions.from_dict(study.to_dict()) == study
    with pytest.raises(ValueError, match="on_policy must be above 0 for imitation, got 0"):
        StudyOptions(imitation=Imitation())
    model = tiny_hybrid()
    rows = {"corpus": [[1, 4, 5, 6, 7]], "ordinary": [[1, 10, 11, 12]]}
    for i, (wanted, given) in enumerate(((study, None), (StudyOptions(), lambda *_: 1.0))):
        options = MemoryOptions(thresholds=OPEN, study=wanted)
        before = bits(model)
        with Memory.open(
            tmp_path / f"{i}", model, TOKENIZER, options=options, **rows
        ) as memory, pytest.raises(ValueError, match="semantic must be a function where"):
            memory.sleep(kind="experience", semantic=given)
        assert same(before, bits(model))
