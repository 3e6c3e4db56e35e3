"""What each form asks for, and what counts as an answer to it: written down by hand."""

from __future__ import annotations

import pytest
from dreaming import chat_tokenizer
from editable import word_tokenizer

from hybrid_sleep.parametric.dreams.forms import FORMS, form_prompt, parse, question_prompt

SOURCE = "Ada lives in Lisbon."


@pytest.mark.parametrize("form", FORMS)
def test_prompts(form):
    plain, chat = word_tokenizer(), chat_tokenizer()
    assert form_prompt(plain, form, SOURCE) == f"{SOURCE}\n\n{FORMS[form].cue}"
    assert form_prompt(plain, form, "") == FORMS[form].cue
    asked = f"{SOURCE}\n\n{FORMS[form].instruction}"
    assert form_prompt(chat, form, SOURCE) == f"<s>user : {asked} </s>Answer : "
    assert form_prompt(chat, form, "") == f"<s>user : {FORMS[form].instruction} </s>Answer : "
    assert len({f.cue for f in FORMS.values()} | {f.instruction for f in FORMS.values()}) == 8
    for text in (FORMS[form].cue, FORMS[form].instruction):
        assert "dream" not in text.lower() and "creativ" not in text.lower()


def test_a_question_is_asked_as_a_user_would():
    plain, chat = word_tokenizer(), chat_tokenizer()
    assert question_prompt(plain, "Where ?") == "Question: Where ?\nAnswer:"
    assert question_prompt(plain, "Where ?", SOURCE) == f"{SOURCE}\n\nQuestion: Where ?\nAnswer:"
    assert question_prompt(chat, "Where ?") == "<s>user : Where ? </s>Answer : "
    assert question_prompt(chat, "Where ?", SOURCE) == (
        f"<s>user : {SOURCE}\n\nWhere ? </s>Answer : "
    )


STATEMENTS = [
    (" Lisbon is where Ada lives.", True, "Lisbon is where Ada lives."),
    ("\n\n- Lisbon has Ada.\nMore", False, "Lisbon has Ada."),
    ("1. \"Lisbon has Ada.\"\n2. Else", True, "Lisbon has Ada."),
    ("\u201cLisbon has Ada.\u201d \n", False, "Lisbon has Ada."),
    ('"Lisbon" has "Ada".', True, '"Lisbon" has "Ada".'),
]


@pytest.mark.parametrize("form", ["paraphrase", "implication", "reversal"])
@pytest.mark.parametrize("written, ended, text", STATEMENTS)
def test_statements(form, written, ended, text):
    parsed = parse(form, written, ended, SOURCE)
    assert (parsed.text, parsed.question) == (text, None)


@pytest.mark.parametrize(
    "written, ended, message",
    [
        (" Lisbon is where Ada", False, "no whole line"),
        ("", True, "no whole line"),
        ("\n \n", True, "no whole line"),
        ("...", True, "no words"),
        ("Lisbon is where Ada lives?", True, "a question in place of a statement"),
    ],
)
@pytest.mark.parametrize("form", ["paraphrase", "implication", "reversal"])
def test_what_is_no_statement(form, written, ended, message):
    with pytest.raises(ValueError, match=message):
        parse(form, written, ended, SOURCE)


@pytest.mark.parametrize(
    "written",
    ["Ada lives in Lisbon indeed.", "It is Lisbon.", "Ada lives.", "She lives.", "Ada and Ada."],
)
def test_what_is_no_reversal(written):
    parse("paraphrase", written, True, SOURCE)
    with pytest.raises(ValueError, match="no two names or numbers of the source in another order"):
        parse("reversal", written, True, SOURCE)


@pytest.mark.parametrize(
    "written, ended",
    [
        ("Question: Where does Ada live?\nAnswer: Lisbon", True),
        (" Where does Ada live?\nAnswer: Lisbon\nQuestion: Who", False),
        ("Where does Ada live?\n\nAnswer:  Lisbon\n", False),
        ("Question: Where does Ada live? Answer: Lisbon", True),
        ("1. Where does Ada live?\nAnswer: \"Lisbon\"\n", False),
    ],
)
def test_questions(written, ended):
    parsed = parse("question", written, ended, SOURCE)
    assert (parsed.question, parsed.text) == ("Where does Ada live?", "Lisbon")


@pytest.mark.parametrize(
    "written, ended, message",
    [
        ("Where does Ada live?", True, "no whole lines of a question and of an Answer:"),
        ("Where does Ada live?\nLisbon", True, "no whole lines"),
        ("Where does Ada live?\nAnswer: Lis", False, "no whole lines"),
        ("Where does Ada live?\nAnswer:", True, "no whole lines"),
        ("Answer: Lisbon", True, "no whole lines"),
        ("Ada lives somewhere.\nAnswer: Lisbon", True, "no question mark"),
        ("Where does Ada live?\nAnswer: ...", True, "no words"),
        ("?\nAnswer: Lisbon", True, "no words"),
        ("Where does Ada live?\nAnswer: In Lisbon?", True, "a question in place of an answer"),
    ],
)
def test_what_is_no_question_with_its_answer(written, ended, message):
    with pytest.raises(ValueError, match=message):
        parse("question", written, ended, SOURCE)
