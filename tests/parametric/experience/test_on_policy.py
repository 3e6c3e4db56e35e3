"""Rows that the student writes in training: whose they are, who judges them, and when."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from editable import VOCAB, tiny_hybrid, tiny_llama, word_tokenizer
from memories import bits, same
from nights import (
    CONTEXT,
    STUDY,
    Folder,
    close,
    expected,
    guard_of,
    lessons,
    press_at,
    says,
)
from torch import nn

from hybrid_sleep import SleepCache
from hybrid_sleep.parametric.experience.experts import grown
from hybrid_sleep.parametric.experience.imitation import Imitation
from hybrid_sleep.parametric.experience.on_policy import OnPolicy
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.experience.train import train
from hybrid_sleep.parametric.fisher import covered
from hybrid_sleep.parametric.lessons import Lesson, lesson_loss, taught
from hybrid_sleep.parametric.mix import Row
from hybrid_sleep.training.loop import seed_step

TOKENIZER = word_tokenizer()
END = TOKENIZER.eos_token_id
ALL = replace(STUDY, on_policy=1.0)
SOME = replace(STUDY, on_policy=0.5)


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture
def folder(tmp_path):
    with Folder(tmp_path / "memory") as opened:
        yield opened


def writer_of(model, course, options=ALL, **given):
    return OnPolicy(model, TOKENIZER, course, options, dict(model.named_parameters()), **given)


def test_rows_are_the_students_and_the_teacher_is_the_model_before(llama):
    model, course = copy.deepcopy(llama), lessons(llama)
    writer = writer_of(model, course)
    says(model, 17)
    now = bits(model)
    rows, rewards = writer.step(1)
    assert rewards == []
    assert same(now, bits(model)) and all(p.requires_grad for p in model.parameters())
    assert len(rows) == 3
    for old, new in zip(course[3:6], rows, strict=True):
        if old.teacher is None:
            # Words that count as they are stay.
            assert new is old
            continue
        begun = old.ids[: -old.tokens]
        assert new.ids == (*begun, *[17] * old.tokens) and new.row.weight == old.row.weight
        want = expected(llama, [*CONTEXT, *new.ids], new.tokens)
        assert torch.allclose(new.teacher, want, rtol=0, atol=1e-12)
        # Not what the student itself says.
        assert not torch.allclose(new.teacher, expected(model, new.ids, new.tokens), atol=0.1)
    assert [x.teacher is None for x in rows] == [True, False, True]


def test_a_row_ends_where_its_text_does_and_a_foundation_goes_on(llama):
    model = copy.deepcopy(llama)
    made = [Lesson(part, Row((4, 5, 6, 8, 9), 2)) for part in ("dream", "foundation")]
    writer = writer_of(model, taught(model, made))
    says(model, END)
    dream, foundation = writer.step(0)[0]
    assert dream.ids == (4, 5, END) and len(dream.teacher) == 1
    assert foundation.ids == (4, 5, END, END, END)
    # Without anything in front, the row's own beginning is what the teacher reads.
    want = expected(llama, foundation.ids, 3)
    assert torch.allclose(foundation.teacher, want, rtol=0, atol=1e-12)


def test_experts_are_switched_off_for_the_teacher(llama):
    model, course = copy.deepcopy(llama), lessons(llama)
    with grown(model, list(covered(model)[0]), 2) as experts:
        writer = OnPolicy(model, TOKENIZER, course, ALL, experts.factors)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for factor in experts.factors.values():
                factor.copy_(torch.randn(factor.shape, generator=g))
        kept = {name: p.detach().clone() for name, p in experts.factors.items()}
        rows, _ = writer.step(0)
        assert all(torch.equal(p, kept[name]) for name, p in experts.factors.items())
        for new in (x for x in rows if x.teacher is not None):
            want = expected(llama, [*CONTEXT, *new.ids], new.tokens)
            assert torch.allclose(new.teacher, want, rtol=0, atol=1e-12)


def test_a_cache_serves_the_teacher_though_the_weights_have_moved():
    model = tiny_hybrid()
    cache = SleepCache(model.config)
    with torch.no_grad():
        model(torch.tensor([[1, 5, 9, 6, 14, 20, 8]]), cache=cache)
    model.sleep(cache, passes=2)
    fresh, old = copy.deepcopy(model), cache.copy()
    made = [Lesson("recent", Row((4, 5, 6, 8), 2)), Lesson("recent", Row((9, 3, 3, 3), 1))]
    course = taught(model, made, cache=cache)
    course += taught(model, [Lesson("foundation", Row((1, 4, 7, 7)))])
    writer = writer_of(model, course)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    rows, _ = writer.step(0)
    old.owner = type(cache.owner).of(fresh)
    for new, held in zip(rows, (old, old, None), strict=True):
        want = expected(fresh, new.ids, new.tokens, held)
        assert torch.allclose(new.teacher, want, rtol=0, atol=1e-10)
    # Of the copy for the teacher alone: the student must not go on from it.
    with pytest.raises(ValueError, match="version"), torch.no_grad():
        model(torch.tensor([[4]]), cache=cache)


def test_rows_are_drawn_again_the_same_and_anew_for_each_step_and_seed(llama):
    model = copy.deepcopy(llama)
    made = [Lesson("dream", Row((4, *[3] * 20), 1)) for _ in range(6)]
    writer = writer_of(model, taught(model, made))
    state = torch.get_rng_state()
    first = [x.ids for x in writer.step(0)[0]]
    assert [x.ids for x in writer.step(0)[0]] == first
    assert [x.ids for x in writer.step(1)[0]] != first
    other = writer_of(model, taught(model, made), seed=1)
    assert [x.ids for x in other.step(0)[0]] != first
    assert torch.equal(state, torch.get_rng_state())


def test_a_share_is_of_the_rows_that_a_teacher_speaks_of(llama):
    course = lessons(llama)
    told = {i for i, x in enumerate(course) if x.teacher is not None}
    assert len(told) == 6
    some = writer_of(llama, course, SOME)
    assert len(some.chosen) == 3 and some.chosen < told
    assert some.chosen == writer_of(llama, course, SOME).chosen
    assert len({writer_of(llama, course, SOME, seed=i).chosen for i in range(8)}) > 2
    assert writer_of(llama, course).chosen == told
    none = writer_of(llama, course, STUDY)
    assert not none.chosen and not none.before
    for steps in range(5):
        assert some.count(steps) == len([i for i in some.chosen if i < 3 * steps])
    with pytest.raises(ValueError, match="on_policy must be at most 1, got 1.5"):
        StudyOptions(on_policy=1.5)
    assert max(max(x.ids) for x in writer_of(llama, course).step(0)[0]) < VOCAB


@pytest.mark.parametrize("experts", [None, 2])
def test_training_takes_the_rows_of_each_step_from_the_student_of_that_step(
    llama, folder, experts
):
    imitation = Imitation(alpha=0.5, gamma=0.5) if experts else None
    options, course = replace(SOME, experts=experts, imitation=imitation), lessons(llama)
    names = list(covered(llama)[0])

    def trained(model, unfinished, **given):
        guard = guard_of(model, 0.0)
        return train(
            model, course, options, names, guard, unfinished, tokenizer=TOKENIZER,
            semantic=lambda *_: 0.25, **given,
        )  # fmt: skip

    model = copy.deepcopy(llama)
    done = trained(model, folder.night(options=options, seed=1))
    count = writer_of(llama, course, SOME).count(4)
    assert done.on_policy == count == 3 == done.to_dict()["rows on policy"]
    rewards = done.to_dict()["mean reward"]
    assert rewards >= 0.125 if experts else rewards is None

    again = copy.deepcopy(llama)
    with pytest.raises(KeyboardInterrupt, match="step 2 of 4"):
        trained(again, folder.night(options=options), progress=press_at(2))
    again = copy.deepcopy(llama)
    done = trained(again, folder.night(options=options))
    assert done.resumed == 2 and done.on_policy == count and same(bits(model), bits(again))
    assert done.to_dict()["mean reward"] == rewards
    if experts:
        return

    plain = copy.deepcopy(llama)
    for name, p in plain.named_parameters():
        p.requires_grad_(name in names)
    parameters = {name: p for name, p in plain.named_parameters() if name in names}
    writer = OnPolicy(plain, TOKENIZER, course, options, parameters)
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.95), weight_decay=0.0)
    plain.train()
    with torch.random.fork_rng():
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] = options.rate * (4 - step) / 4
            optimizer.zero_grad()
            rows, _ = writer.step(step)
            seed_step(0, step, 0)
            lesson_loss(plain, rows).backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
    close(bits(plain), bits(model))
