"""What is measured of a model that was taught facts, at one moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hybrid_sleep.eval.facts.subjects import Subject
from hybrid_sleep.parametric.facts import SLOT, Fact
from hybrid_sleep.parametric.files import PRISTINE
from hybrid_sleep.parametric.measure import ask, chat_prompt, mentions, perplexity, states
from hybrid_sleep.parametric.probes import Audit, Baseline, Probes, audit, locality
from hybrid_sleep.parametric.workspace import BASELINE

# By what is reported, the kinds of text that it is the share of; the first text of a kind is what
# every edit is written in, but for the earlier system's, which knows no chat.
RECALL = ("statement 0", "question 0")
STATED, CHAT = ("statement 0",), ("question 0",)
PARAPHRASE, CHAT_PARAPHRASE = "held_out", "held_out_question"
YES, NO, ABSENT = "1", "0", "-"
STATED_TOKENS, REPLY_TOKENS = 4, 16


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a model answers after a `stage`, and what it still knows.

    facts: how many it was taught. answers: of those that it was taught, or before that of all that
    it will be, by kind of text, a character a fact:
    answered, not answered, or no such text. changed: norm of the change in norms of the weight,
    None where no weight is edited. bytes: of the store, without the pristine weights and
    statistics. seconds: a fact learned since the point before, or of the sleep. outcome: of a
    sleep, and why.
    """

    stage: str
    facts: int
    answers: dict[str, str]
    locality: float
    perplexity_ratio: float
    changed: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    outcome: str = ""

    def share(self, *kinds: str) -> float | None:
        """The mean over facts of the share of texts of `kinds` that are answered.

        A kind without a number stands for all texts of it. None if no fact has any.
        """
        names = [name for name in self.answers if name in kinds or name.split()[0] in kinds]
        per = []
        for marks in zip(*(self.answers[name] for name in names), strict=True):
            asked = [mark for mark in marks if mark != ABSENT]
            if asked:
                per.append(asked.count(YES) / len(asked))
        return sum(per) / len(per) if per else None

    @property
    def recall(self) -> float | None:
        """Of the first statement and the first question."""
        return self.share(*RECALL)

    @property
    def paraphrase(self) -> float | None:
        """Of all texts that no edit sees."""
        return self.share(PARAPHRASE, CHAT_PARAPHRASE)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a model says about a fact that was updated or deleted, after a `stage`.

    fact: as it was taught first; new: its object now, None if it was deleted. says_new, says_old:
    shares of its texts, all but the negation, that are answered with either object. as_before:
    share of replies that are, to the letter, those of the pristine model.
    """

    stage: str
    fact: str
    new: str | None
    says_new: float | None
    says_old: float
    as_before: float


@dataclass(frozen=True)
class Knowledge:
    """What the pristine model says: of what it may know, of ordinary text."""

    probes: Probes
    baseline: Baseline


def answers_of(results: Sequence[Audit]) -> dict[str, str]:
    """Audits as `Point.answers`."""
    kinds = sorted({kind for result in results for kind in result})
    marks = {True: YES, False: NO, None: ABSENT}
    return {kind: "".join(marks[result.get(kind)] for result in results) for kind in kinds}


def look(
    stage: str,
    model: nn.Module,
    subject: Subject,
    facts: Sequence[Fact],
    knowledge: Knowledge,
    prompt: Callable[[str, bool], str] | None = None,
    *,
    taught: int,
    **more: Any,
) -> Point:
    """The point of `model` now, asked about `facts`, `taught` so many; prompt: see `audit`."""
    words = {relation.name: relation for relation in subject.relations}
    pairs = [(fact, words[fact.relation]) for fact in facts]
    results = audit(model, subject.tokenizer, pairs, every=True, prompt=prompt)
    probes = knowledge.probes if prompt is None else probes_of(subject, prompt)
    return Point(
        stage=stage,
        facts=taught,
        answers=answers_of(results),
        locality=locality(model, subject.tokenizer, probes, knowledge.baseline),
        perplexity_ratio=perplexity(model, probes.rows) / knowledge.baseline.perplexity,
        **more,
    )


def probes_of(subject: Subject, prompt: Callable[[str, bool], str] | None = None) -> Probes:
    """What `subject` may know, asked through `prompt`, and its ordinary text."""
    return Probes(
        tuple(known_pairs(subject, prompt)), tuple(tuple(row) for row in subject.ordinary)
    )


def known_pairs(
    subject: Subject, prompt: Callable[[str, bool], str] | None = None
) -> list[tuple[str, str]]:
    """Pairs (prompt, answer) of what `subject` may know."""

    def plain(text: str, chat: bool) -> str:
        return chat_prompt(subject.tokenizer, text) if chat else text

    return [((prompt or plain)(k.prompt, k.chat), k.answer) for k in subject.known]


def replies(model: nn.Module, subject: Subject, fact: Fact) -> list[tuple[bool, str]]:
    """What `model` says to each text of `fact`, the negation excepted; whether in a chat."""
    relation = next(r for r in subject.relations if r.name == fact.relation)
    size = len(subject.tokenizer(fact.object, add_special_tokens=False)["input_ids"])
    found = []
    for chat, texts, spare in (
        (False, (*relation.statements, *relation.held_out), STATED_TOKENS),
        (True, (*relation.questions, *relation.held_out_questions), REPLY_TOKENS),
    ):
        filled = [text.replace(SLOT, fact.subject) for text in texts]
        prompts = [chat_prompt(subject.tokenizer, text) if chat else text for text in filled]
        said = ask(model, subject.tokenizer, prompts, tokens=size + spare)
        found += [(chat, text) for text in said]
    return found


def change_of(
    stage: str,
    model: nn.Module,
    subject: Subject,
    fact: Fact,
    new: str | None,
    pristine: Sequence[tuple[bool, str]],
) -> Change:
    """How `model` speaks of `fact` now; `pristine`: `replies` of the pristine model."""
    now = replies(model, subject, fact)

    def says(value: str) -> float:
        right = [(mentions if chat else states)(text, value) for chat, text in now]
        return sum(right) / len(right)

    same = [a == b for a, b in zip(now, pristine, strict=True)]
    return Change(
        stage=stage,
        fact=str(fact),
        new=new,
        says_new=None if new is None else says(new),
        says_old=says(fact.object),
        as_before=sum(same) / len(same),
    )


def bytes_of(folder: Path) -> int:
    """Of the store in `folder`: facts, edits and what is known of them."""
    return sum(
        path.stat().st_size
        for path in folder.iterdir()
        if path.is_file() and path.name not in (PRISTINE, BASELINE)
    )
