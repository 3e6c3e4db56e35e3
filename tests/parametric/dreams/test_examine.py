"""Dreams that contradict their source are rejected, dreams that restate it pass; one by one."""

from __future__ import annotations

import pytest
import torch
from dreaming import CopyModel, chat_tokenizer, dream
from editable import LIVES, VOCAB, tiny_hybrid, tiny_llama, word_tokenizer

from hybrid_sleep.parametric.dreams.dream import Source, counts
from hybrid_sleep.parametric.dreams.examine import Draft, Rules, examine, gain, rows_of
from hybrid_sleep.parametric.dreams.forms import Parsed, form_prompt, question_prompt
from hybrid_sleep.parametric.dreams.losses import mean_losses, row_losses, token_losses
from hybrid_sleep.parametric.facts import Fact

ADA = Source("day-1", "Ada Byron lives in Lisbon .", (Fact("Ada Byron", "lives in", "Lisbon"),))
TWO = Source("day-2", "Ada Byron lives in Lisbon . Bo Chan lives in Oslo .", ADA.facts)
RULES = Rules(least=2)
TOKENIZERS = {"plain": word_tokenizer, "chat": chat_tokenizer}


def judged(*written, source=ADA, form="paraphrase", tokenizer=None, model=None, **more):
    drafts = [Draft(source, form, text, True) for text in written]
    model = model or CopyModel(VOCAB)
    given = {"rules": RULES, "relations": [LIVES], **more}
    return examine(model, tokenizer or word_tokenizer(), drafts, **given)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "form, written, why",
    [
        ("paraphrase", "The home of Ada Byron is Lisbon .", ""),
        ("reversal", "Lisbon is home of Ada Byron .", ""),
        ("question", "Where does Ada Byron live ?\nAnswer: Lisbon", ""),
        # Against its source.
        ("paraphrase", "The home of Ada Byron is Oslo .", "words: oslo not in its source"),
        ("reversal", "Oslo is home of Ada Byron .", "form: no two names"),
        ("question", "Where does Ada Byron live ?\nAnswer: Oslo", "words: oslo not"),
        ("paraphrase", "The home of Ada Byron is not Lisbon .", "words: it denies"),
        ("implication", "Ada Byron is 30 .", "words: 30 not in its source"),
        ("question", "Where does Bo Chan live ?\nAnswer: Lisbon", "words: bo chan not"),
        # Of no use.
        ("implication", "It is a home of children .", "words: no name and no number of its source"),
        ("paraphrase", "Ada Byron lives in Lisbon .", "novel: 1.00 of it is copied"),
        ("paraphrase", "", "form: no whole line"),
        ("paraphrase", "Lisbon", "length: 1 tokens"),
        ("paraphrase", "The home of Ada is Lisbon " * 26, "length: 156 tokens"),
    ],
)  # fmt: skip
def test_one_dream(kind, form, written, why):
    (got,) = judged(written, form=form, tokenizer=TOKENIZERS[kind]())
    assert got.kept == (not why) and got.why.startswith(why) and bool(got.why) == bool(why)
    assert got.sources == ("day-1",) and got.kind == "acquisition" and got.form == form
    assert got.generation == 1 and got.checks and len(got.weights) == 64


@pytest.mark.parametrize(
    "form, written",
    [
        ("paraphrase", "The home of Ada Byron is Oslo ."),
        ("question", "Where does Ada Byron live ?\nAnswer: Oslo"),
    ],
)
def test_a_known_fact_tells_what_words_alone_do_not(form, written):
    (got,) = judged(written, form=form, source=TWO)
    assert got.why == "facts: against 'Ada Byron lives in Lisbon'"
    # Nothing else would: all of its words are in the source.
    (unknown,) = judged(written, form=form, source=Source("day-2", TWO.text))
    assert unknown.kept
    # Plain words of the relation do, where no better are known.
    (plain,) = judged("It is known that Ada Byron lives in Oslo .", source=TWO, relations=[])
    assert plain.why.startswith("facts")


def test_what_the_source_does_not_make_likelier_is_not_grounded():
    (got,) = judged("The home of Ada Byron is Lisbon .", model=CopyModel(VOCAB, 0.0))
    assert got.why == "grounded: 0.00 nats a token likelier with its source"
    assert got.checks[-1].value == pytest.approx(0.0, abs=1e-12)
    (got,) = judged("The home of Ada Byron is Lisbon .", model=CopyModel(VOCAB, -1.0))
    assert got.why.startswith("grounded: -") and not got.kept


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "form, parsed",
    [
        ("paraphrase", Parsed("The home of Ada Byron is Lisbon .")),
        ("question", Parsed("In Lisbon", "Where does Ada Byron live ?")),
    ],
)
def test_the_gain_is_the_difference_of_two_losses_of_the_same_words(kind, form, parsed):
    tokenizer, model = TOKENIZERS[kind](), CopyModel(VOCAB)
    prompts = [
        question_prompt(tokenizer, parsed.question, source)
        if parsed.question
        else form_prompt(tokenizer, form, source)
        for source in (ADA.text, "")
    ]
    own = tokenizer(parsed.text, add_special_tokens=False).input_ids
    losses = []
    for prompt in prompts:
        first = [] if prompt.startswith("<s>") else [1]
        ids = [*first, *tokenizer(prompt, add_special_tokens=False).input_ids]
        losses.append(model.nll([*ids, *own], len(ids)))
    (got,) = gain(model, tokenizer, [(form, parsed, ADA.text)])
    assert got == pytest.approx(losses[1] - losses[0], rel=1e-12) and got > 0.1


