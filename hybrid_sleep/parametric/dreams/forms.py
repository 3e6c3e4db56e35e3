"""The forms in which a model says an experience again: what it is given, and how that is parsed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hybrid_sleep.parametric.dreams.claims import order_of_claims
from hybrid_sleep.parametric.measure import chat_prompt

PARAPHRASE, IMPLICATION, QUESTION, REVERSAL = "paraphrase", "implication", "question", "reversal"


@dataclass(frozen=True)
class Form:
    """instruction: of a chat model. cue: what a model without a chat template goes on from."""

    name: str
    instruction: str
    cue: str


FORMS = {
    form.name: form
    for form in (
        Form(PARAPHRASE, "Say the same in other words, in one sentence.", "In other words:"),
        Form(IMPLICATION, "Write one sentence that follows from this.", "It follows from this:"),
        Form(
            QUESTION,
            'Write one question about this and its answer, on two lines that begin with "Question:"'
            ' and "Answer:".',
            "Question:",
        ),
        Form(
            REVERSAL,
            "Say the same in one sentence, the other way round: begin with what comes last.",
            "The same, beginning with what comes last:",
        ),
    )
}


@dataclass(frozen=True)
class Parsed:
    """text: the statement or the answer; question: what the answer is to, None for a statement."""

    text: str
    question: str | None = None


def form_prompt(tokenizer: Any, form: str, source: str) -> str:
    """What a dream of `form` is written behind; `source`: its text, "" for the same without it."""
    above = f"{source}\n\n" if source else ""
    if getattr(tokenizer, "chat_template", None) is None:
        return above + FORMS[form].cue
    return chat_prompt(tokenizer, above + FORMS[form].instruction)


def question_prompt(tokenizer: Any, question: str, source: str = "") -> str:
    """`question` as a user's turn, behind the text `source` if there is any."""
    above = f"{source}\n\n" if source else ""
    if getattr(tokenizer, "chat_template", None) is None:
        return above + chat_prompt(tokenizer, question)
    return chat_prompt(tokenizer, above + question)


def parse(form: str, written: str, ended: bool, source: str) -> Parsed:
    """What of `written` is the dream; ended: whether the model ended the text by itself there.

    A statement is the first line, a question and its answer one line each. Raises ValueError for
    what is not in the form: no words, a line cut off by the limit of tokens, a statement that asks
    or a question that does not, no "Answer:", a reversal that has nothing of the source in
    another order.
    """
    lines = [_clean(line) for line in written.strip().split("\n")]
    whole = lines if ended or written.rstrip(" ").endswith("\n") else lines[:-1]
    whole = [line for line in whole if line]
    if form == QUESTION:
        return _question(whole)
    if not whole:
        raise ValueError("no whole line")
    text = whole[0]
    if not any(map(str.isalpha, text)):
        raise ValueError("no words")
    if text.endswith("?"):
        raise ValueError("a question in place of a statement")
    if form == REVERSAL:
        places = order_of_claims(text, source)
        if all(a <= b for a, b in zip(places, places[1:], strict=False)):
            raise ValueError("no two names or numbers of the source in another order")
    return Parsed(text)


def _question(lines: list[str]) -> Parsed:
    # One line with both counts as two.
    text = re.sub(r"[ \n]+Answer ?:", "\nAnswer:", "\n".join(lines))
    found = re.match(r"(?:Question ?:)? *([^\n]+)\nAnswer: *([^\n]+)", text)
    if found is None:
        raise ValueError("no whole lines of a question and of an Answer:")
    question, answer = map(_clean, found.groups())
    if not question.endswith("?"):
        raise ValueError("no question mark at the end of the question")
    if not any(map(str.isalnum, answer)) or not any(map(str.isalpha, question)):
        raise ValueError("no words")
    if answer.endswith("?"):
        raise ValueError("a question in place of an answer")
    return Parsed(answer, question)


def _clean(line: str) -> str:
    """`line` without the mark of a list and the quotes around it."""
    line = re.sub(r"^\s*(?:[-*\u2022]|\d+[.)])\s+", "", line).strip()
    quoted = re.fullmatch(r"[\"\u201c]([^\"\u201c\u201d]+)[\"\u201d]", line)
    return quoted[1].strip() if quoted else line
