"""The training of a night: against a loop by hand, interrupted and resumed, and ended early."""

from __future__ import annotations

import copy
import os
import random
from dataclasses import replace

import numpy
import pytest
import torch
from editable import tiny_llama
from memories import bits, same
from nights import STUDY, Folder, close, guard_of, lessons, press_at
from torch import nn

from hybrid_sleep.parametric.experience import course as courses
from hybrid_sleep.parametric.experience.course import Course, Steps
from hybrid_sleep.parametric.experience.train import train
from hybrid_sleep.parametric.fisher import covered
from hybrid_sleep.parametric.lessons import lesson_loss
from hybrid_sleep.training.loop import seed_step


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(attention_dropout=0.1)


@pytest.fixture(scope="module")
def course(llama):
    return lessons(llama)


@pytest.fixture
def model(llama):
    return copy.deepcopy(llama)


@pytest.fixture
def folder(tmp_path):
    with Folder(tmp_path / "memory") as opened:
        yield opened


def trained(model, course, unfinished, options=STUDY, guard=None, **given):
    guard = guard or guard_of(model)
    return train(model, course, options, list(covered(model)[0]), guard, unfinished, **given)


def by_hand(model, course, options=STUDY, steps=None):
    """The same in plain torch."""
    names = covered(model)[0]
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    asking = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(asking, betas=(0.9, 0.95), weight_decay=0.0)
    guard = guard_of(model)
    steps = steps or -(-len(course) // options.rows)
    model.train()
    with torch.random.fork_rng(), guard.guarding(optimizer):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = options.rate * (steps - step) / steps
            optimizer.zero_grad()
            seed_step(0, step, 0)
            batch = course[step * options.rows : (step + 1) * options.rows]
            lesson_loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return bits(model)


def test_it_takes_the_steps_of_a_loop_by_hand(llama, model, course, folder):
    seen = []
    done = trained(model, course, folder.night(), progress=lambda *x: seen.append(x))
    assert (done.step, done.planned, done.spent, done.resumed) == (4, 4, None, 0)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    close(by_hand(copy.deepcopy(llama), course), bits(model))
    trainable = covered(llama)[0]
    for name, before in bits(llama).items():
        assert torch.equal(before, dict(model.named_parameters())[name]) != (name in trainable)


def test_nothing_but_the_weights_is_changed(model, course, folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    next(model.parameters()).requires_grad_(False)
    model.train().model.layers[0].eval()
    model.config.use_cache = True
    held = {"vars": set(vars(model)), "modes": [m.training for m in model.modules()]}
    held["asking"] = [p.requires_grad for p in model.parameters()]
    held["states"] = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    held["environment"] = dict(os.environ)
    trained(model, course, folder.night())
    assert set(vars(model)) == held["vars"] and model.config.use_cache
    assert [m.training for m in model.modules()] == held["modes"]
    assert [p.requires_grad for p in model.parameters()] == held["asking"]
    assert all(p.grad is None for p in model.parameters())
    state, python, array = held["states"]
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert array == numpy.random.get_state()[1].tolist()
    assert dict(os.environ) == held["environment"]


def test_an_interrupted_training_goes_on_to_the_same_bits(llama, model, course, folder):
    trained(model, course, folder.night(seed=1))
    whole = copy.deepcopy(llama)

    unfinished = folder.night()
    with pytest.raises(KeyboardInterrupt, match="step 2 of 4 is kept in"):
        trained(whole, course, unfinished, progress=press_at(2))
    assert not same(bits(llama), bits(whole)) and not same(bits(model), bits(whole))
    again = copy.deepcopy(llama)
    unfinished = folder.night()
    assert unfinished.found == "this night"
    done = trained(again, course, unfinished)
    assert (done.step, done.resumed) == (4, 2) and done.seconds > 0
    assert same(bits(model), bits(again))


def test_what_dies_without_a_word_goes_on_from_the_state_kept_last(
    llama, model, course, folder, monkeypatch
):
    trained(model, course, folder.night(seed=1))
    monkeypatch.setattr(courses, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(courses, "KEEP_SHARE", 0.0)

    def die(step, steps):
        if step == 3:
            raise RuntimeError("dead")

    killed = copy.deepcopy(llama)
    with pytest.raises(RuntimeError, match="dead"):
        trained(killed, course, folder.night(), progress=die)
    again = copy.deepcopy(llama)
    done = trained(again, course, folder.night())
    assert done.resumed == 2 and same(bits(model), bits(again))
    # Nobody else's: another seed is another night.
    other = copy.deepcopy(llama)
    assert trained(other, course, folder.night(seed=2)).resumed == 0


def test_a_training_that_was_through_is_not_done_again(llama, model, course, folder):
    with pytest.raises(KeyboardInterrupt, match="step 4 of 4"):
        trained(model, course, folder.night(), progress=press_at(4))
    again = copy.deepcopy(llama)
    done = trained(again, course, folder.night(), progress=lambda *x: pytest.fail("a step"))
    assert (done.step, done.resumed) == (4, 4) and same(bits(model), bits(again))


def test_budgets_end_it_early_and_say_so(llama, model, course, folder, monkeypatch):
    two = replace(STUDY, steps=2)
    done = trained(model, course, folder.night(options=two), two)
    assert (done.step, done.planned, done.spent) == (2, 4, "steps")
    # The rate falls to 0 within the budget.
    close(by_hand(copy.deepcopy(llama), course, steps=2), bits(model))
    many = replace(STUDY, steps=9)
    assert trained(copy.deepcopy(llama), course, folder.night(options=many), many).spent is None

    ticks = iter(range(0, 10000, 5))
    monkeypatch.setattr(courses.time, "perf_counter", lambda: float(next(ticks)))
    brief = replace(STUDY, seconds=12.0)
    done = trained(copy.deepcopy(llama), course, folder.night(options=brief), brief)
    # A clock that is read once at the beginning and once a step, 5 s apart.
    assert (done.step, done.spent, done.seconds) == (3, "seconds", 15.0)
    assert done.to_dict()["budget spent"] == "seconds"
    # Those before an interruption count.
    more, night = copy.deepcopy(llama), folder.night(options=brief, seed=1)
    with pytest.raises(KeyboardInterrupt, match="step 2 of 4"):
        trained(more, course, night, brief, progress=press_at(2), seed=1)
    more, night = copy.deepcopy(llama), folder.night(options=brief, seed=1)
    done = trained(more, course, night, brief, seed=1)
    assert (done.resumed, done.step, done.seconds) == (2, 3, 15.0)
    # None is left to begin a step in.
    more, night = copy.deepcopy(llama), folder.night(options=brief, seed=2)
    with pytest.raises(KeyboardInterrupt, match="step 3 of 4"):
        trained(more, course, night, brief, progress=press_at(3), seed=2)
    more, night = copy.deepcopy(llama), folder.night(options=brief, seed=2)
    done = trained(more, course, night, brief, seed=2)
    assert (done.resumed, done.step, done.spent) == (3, 3, "seconds")


def test_no_step_begins_when_the_seconds_are_spent():
    course = Course(planned=8, steps=8, limit=10.0, step=3, seconds=10.0)
    assert course.late and course.spent == "seconds"
    assert Course(planned=8, steps=8, limit=10.0, step=8, seconds=11.0).spent is None


def test_a_loss_that_is_not_finite_ends_the_night(model, course, folder):
    teacher = course[0].teacher.clone()
    teacher[0, 0] = float("nan")
    broken = [*course[1:4], replace(course[0], teacher=teacher)]
    with pytest.raises(ValueError, match="loss must be finite, got nan at step 2 of 2"):
        trained(model, broken, folder.night())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_of_processes_add_up_to_the_loss_of_one(llama, course, world):
    for step in range(4):
        members = course[3 * step : 3 * step + 3]
        with torch.no_grad():
            whole = float(lesson_loss(llama, members))
            parts = 0.0
            for rank in range(world):
                item = Steps(course, 3, 1, 4, rank, world)[step - 1] if step else None
                item = item or Steps(course, 3, 0, 4, rank, world)[0]
                parts += float(lesson_loss(llama, item["lessons"])) * item["share"] / world
        assert parts == pytest.approx(whole, rel=1e-12)
    alone = Steps(course, 3, 0, 4)[3]
    assert alone["lessons"] == course[9:] and alone["share"] == 1.0