@pytest.mark.parametrize("make", [tiny_llama, tiny_hybrid])
def test_losses_of_rows_together_are_those_of_each_alone(make):
    model = make().train()
    rows = [((1, 5, 6, 7, 8), 2), ((1, 9), 0), ((3, 4, 5, 6, 7, 8, 9, 3), 5), ((4, 4, 4), 1)]
    wanted, each = [], []
    model.eval()
    for ids, start in rows:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(max(1, start), len(ids))
        each.append([-float(logp[i - 1, ids[i]]) for i in places])
        wanted.append(sum(each[-1]) / len(places))
    model.train()
    for own, losses in zip(token_losses(model, rows, at_once=3), each, strict=True):
        assert own == pytest.approx(losses, rel=1e-9)
    assert mean_losses(model, rows, at_once=3) == pytest.approx(wanted, rel=1e-9)
    assert model.training
    for row in (((1, 2), 2), ((1,), 0)):
        with pytest.raises(ValueError, match="rows must have a token to predict"):
            row_losses(model, [rows[0], row])


def test_nearly_the_same_is_kept_once():
    made = judged(
        "The home of Ada Byron is Lisbon .", "The home of Ada Byron is Lisbon",
        "The home is Lisbon .", "The home of Ada Byron is Oslo .",
    )  # fmt: skip
    assert [d.kept for d in made] == [True, False, True, False]
    assert made[1].why == f"unique: as {made[0].id}" and made[1].checks[-1].value == 1.0
    assert [d.number for d in made] == [0, 1, 2, 3]
    assert counts(made)["acquisition"] == {
        "made": 4, "kept": 2, "unfinished": 0, "rejected": {"unique": 1, "words": 1}
    }  # fmt: skip
    # One that was rejected does not stand in the way, one of another call does.
    before = dream("The home is Lisbon")
    (again,) = judged("The home is Lisbon .", earlier=[before])
    assert again.why == f"unique: as {before.id}"
    rejected = dream("The home is Lisbon", checks=made[3].checks)
    (new,) = judged("The home is Lisbon .", earlier=[rejected])
    assert new.kept


def test_what_is_trained_on_has_no_source():
    tokenizer = chat_tokenizer()
    (one,) = judged("The home of Ada Byron is Lisbon .", tokenizer=tokenizer)
    assert tokenizer.decode(one.ids) == "<s> The home of Ada Byron is Lisbon ." and one.start == 1
    written = "Where does Ada Byron live ?\nAnswer: In Lisbon"
    (one,) = judged(written, form="question", tokenizer=tokenizer)
    asked = "<s>user : Where does Ada Byron live ? </s>Answer : "
    prompt = tokenizer(asked, add_special_tokens=False)
    assert list(one.ids[: one.start]) == prompt.input_ids
    assert list(one.ids[one.start :]) == tokenizer("In Lisbon", add_special_tokens=False).input_ids
    assert one.question == "Where does Ada Byron live ?"
    # The teacher's row has the same words behind it.
    ids, start = rows_of(tokenizer, one.form, Parsed(one.text, one.question), ADA.text)
    assert ids[start:] == one.ids[one.start :] and start > one.start


def test_a_dream_is_no_source():
    one = dream()
    for source in (one, Source("day-9", one.text)):
        with pytest.raises(ValueError, match="sources must be experiences"):
            judged("The home is Lisbon .", source=source, earlier=[one])
    with pytest.raises(ValueError, match="ids of their own"):
        examine(CopyModel(VOCAB), word_tokenizer(),
                [Draft(Source("a", t), "paraphrase", "", True) for t in "xy"])  # fmt: skip


@pytest.mark.parametrize(
    "given, message",
    [
        ({"margin": -0.1}, "margin must be a finite number of at least 0"),
        ({"overlap": 1.5}, "overlap must be at most 1"),
        ({"similarity": -1}, "similarity must be"),
        ({"ngram": 0}, "ngram must be"),
        ({"least": 9, "most": 8}, "most must be an integer of at least 9, got 8"),
    ],
)
def test_rules_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        Rules(**given)
