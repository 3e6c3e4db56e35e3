"""Where a fact's key is read and its target begins, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from editable import LIVES, byte_tokenizer, word_tokenizer
from tokenizers import normalizers, processors

from hybrid_sleep.parametric.contexts import Context, beginnings, context, edit_contexts
from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.measure import chat_prompt, encode, user_turn

WORDS = word_tokenizer()


def said(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(ids))


def test_a_word_is_a_token():
    #                                 0   1   2     3     4   5
    got = context(WORDS, "Ada Byron lives in", "Ada Byron", " Lisbon")
    assert said(WORDS, got.ids) == ["<s>", "Ada", "Byron", "lives", "in", "Lisbon"]
    assert got == Context(got.ids, at=(2,), target=5, object=5)
    assert context(WORDS, "Ada Byron lives in", "Ada Byron", " Lisbon", "prompt_last").at == (4,)
    # An object of several tokens, and a subject of one.
    got = context(WORDS, "The home of Ada is", "Ada", " New York")
    assert said(WORDS, got.ids)[got.target :] == ["New", "York"]
    assert got.at == (4,) and got.target == got.object == 6


def test_a_subject_said_several_times_holds_the_fact_at_each():
    text = "Ada Byron is Ada Byron . The home of Ada Byron is"
    got = context(WORDS, text, "Ada Byron", " Rome")
    assert got.at == (2, 5, 11)
    assert [got.ids[i] for i in got.at] == WORDS.convert_tokens_to_ids(["Byron"] * 3)


def test_a_name_inside_of_another_word_is_not_the_subject():
    tokenizer = byte_tokenizer()
    got = context(tokenizer, "Adamant Ada is", "Ada", " X")
    assert got.at == (len("Adamant Ada") - 1,)
    # Where there is no other, it is.
    assert context(tokenizer, "All Adas are", "Ada", " X").at == (len("All Ada") - 1,)


def test_a_reply_is_learned_and_has_the_object_at_its_end():
    asked = "Where does Ada Byron live ? "
    got = context(WORDS, asked, "Ada Byron", " Lisbon", reply="Ada Byron lives in")
    assert said(WORDS, got.ids) == [
        "<s>", "Where", "does", "Ada", "Byron", "live", "?",  # 0..6
        "Ada", "Byron", "lives", "in",  # 7..10
        "Lisbon",
    ]  # fmt: skip
    assert got == Context(got.ids, at=(4, 8), target=7, object=11)
    last = context(WORDS, asked, "Ada Byron", " Lisbon", "prompt_last", "Ada Byron lives in")
    assert last.at == (10,)


def test_a_text_without_a_target_ends_where_one_would_begin():
    got = context(WORDS, "Ada Byron is", "Ada Byron", "")
    assert got == Context(got.ids, at=(2,), target=4, object=4)
    assert len(got.ids) == 4


def test_bytes():
    tokenizer = byte_tokenizer()
    got = context(tokenizer, "Ada lives in", "Ada", " Rome")
    assert said(tokenizer, got.ids) == list("AdaĠlivesĠinĠRome")
    assert got == Context(got.ids, at=(2,), target=12, object=12)
    # Bytes of one letter are tokens of their own, the last of which is the key.
    got = context(tokenizer, "Zoé is", "Zoé", " x")
    assert len(got.ids) == len("Zoé is x".encode()) and got.at == (3,)


def test_a_token_that_reaches_over_the_border_belongs_to_the_target():
    tokenizer = byte_tokenizer(("n", "Ġ"), ("nĠ", "R"))
    got = context(tokenizer, "Ada lives in", "Ada", " Rome")
    assert said(tokenizer, got.ids) == [*"AdaĠlivesĠi", "nĠR", "o", "m", "e"]
    assert got == Context(got.ids, at=(2,), target=11, object=11)
    # The last token of the prompt is then the one before it.
    assert context(tokenizer, "Ada lives in", "Ada", " Rome", "prompt_last").at == (10,)


def test_a_token_that_reaches_over_the_subject_is_its_last():
    tokenizer = byte_tokenizer(("a", "'"), ("d", "a'"))
    got = context(tokenizer, "Ada's home is", "Ada", " Rome")
    assert said(tokenizer, got.ids)[:3] == ["A", "da'", "s"]
    assert got.at == (1,)
    # Never in the target, which has not been said yet.
    tokenizer = byte_tokenizer(("a", "Ġ"), ("d", "aĠ"))
    got = context(tokenizer, "So says Ada", "Ada", " Rome")
    assert got.target == len("So says A") and got.at == (got.target - 1,)


def test_what_no_context_can_be_made_of_is_refused():
    for answer in (" ", "  "):
        with pytest.raises(ValueError, match="object must tokenise to something"):
            context(byte_tokenizer(), "Ada is", "Ada", answer)
    dropping = word_tokenizer()
    dropping.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    with pytest.raises(ValueError, match="object must tokenise to something"):
        context(dropping, "Ada is", "Ada", " #")
    with pytest.raises(ValueError, match="prompt must have the subject 'Bo'"):
        context(WORDS, "Ada is", "Bo", " Rome")
    merged = byte_tokenizer(("A", "Ġ"))
    with pytest.raises(ValueError, match="prompt must have a token"):
        context(merged, "A", "A", " Rome")


def test_a_fact_has_its_statements_those_behind_prefixes_and_its_questions():
    fact = Fact("Ada Byron", "lives in", "New York")
    got = edit_contexts(WORDS, fact, LIVES, prefixes=("Today . ",))
    texts = [WORDS.decode(c.ids[1:]) for c in got]
    assert texts == [
        "Ada Byron lives in New York",
        "The home of Ada Byron is New York",
        "Today . Ada Byron lives in New York",
        "Question : Where does Ada Byron live ? Answer : Ada Byron lives in New York",
    ]
    assert [c.at for c in got] == [(2,), (5,), (4,), (6, 12)]
    assert [(c.target, c.object) for c in got] == [(5, 5), (7, 7), (7, 7), (11, 15)]
    assert len(edit_contexts(WORDS, fact, LIVES, statements=1, questions=0)) == 1
    last = edit_contexts(WORDS, fact, LIVES, position="prompt_last")
    assert [c.at for c in last] == [(c.object - 1,) for c in last]


def test_a_chat_template_is_not_given_a_second_first_token():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}Answer : "
    )
    prompt = chat_prompt(tokenizer, "Where does Ada live ?", system="Today")
    assert prompt == "<s>system : Today user : Where does Ada live ? Answer : "
    ids = encode(tokenizer, prompt)
    assert ids.count(tokenizer.bos_token_id) == 1
    fact = Fact("Ada", "lives in", "Rome")
    got = edit_contexts(tokenizer, fact, LIVES)[-1]
    assert got.ids.count(tokenizer.bos_token_id) == 1 and got.ids[0] == tokenizer.bos_token_id
    assert said(tokenizer, got.ids[got.target :]) == ["Ada", "lives", "in", "Rome"]


def test_what_stands_before_a_subject_in_texts_and_turns():
    relation = replace(
        LIVES,
        statements=("{} lives in", "The home of {} is in"),
        questions=("Where does {} live?",),
    )
    ours = replace(relation, name="is", statements=("The home of {} is",), questions=("{} is?",))
    tokenizer = word_tokenizer()
    plain = beginnings(tokenizer, [relation, ours])
    assert plain == [encode(tokenizer, x) for x in ("Question: Where does", "The home of")]
    assert user_turn(tokenizer) == [] == beginnings(tokenizer, [])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}Answer : "
    )
    assert user_turn(tokenizer) == encode(tokenizer, "<s>user : ")
    chats = beginnings(tokenizer, [relation, ours])
    assert chats == [encode(tokenizer, x) for x in ("<s>user : Where does", "The home of")]
    assert chats[0].count(tokenizer.bos_token_id) == 1


def test_what_the_tokenizer_does_not_know_cannot_be_said():
    for answer in (" Xyzzy", " New Xyzzy"):
        with pytest.raises(ValueError, match=f"object must be of tokens .* got '{answer}'"):
            context(WORDS, "Ada lives in", "Ada", answer)
    with pytest.raises(ValueError, match="subject must have a token .* got 'Xyz Zyx'"):
        context(WORDS, "Xyz Zyx lives in", "Xyz Zyx", " Rome")
    # One name of two is enough to tell it from others.
    assert context(WORDS, "Ada Zyx lives in", "Ada Zyx", " Rome").at == (2,)


def test_a_tokenizer_that_closes_every_text_does_not_close_a_prompt():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("Ada")["input_ids"][-1] == 2
    assert said(tokenizer, encode(tokenizer, "Ada is")) == ["<s>", "Ada", "is"]
    assert context(tokenizer, "Ada is", "Ada", " Rome") == context(WORDS, "Ada is", "Ada", " Rome")


def test_a_reply_may_be_the_object_alone_and_questions_of_no_relation_get_a_statement():
    fact = Fact("Ada Byron", "lives in", "Rome")
    got = edit_contexts(WORDS, fact, LIVES, statements=1, reply="object", about=1)
    statement, question, about = got
    assert said(WORDS, question.ids)[question.target :] == ["Rome"]
    assert question.target == question.object and question.at == (6,)
    assert said(WORDS, about.ids)[about.target :] == ["Ada", "Byron", "lives", "in", "Rome"]
    assert about.object == len(about.ids) - 1 and len(about.at) == 2
    # Behind a turn's beginning, an object begins without a space; behind words, with one.
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}A:{{ '\n' }}"
    got = edit_contexts(tokenizer, fact, LIVES, statements=1, reply="object")
    texts = [tokenizer.decode(c.ids[c.target :]) for c in got]
    assert texts == [" Rome", "Rome"]
