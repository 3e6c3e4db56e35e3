"""Lessons: the divergence against torch's own, and teachers that read a context or a cache."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from editable import VOCAB, tiny_hybrid, tiny_llama
from torch import nn

from hybrid_sleep import SleepCache
from hybrid_sleep.parametric.lessons import Lesson, lesson_loss, taught
from hybrid_sleep.parametric.mix import Row

MODELS = {"llama": tiny_llama, "hybrid": tiny_hybrid}


def rows(count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = [5, 9, 7, 6][:count]
    return [
        Lesson("recent", Row(tuple(torch.randint(3, VOCAB, (n,), generator=g).tolist()), 1 + i))
        for i, n in enumerate(lengths)
    ]


def weighing(lesson, weight):
    return replace(lesson, row=replace(lesson.row, weight=weight))


def after(context):
    return [(*context, *x.ids) for x in rows()]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def somewhere_else(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return other


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_loss_is_the_divergence_of_each_row_alone_weighted_by_tokens(make):
    model, context = make(), [5, 6, 7, 8]
    teacher = somewhere_else(model)
    told = taught(teacher, rows(), reads=after(context))
    lessons = [weighing(x, w) for x, w in zip(told, (1.0, 1.5, 0.25), strict=True)]
    lessons.append(weighing(rows(4)[3], 2.0))
    total = tokens = 0.0
    for lesson in lessons:
        ids = list(lesson.ids)
        start = lesson.row.start
        student = logits_of(model, ids)[start - 1 : -1].log_softmax(-1)
        if lesson.teacher is None:
            part = -sum(float(student[i, t]) for i, t in enumerate(ids[start:]))
        else:
            behind = logits_of(teacher, context + ids)[len(context) + start - 1 : -1]
            want = nn.functional.kl_div(student, behind.softmax(-1), reduction="sum")
            assert torch.allclose(lesson.teacher, behind.log_softmax(-1), atol=1e-12, rtol=0)
            part = want
        total += lesson.row.weight * float(part)
        tokens += lesson.row.weight * lesson.tokens
    assert lesson_loss(model, lessons).item() == pytest.approx(total / tokens, abs=1e-10)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_what_teaches_itself_learns_nothing(make):
    model = make()
    loss = lesson_loss(model, taught(model, rows()))
    assert abs(loss.item()) < 1e-12
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-10


def test_a_weight_of_one_and_a_half_is_a_row_three_times_beside_one_twice():
    model, (a, b) = tiny_llama(), rows(2)
    weighted = lesson_loss(model, [weighing(a, 1.5), b])
    assert weighted.item() == pytest.approx(lesson_loss(model, [a, a, a, b, b]).item(), abs=1e-12)
    assert weighted.item() != pytest.approx(lesson_loss(model, [a, b]).item(), abs=1e-4)


def test_a_cache_teaches_what_the_text_in_front_does():
    model, context = tiny_hybrid(), [5, 6, 7, 8, 9, 4]
    cache = SleepCache(model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([context]), cache=cache)
    before = [x.clone() for x in cache.tensors()]
    reads = after(context)
    ways = ({"cache": cache}, {"reads": reads}, {}, {"reads": reads, "at_once": 1})
    for by_cache, by_text, alone, one_by_one in zip(
        *([x.teacher for x in taught(model, rows(), **way)] for way in ways), strict=True
    ):
        assert torch.allclose(by_cache, by_text, atol=1e-10, rtol=0)
        assert torch.allclose(by_text, one_by_one, atol=1e-10, rtol=0)
        assert not torch.allclose(by_cache, alone, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))
    # Behind a sleep the text is in the fast weights alone.
    model.sleep(cache, passes=2)
    (slept,), (alone,) = taught(model, rows(1), cache=cache), taught(model, rows(1))
    assert not torch.allclose(slept.teacher, alone.teacher, atol=1e-3)


def test_a_token_that_the_teacher_excludes_costs_nothing():
    model = tiny_llama()
    (lesson,) = rows(1)
    told = torch.full((lesson.tokens, VOCAB), float("-inf"), dtype=torch.float64)
    for i, token in enumerate(lesson.ids[lesson.row.start :]):
        told[i, token] = 0.0
    by_teacher = lesson_loss(model, [replace(lesson, teacher=told)])
    assert by_teacher.item() == pytest.approx(lesson_loss(model, [lesson]).item(), abs=1e-12)
    by_teacher.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_what_cannot_be_taught_is_refused():
    row = Row((3, 4, 5, 6, 7))
    with pytest.raises(ValueError, match="part must be one of 'recent', .*, got 'nap'"):
        Lesson("nap", row)
    with pytest.raises(ValueError, match="teacher must be of the 4 tokens that are taught, got 3"):
        Lesson("recent", row, torch.zeros(3, VOCAB))


def test_what_ends_otherwise_and_no_lesson_are_refused():
    model, (lesson,) = tiny_llama(), rows(1)
    for read in ((4, *lesson.ids, 5), lesson.ids[1:]):
        with pytest.raises(ValueError, match="reads must end with the 4 tokens that are taught"):
            taught(model, [lesson], reads=[read])
    with pytest.raises(ValueError, match="lessons must be one or more"):
        lesson_loss(model, [])
