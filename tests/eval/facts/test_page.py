"""Facts on a page: what it says, what is trained on, what a night over it leaves behind."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from memories import OPEN, bits, same

from hybrid_sleep.eval.facts import course, subjects
from hybrid_sleep.eval.facts.baselines import Training, Untouched
from hybrid_sleep.eval.facts.page import AskedNight, Night, PageTuning, lines
from hybrid_sleep.eval.facts.settings import SETTINGS
from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.measure import ask, chat_prompt, mentions


@pytest.fixture(scope="module")
def subject():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "WORLD_KNOWN", 8)
        patch.setattr(subjects, "WORLD_LINES", 40)
        return subjects.subject_of("world", 0, 0, 4)


def test_a_page_says_each_fact_once_on_a_line_of_its_own(subject):
    plain = Untouched(subject.load(), subject.tokenizer, subject.relations)
    facts = [
        Fact("Ada Abel", "lives in", "Riga"), Fact("Dora Dahl", "owns a", "green boat"),
    ]  # fmt: skip
    assert lines(plain, facts) == ["Ada Abel lives in Riga.", "Dora Dahl owns a green boat."]


def test_fine_tuning_on_a_page_knows_its_words_and_goes_away(subject):
    model = subject.load()
    before = bits(model)
    training = Training(rate=3e-3, epochs=60, stop=0.02)
    with PageTuning(model, subject.tokenizer, subject.relations, training) as method:
        rows = method.texts(subject.facts)
        said = [subject.tokenizer.decode(ids) for ids, _ in rows]
        assert said == lines(method, subject.facts)
        assert all(start == 0 for _, start in rows)
        method.learn(subject.facts)
        assert method.losses[-1] < 0.1 < method.losses[0]
        assert not same(bits(model), before)
    assert same(bits(model), before)


def test_a_night_over_a_page_knows_it_and_says_what_it_took(subject):
    model = subject.load()
    before = bits(model)
    study = replace(SETTINGS["world"].page, tokens=3000, foundation=800, rate=2e-3, measured=16)
    options = replace(course.night_options(SETTINGS["world"]), study=study, thresholds=OPEN)
    with Night(model, subject, options) as method:
        method.learn(subject.facts)
        assert method.record.outcome == "committed", method.record
        ended = r"committed; trained on (2,99|3,00)\d tokens, 0 of 0 dreams kept, 0 answers"
        assert re.fullmatch(ended, method.outcome), method.outcome
        relations = {r.name: r for r in subject.relations}
        asked = [
            chat_prompt(
                subject.tokenizer, relations[f.relation].questions[0].replace("{}", f.subject)
            )
            for f in subject.facts
        ]
        said = ask(model, subject.tokenizer, asked, tokens=12)
        # Read as statements, asked as questions.
        right = [mentions(text, f.object) for text, f in zip(said, subject.facts, strict=True)]
        assert sum(right) >= 3, said
    assert same(bits(model), before)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_night_that_is_told_what_will_be_asked_answers_it_from_each_line(subject):
    model = subject.load()
    study = replace(SETTINGS["world"].page, tokens=400, foundation=200, samples=1, measured=4)
    options = replace(course.night_options(SETTINGS["world"]), study=study, thresholds=OPEN)
    with AskedNight(model, subject, options) as method:
        fact = subject.facts[0]
        assert method.asked(fact) and fact.object not in " ".join(method.asked(fact))
        held_out = method.relation(fact).held_out_questions
        assert not {x.replace("{}", fact.subject) for x in held_out} & set(method.asked(fact))
        method.learn(subject.facts)
        count = sum(len(method.asked(fact)) for fact in subject.facts)
        assert method.record.read["prompts about them"] == count
        assert method.outcome.endswith(f"0 of 0 dreams kept, {count} answers")
