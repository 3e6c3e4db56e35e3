"""Dreams as a model writes them: prompts, ends, provenance, and free samples."""

from __future__ import annotations

import pytest
import torch
from dreaming import chat_tokenizer, dream
from editable import LIVES, VOCAB, tiny_hybrid, tiny_llama, word_tokenizer

from hybrid_sleep.parametric.dreams import write
from hybrid_sleep.parametric.dreams.dream import Source, counts
from hybrid_sleep.parametric.dreams.examine import Rules
from hybrid_sleep.parametric.dreams.forms import FORMS, form_prompt
from hybrid_sleep.parametric.dreams.write import acquire, retain, write_drafts
from hybrid_sleep.parametric.measure import encode, user_turn
from hybrid_sleep.sleep.weights import weights_digest

DAYS = [
    Source("day-1", "Ada Byron lives in Lisbon ."),
    Source("day-2", "Bo Chan lives in Oslo ."),
]
SAID = {
    "paraphrase": "The home of {} is {} . </s> Today",
    "implication": "The home is Rome . </s> Today",
    "question": "Where does {} live ? Answer : {} </s> is",
    "reversal": "{1} is The home",
}


PEOPLE = (("Ada Byron", "Lisbon"), ("Bo Chan", "Oslo"))


@pytest.fixture
def scripted(monkeypatch):
    """What is written behind each prompt is known; the prompts asked for are seen."""
    asked = []

    def script(model, tokenizer, begun, tokens, *, seed, **more):
        asked.extend(begun)
        said = {
            tuple(encode(tokenizer, form_prompt(tokenizer, form, day.text))): text.format(*who)
            for day, who in zip(DAYS, PEOPLE, strict=True)
            for form, text in SAID.items()
        }
        texts = [said[tuple(ids)] for ids in begun]
        return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    monkeypatch.setattr(write, "continuations", script)
    return asked


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), chat_tokenizer()], ids=["plain", "chat"])
def test_every_form_of_every_source_in_order(scripted, tokenizer):
    drafts = write_drafts(tiny_llama(), tokenizer, DAYS, each=2, tokens=4, seed=3)
    wanted = [(day.id, form) for day in DAYS for form in FORMS for _ in range(2)]
    assert [(d.source.id, d.form) for d in drafts] == wanted
    texts = {d.source.id: d.source.text for d in drafts}
    assert scripted == [encode(tokenizer, form_prompt(tokenizer, f, texts[i])) for i, f in wanted]
    # Cut at the first special token; one without any reached the limit.
    assert drafts[0].written == "The home of Ada Byron is Lisbon ." and drafts[0].ended
    assert drafts[-1].form == "reversal" and not drafts[-1].ended


def test_dreams_with_their_checks(scripted):
    model, tokenizer = tiny_llama(), word_tokenizer()
    rules = Rules(margin=0.0, least=2)
    made = acquire(model, tokenizer, DAYS, rules=rules, relations=[LIVES], each=2, tokens=4, seed=7)
    assert len(made) == 16 and [d.number for d in made] == list(range(16))
    assert {d.seed for d in made} == {7} and {d.weights for d in made} == {weights_digest(model)}
    assert all(d.checks and d.sources for d in made)
    for d in made:
        assert d.sources == ("day-1" if d.number < 8 else "day-2",)
    why = {d.form: d.why for d in made[:8]}
    assert why["implication"] == "words: rome not in its source"
    assert why["reversal"] == "form: no whole line"
    total = counts(made)["acquisition"]
    assert total["made"] == 16 == total["kept"] + sum(total["rejected"].values())
    assert not {"day-1", "day-2"} & {d.id for d in made}
    with pytest.raises(ValueError, match="got the dream"):
        acquire(model, tokenizer, [DAYS[0], made[0]])
    with pytest.raises(ValueError, match="got the text of a dream as day-3"):
        acquire(model, tokenizer, [Source("day-3", made[0].text)], earlier=made)


@pytest.mark.parametrize("make", [tiny_llama, tiny_hybrid])
@pytest.mark.parametrize("tokenizer", [word_tokenizer(), chat_tokenizer()], ids=["plain", "chat"])
def test_any_model_dreams(make, tokenizer):
    model = make()
    digest = weights_digest(model)
    given = {"forms": ("paraphrase", "question"), "each": 3, "tokens": 8, "seed": 1}
    made = acquire(model, tokenizer, DAYS, **given)
    assert len(made) == 12 and counts(made)["acquisition"]["made"] == 12
    assert acquire(model, tokenizer, DAYS, **given) == made
    assert acquire(model, tokenizer, DAYS, **{**given, "seed": 2}) != made
    assert weights_digest(model) == digest


def test_what_cannot_be_is_refused_before_the_model_runs():
    tokenizer = word_tokenizer()
    model = tiny_llama(max_position_embeddings=24)
    model.forward = None
    given = {"tokens": 8}
    with pytest.raises(ValueError, match="forms must be one of .*, got 'poem'"):
        write_drafts(model, tokenizer, DAYS, forms=["poem"], **given)
    with pytest.raises(ValueError, match="source 'long' must leave room for 8 tokens of the 24"):
        write_drafts(model, tokenizer, [Source("long", "Ada lives " * 9)], **given)
    with pytest.raises(ValueError, match="each must be"):
        write_drafts(model, tokenizer, DAYS, each=0, **given)
    with pytest.raises(ValueError, match="tokens must be"):
        write_drafts(model, tokenizer, DAYS, tokens=0)
    with pytest.raises(ValueError, match="form must be 'free' for a tokenizer without"):
        retain(model, tokenizer, 100, form="turn")
    with pytest.raises(ValueError, match="form must be one of 'free', 'turn'"):
        retain(model, tokenizer, 100, form="paraphrase")


@pytest.mark.parametrize("make", [tiny_llama, tiny_hybrid])
def test_free_samples(make):
    model = make()
    for tokenizer, form in ((word_tokenizer(), "free"), (chat_tokenizer(), "turn")):
        begun = user_turn(tokenizer) if form == "turn" else [1]
        made = retain(model, tokenizer, 96, form=form, length=8, seed=4)
        assert len(made) == 12 and [d.number for d in made] == list(range(12))
        for d in made:
            assert (d.kind, d.form, d.sources, d.seed) == ("retention", form, (), 4)
            assert list(d.ids[: d.start]) == begun and d.weights == weights_digest(model)
            assert len(d.ids) == 8 + (len(begun) if form == "turn" else 0)
            assert d.kept and {c.name for c in d.checks} == {"length", "unique"}
            assert d.text == tokenizer.decode(d.ids[d.start :], skip_special_tokens=True)
    again = retain(model, tokenizer, 96, form=form, length=8, seed=4, earlier=made)
    assert [d.why for d in again] == [f"unique: as {d.id}" for d in made]


def test_free_samples_that_say_nothing_are_rejected():
    model, tokenizer = tiny_llama(), word_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB, dtype=torch.float64))
        model.lm_head.bias[2] = 50.0
    made = retain(model, tokenizer, 32, length=8)
    assert [d.why for d in made] == ["length: 0 tokens"] * 4
    # Acquisition dreams do not stand in the way of retention.
    with torch.no_grad():
        model.lm_head.bias[2], model.lm_head.bias[5] = 0.0, 50.0
    word = tokenizer.convert_ids_to_tokens(5)
    made = retain(model, tokenizer, 32, length=8, earlier=[dream(" ".join([word] * 7))])
    assert [d.kept for d in made] == [True, False, False, False]
