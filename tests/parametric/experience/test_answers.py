"""What a model is asked about its experience, with it in its context: the context into weights."""

from __future__ import annotations

import pytest
import torch
from editable import tiny_hybrid, word_tokenizer
from memories import bits, opener, same

from hybrid_sleep.parametric import StudyOptions
from hybrid_sleep.parametric.dreams.forms import question_prompt
from hybrid_sleep.parametric.experience import night
from hybrid_sleep.parametric.experience.context import answers_about, ids_of
from hybrid_sleep.parametric.measure import encode, greedy
from hybrid_sleep.parametric.mix import Shares

pytest.importorskip("cryptography")

TOKENIZER = word_tokenizer()
STUDY = StudyOptions(
    tokens=4000, samples=1, length=2, dreams=0, shares=Shares(0.8, 0.0, 0.2), foundation=64,
    measured=4, rate=1e-2, strength=0.01, band=(0, 100), share=1.0,
)  # fmt: skip
ROWS = {"corpus": [[1, 4, 5, 6, 7], [1, 9, 8, 7, 6]], "ordinary": [[1, 10, 11, 12], [1, 3, 5]]}
SAID = {"7": "Ada lives in Rome .", "9": "Bob lives in Paris ."}


@pytest.fixture
def model():
    return tiny_hybrid()


@pytest.fixture
def opened(tmp_path):
    return opener(tmp_path / "memory", TOKENIZER, STUDY, **ROWS)


def reply(model, question, text=""):
    ids = encode(TOKENIZER, question_prompt(TOKENIZER, question, text))
    (said,) = greedy(model, TOKENIZER, [ids], tokens=2)
    end = TOKENIZER.eos_token_id
    return said[: said.index(end) + 1] if end in said else said


def test_an_answer_is_given_with_the_text_and_learned_without_it(model):
    asked = {"7": ["Where does Ada live ?", "Who ?"], "9": ["Where ?"]}
    given = {"length": 2, "seed": 5}
    found = answers_about(model, TOKENIZER, SAID, asked, samples=8, **given)
    flat = [(name, prompt) for name, of in asked.items() for prompt in of]
    assert [answer.row.origin for answer in found] == [flat[i % 3][0] for i in range(8)]
    for answer, (name, prompt) in zip(found, [flat[i % 3] for i in range(8)], strict=True):
        alone, said = ids_of(TOKENIZER, prompt), answer.row.ids[answer.row.start :]
        assert answer.row.ids[: answer.row.start] == alone
        behind = encode(TOKENIZER, question_prompt(TOKENIZER, prompt, SAID[name]))
        assert answer.reads == (*behind, *said) and 1 <= len(said) <= 2
    # The likeliest first, of every prompt; the rest are drawn.
    for answer, (name, prompt) in zip(found, flat, strict=False):
        assert list(answer.row.ids[answer.row.start :]) == reply(model, prompt, SAID[name])
    assert len({answer.row.ids for answer in found[::3]}) > 1
    assert found == answers_about(model, TOKENIZER, SAID, asked, samples=8, **given)
    assert len(answers_about(model, TOKENIZER, SAID, asked, samples=1, **given)) == 3
    assert answers_about(model, TOKENIZER, SAID, {}, samples=8, **given) == []


def test_what_the_context_says_is_said_without_it_after_a_sleep(model, opened):
    questions = ["Where does Ada live ?", "Who lives in Rome ?"]
    with opened(model) as memory:
        first = memory.experience(SAID["7"], consent=True).id
        memory.experience(SAID["9"], consent=True)
        with_text = [reply(model, question, SAID["7"]) for question in questions]
        assert with_text != [reply(model, question) for question in questions]
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            train = night._train
            patch.setattr(night, "_train", lambda m, study, *a: [
                seen.extend(study.lessons), train(m, study, *a)][1])  # fmt: skip
            record = memory.sleep(kind="experience", prompts={first: questions})
        assert record.outcome == "committed", record
        assert record.read["prompts about them"] == record.gate["study"]["answers"] == 2
        assert [reply(model, question) for question in questions] == with_text
        memory.undo()
        taught = {lesson.row: lesson for lesson in seen if lesson.teacher is not None}
        own = [lesson for row, lesson in taught.items() if row.origin == str(first)]
        assert len(own) == 2
        # What the model expects behind the text, in one pass over text, question and answer.
        for lesson in own:
            question = questions[lesson.ids[: lesson.row.start] == ids_of(TOKENIZER, questions[1])]
            above = encode(TOKENIZER, question_prompt(TOKENIZER, question, SAID["7"]))
            row = torch.tensor([[*above, *lesson.ids[lesson.row.start :]]])
            with torch.no_grad():
                said = model(row, use_cache=False).logits[0].log_softmax(-1)
            expected = said[-lesson.tokens - 1 : -1]
            assert torch.allclose(lesson.teacher, expected, atol=1e-10, rtol=0)


def test_prompts_about_what_this_sleep_leaves_out_wait_with_it(model, opened):
    with opened(model, recent=8, tokens=200) as memory:
        ids = [memory.experience(text, consent=True).id for text in SAID.values()]
        record = memory.sleep(kind="experience", prompts={i: ["Where ?"] for i in ids})
        assert record.read["experiences"] == record.read["prompts about them"] == 1
        assert record.gate["study"]["answers"] == 1
        (left,) = memory.buffer.ids("waiting")
        again = memory.sleep(kind="experience", prompts={left: ["Where ?"]})
        assert again.read["prompts about them"] == 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({9: ["Where ?"]}, r"experiences that wait, \[1\], got 9"),
        ({"1": ["Where ?"]}, r"experiences that wait, \[1\], got '1'"),
        ({1: "Where ?"}, "must be a sequence of prompts, got the text 'Where .'"),
        ({1: ["Where ?", " "]}, "prompts must be of at least a word, got ' '"),
        ({1: [[3, 4]]}, r"prompts must be of at least a word, got \[3, 4\]"),
    ],
)
def test_prompts_that_cannot_be_are_refused_before_anything_changes(
    model, opened, prompts, message
):
    with opened(model) as memory:
        memory.experience(SAID["7"], consent=True)
        before, commits = bits(model), len(memory.asked(lambda s: s.history()))
        with pytest.raises(ValueError, match=message):
            memory.sleep(kind="experience", prompts=prompts)
        with pytest.raises(ValueError, match="prompts must be left out for kind 'facts'"):
            memory.sleep(prompts={1: ["Where ?"]})
        assert same(before, bits(model))
        assert len(memory.asked(lambda s: s.history())) == commits


@pytest.mark.parametrize(
    ("study", "trained"),
    [
        # 6 tokens of experience 10 times, of which 8 of 10 tokens are.
        ({"passes": 10.0}, 75),
        ({"passes": 10.0, "shares": Shares(0.4, 0.4, 0.2)}, 90),  # No dream: 2 of 3 tokens.
        ({"passes": 10.0, "tokens": 40}, 40),
        ({"passes": None, "tokens": 120}, 120),
    ],
)
def test_experience_is_gone_through_as_often_as_is_asked(model, opened, study, trained):
    with opened(model, **study) as memory:
        memory.experience(SAID["7"], consent=True)
        record = memory.sleep(kind="experience", dry_run=True)
    mixed = record.gate["study"]["mix"]
    assert sum(mixed["asked"].values()) == pytest.approx(trained)
    if study["passes"] and "tokens" not in study:
        assert mixed["passes"]["recent"] == pytest.approx(10, abs=0.5)
