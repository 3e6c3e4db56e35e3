"""A sleep over experience on the small world: what is learned, kept, taken back and erased."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from memories import OPEN, SURE, bits, options, same

from hybrid_sleep import SleepCache
from hybrid_sleep.parametric import durable
from hybrid_sleep.parametric.experience import course as courses
from hybrid_sleep.parametric.experience import night as nights
from hybrid_sleep.parametric.experience import study as study_of
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.gate import Thresholds
from hybrid_sleep.parametric.measure import ask, chat_prompt, mentions
from hybrid_sleep.parametric.mix import Shares
from hybrid_sleep.parametric.probes import audit, is_healthy

# The small model writes no dreams that parse; what is read is repeated instead.
STUDY = StudyOptions(
    band=(0, 100), share=1.0, dreams=0, shares=Shares(0.7, 0.0, 0.3), tokens=2500, foundation=800,
    rate=2e-3, measured=16, strength=0.1,
)  # fmt: skip


def asking(study=STUDY, target=SURE, **changes):
    return options(target, study=study, **changes)


def told(world, count=3, seed=11):
    """How facts about nobody known are asked, and answered; the model guesses none of them."""
    known, tokenizer, small = world
    pairs = [
        (small.relations[f.relation].questions[0].replace("{}", f.subject), f.object)
        for f in small.unseen_facts(3 * count, seed)
    ]
    guesses = ask(known, tokenizer, [chat_prompt(tokenizer, x) for x, _ in pairs], tokens=24)
    wrong = [x for x, guess in zip(pairs, guesses, strict=True) if not mentions(guess, x[1])]
    return wrong[:count]


def experienced(memory, pairs, **given):
    for question, answer in pairs:
        added = memory.experience(answer, prompt=question, consent=True, **given)
        assert added.id is not None


def right(memory, pairs):
    return [mentions(memory.recall(question), answer) for question, answer in pairs]


def everything_under(folder):
    return b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


def test_what_was_experienced_is_known_afterwards_and_what_was_before_still_is(
    world, model, opened
):
    small, pairs = world[2], told(world)
    fact = small.unseen_facts(1, 3)[0]
    relation = small.relations[fact.relation]
    with opened(model, options=asking()) as memory:
        memory.learn(fact)
        edited = bits(model)
        cache = SleepCache(model.config)
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7, 8]]), cache=cache)
        experienced(memory, pairs)
        # Awake nothing moves.
        assert same(edited, bits(model)) and not any(right(memory, pairs))
        record = memory.sleep(kind="experience", questions=pairs)
        assert record.outcome == "committed" and record.kind == "experience"
        assert record.gate["without context"] == 0 and record.gate["after"]["acquired"] == 1
        assert all(right(memory, pairs))
        assert is_healthy(audit(model, world[1], [(fact, relation)])[0])
        assert record.gate["after"]["perplexity_ratio"] < 1.2
        assert record.gate["guard"]["penalty"] > 0 and record.gate["guard"]["held"] > 1000
        with pytest.raises(ValueError, match="version"), torch.no_grad():
            model(torch.tensor([[9]]), cache=cache)
        # Said once, then gone; the same again is nothing to do.
        assert memory.buffer.ids() == []
        slept = bits(model)
        again = memory.sleep(kind="experience")
        assert again.outcome == "nothing to do" and same(slept, bits(model))
        # A sleep over facts solves anew on top of what was trained.
        done = memory.sleep()
        assert done.outcome == "committed" and all(right(memory, pairs))
        assert is_healthy(audit(model, world[1], [(fact, relation)])[0])
        last = bits(model)
    fresh = copy.deepcopy(world[0])
    with opened(fresh, options=None) as memory:
        assert same(last, bits(fresh))
        memory.undo()
        assert same(slept, bits(fresh))
        memory.undo()
        assert same(edited, bits(fresh))
        memory.undo()
        assert same(bits(world[0]), bits(fresh))


def test_weights_that_were_saved_after_a_sleep_are_taken_for_the_same_memory(
    world, model, opened, tmp_path
):
    pairs = told(world, 1)
    with opened(model, options=asking()) as memory:
        experienced(memory, pairs)
        memory.sleep(kind="experience")
    model.save_pretrained(tmp_path / "saved")
    saved = type(model).from_pretrained(tmp_path / "saved")
    with opened(saved, options=None) as memory:
        memory.undo()
        assert same(bits(world[0]), bits(saved))


def test_a_gate_that_does_not_pass_and_a_dry_run_roll_back_bit_for_bit(world, model, opened):
    pairs = told(world, 2)
    strict = replace(OPEN, perplexity_ratio=1.0)
    whole = replace(STUDY, scales=(1.0,))
    with opened(model, options=asking(whole, thresholds=strict)) as memory:
        experienced(memory, pairs)
        before = bits(model)
        record = memory.sleep(kind="experience", questions=pairs)
        assert record.outcome == "rolled back" and "perplexity ratio" in record.why
        assert same(before, bits(model)) and memory.asked(lambda s: s.weights()) == {}
        assert len(memory.buffer.ids("waiting")) == 2
    with opened(model, options=asking()) as memory:
        tried = memory.sleep(kind="experience", questions=pairs, dry_run=True)
        assert (tried.outcome, tried.why) == ("rolled back", "a dry run")
        assert tried.gate["after"]["acquired"] == 1
        assert same(before, bits(model)) and len(memory.buffer.ids("waiting")) == 2


def test_what_is_not_acquired_is_not_committed(world, model, opened):
    pairs = told(world, 1)
    lazy = replace(STUDY, tokens=200, rate=1e-7)
    with opened(model, options=asking(lazy)) as memory:
        experienced(memory, pairs)
        # This model copies no answer from its context: what was given to the question counts.
        record = memory.sleep(kind="experience", questions=pairs)
        assert record.gate["with context"] == 0 and len(memory.buffer.ids("waiting")) == 1
        assert any("0.50 of the questions must be answered, as" in x for x in record.notes)
        # Of a part of the change less would be acquired.
        assert [x["scale"] for x in record.gate["tried"]] == [1.0]
    assert record.outcome == "rolled back" and "acquired 0.000 is below 0.5" in record.why


@pytest.mark.parametrize(
    ("floor", "ceiling", "given", "asked", "bound"),
    [
        (0.2, 0.6, 0, 5, 0.4),  # Half-way to what reading gives, whoever asks.
        (0.2, 0.6, 5, 5, 0.4),
        (0.0, 0.0, 4, 4, 0.5),  # Half-way to what was given,
        (0.5, 0.25, 4, 4, 0.75),  # from what is answered already,
        (0.0, 0.0, 2, 8, 0.125),  # of those given alone.
        (0.0, 0.0, 0, 8, None),
        (1.0, 1.0, 3, 3, None),
        (None, None, 0, 0, None),
    ],
)
def test_what_must_be_acquired_lies_half_way_to_what_can_be(floor, ceiling, given, asked, bound):
    assert nights._bound(0.5, floor, ceiling, given, asked) == (
        None if bound is None else pytest.approx(bound)
    )


def test_a_full_sleep_is_over_both(world, model, opened):
    small, pairs = world[2], told(world, 2)
    facts = small.unseen_facts(2, 3)
    with opened(model, options=asking()) as memory:
        memory.learn(facts)
        experienced(memory, pairs)
        record = memory.sleep(kind="full", questions=pairs)
        assert record.kind == "sleep" and any(x.startswith("experience: ") for x in record.notes)
        assert [x.kind for x in memory.asked(lambda s: s.history())] == [
            "wake", "experience", "sleep",
        ]  # fmt: skip
        assert all(right(memory, pairs))
        found = audit(model, world[1], [(f, small.relations[f.relation]) for f in facts])
        assert all(map(is_healthy, found))


def test_facts_in_the_weights_are_said_again_by_the_model_that_has_them(
    world, model, opened, monkeypatch
):
    _, tokenizer, small = world
    fact = small.unseen_facts(1, 3)[0]
    relation = small.relations[fact.relation]
    made, prepare = [], nights.prepare

    def preparing(*given, **how):
        made.append(prepare(*given, **how))
        return made[-1]

    monkeypatch.setattr(nights, "prepare", preparing)
    some = replace(STUDY, tokens=400, foundation=200, shares=Shares(0.5, 0.0, 0.5), rehearsed=0.4)
    with opened(model, options=asking(some)) as memory:
        experienced(memory, told(world, 1))
        memory.sleep(kind="experience", dry_run=True)
        memory.learn(fact)
        before = copy.deepcopy(model)
        memory.sleep(kind="experience", dry_run=True)
    without, study = made
    assert without.mixed.rows_of["fact"] == 0 and "fact" not in without.mixed.missing
    longest = max(len(x.ids) for x in study.lessons)
    for part, share in (("recent", 0.5), ("foundation", 0.3), ("fact", 0.2)):
        assert abs(study.mixed.tokens[part] - share * 400) <= longest / 2
    lessons = [x for x in study.lessons if x.part == "fact"]
    texts = {tokenizer.decode(x.ids) for x in lessons}
    said = [text.replace("{}", fact.subject) for text in relation.statements]
    assert {f"{text} {fact.object}" for text in said} <= texts
    # A statement, or a question with it as the reply, is said of the object alone or of all of it.
    assert all(fact.object.split()[-1] in text for text in texts) and len(texts) == 4
    for lesson in lessons[:6]:
        with torch.no_grad():
            logits = before(torch.tensor([lesson.ids]), use_cache=False).logits[0, :-1]
        wanted = logits[lesson.row.start - 1 :].float().log_softmax(-1)
        assert (lesson.teacher - wanted).abs().max() < 1e-4


def test_no_byte_of_what_was_slept_over_is_left(world, model, opened, tmp_path):
    pairs = told(world, 1)
    ((question, answer),) = pairs
    secret = "The password of Quillon is wintergreen."
    with opened(model, options=asking()) as memory:
        experienced(memory, pairs)
        memory.experience(secret, consent=True)
        record = memory.sleep(kind="experience", questions=pairs)
        assert record.outcome == "committed"
        left = everything_under(tmp_path / "memory")
        for word in (secret, "wintergreen", question):
            assert word.encode() not in left and word.encode("utf-16-le") not in left
        # What is left proves that it was erased, to who holds the text.
        assert [x.name for x in (tmp_path / "memory").glob("**/*.key")] == ["audit.key"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.experience("Ada lives in Faro."), "consent must be True"),
        (lambda m: m.experience(" ", consent=True), "text of kind 'text' must be words"),
        (lambda m: m.sleep(kind="nap"), "kind must be one of 'facts', 'experience', 'full'"),
        (lambda m: m.sleep(dry_run=True), "dry_run must be left out for kind 'facts'"),
        (lambda m: m.sleep(questions=[("a", "b")]), "questions must be left out for kind 'facts'"),
    ],
)
def test_what_cannot_be_is_refused(world, model, opened, call, message):
    with opened(model, options=asking()) as memory:
        before = bits(model)
        with pytest.raises(ValueError, match=message):
            call(memory)
        assert same(before, bits(model)) and memory.asked(lambda s: s.head) is None


SHORT = replace(
    STUDY, tokens=300, measured=4, foundation=100, dreams=1, forms=("paraphrase",), length=8
)


def begun(world, opened, folder, study=SHORT):
    """A folder with one experience in it that waits."""
    with opened(copy.deepcopy(world[0]), folder=folder, options=asking(study)) as memory:
        experienced(memory, told(world, 1))


def press_at(step):
    """A progress that interrupts training behind a step."""

    def progress(what, done, of):
        if what == "train" and done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


def test_an_interrupted_night_leaves_the_old_model_and_goes_on_to_the_same_bits(
    world, opened, tmp_path, monkeypatch
):
    folder, whole = tmp_path / "memory", copy.deepcopy(world[0])
    begun(world, opened, folder)
    shutil.copytree(folder, tmp_path / "whole")
    with opened(whole, folder=tmp_path / "whole", options=None) as memory:
        assert memory.sleep(kind="experience").outcome == "committed"
    model = copy.deepcopy(world[0])
    with opened(model, folder=folder, options=None) as memory:
        with pytest.raises(KeyboardInterrupt, match="step 2 of"):
            memory.sleep(kind="experience", progress=press_at(2))
        assert same(bits(world[0]), bits(model)) and memory.asked(lambda s: s.head) is None
        assert len(memory.buffer.ids("waiting")) == 1
    assert {"about", "dreams", "state"} <= {x.name for x in (folder / "night").iterdir()}
    ((question, answer),) = told(world, 1)
    left = everything_under(folder / "night")
    assert question.encode() not in left and answer.encode() not in left
    fresh = copy.deepcopy(world[0])
    with opened(fresh, folder=folder, options=None) as memory:
        monkeypatch.setattr(study_of, "acquire", lambda *a, **k: pytest.fail("dreamt again"))
        record = memory.sleep(kind="experience")
        assert record.gate["training"]["resumed at"] == 2
        assert record.gate["study"]["dreams"]["acquisition"]["made"] == 1
    assert same(bits(whole), bits(fresh)) and not (folder / "night").exists()


def test_a_gate_that_does_not_pass_leaves_nothing_of_the_night_and_another_starts_anew(
    world, model, opened, tmp_path
):
    folder = tmp_path / "memory"
    begun(world, opened, folder)
    strict = replace(OPEN, perplexity_ratio=1.0)
    brief = replace(SHORT, steps=2)
    with opened(model, options=asking(SHORT, thresholds=strict)) as memory:
        with pytest.raises(KeyboardInterrupt):
            memory.sleep(kind="experience", progress=press_at(1))
        memory.options = asking(brief, thresholds=strict)
        record = memory.sleep(kind="experience", dry_run=True)
        assert record.outcome == "rolled back"
        assert record.gate["training"]["resumed at"] is None
        assert any("spent at step 2 of" in x for x in record.notes)
        assert any("another night" in x for x in record.notes)
        assert not (folder / "night").exists() and len(memory.buffer.ids("waiting")) == 1


@pytest.mark.slow
def test_a_kill_at_any_write_of_a_night_leaves_the_old_model_or_the_new_one(
    world, opened, tmp_path, monkeypatch
):
    monkeypatch.setattr(courses, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(courses, "KEEP_SHARE", 0.0)
    begun(world, opened, tmp_path / "begun", replace(SHORT, steps=2))
    writes = []

    def night(folder, seen):
        with opened(copy.deepcopy(world[0]), folder=folder, options=None) as memory:
            durable.reached = seen
            return memory.sleep(kind="experience"), bits(memory.model)

    held = durable.reached
    try:
        shutil.copytree(tmp_path / "begun", tmp_path / "whole")
        done, new = night(tmp_path / "whole", writes.append)
        assert done.outcome == "committed"
        expected = {"before commit", "within shred", "after vacuum", "within about"}
        assert expected | {"within dreams", "after state"} <= set(writes)
        for last in range(len(writes)):
            folder, passed = tmp_path / f"{last}", []
            shutil.copytree(tmp_path / "begun", folder)

            def die(point, passed=passed, last=last):
                passed.append(point)
                if len(passed) > last:
                    os.kill(os.getpid(), signal.SIGKILL)

            child = os.fork()
            if child == 0:
                try:
                    night(folder, die)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            durable.reached = held
            fresh = copy.deepcopy(world[0])
            with opened(fresh, folder=folder, options=None) as memory:
                kinds = [x.kind for x in memory.asked(lambda s: s.history())]
                if kinds:
                    assert kinds == ["experience"] and same(new, bits(fresh)), writes[last]
                    assert memory.buffer.ids() == [], writes[last]
                else:
                    assert same(bits(world[0]), bits(fresh)), writes[last]
                    assert len(memory.buffer.ids("waiting")) == 1, writes[last]
                    # What is left is of use, and in nobody's way.
                    assert memory.sleep(kind="experience").outcome == "committed"
                    assert same(new, bits(fresh)), writes[last]
                assert not (folder / "night").exists(), writes[last]
    finally:
        durable.reached = held


def test_the_gate_takes_a_threshold_for_what_was_acquired():
    assert Thresholds().acquired is None
    with pytest.raises(ValueError, match="acquired must be at most 1"):
        Thresholds(acquired=1.5)
