"""What is asked at the gate of a sleep over experience, and how many answers are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybrid_sleep.parametric.dreams.forms import question_prompt
from hybrid_sleep.parametric.experience.context import Prompt, ids_of
from hybrid_sleep.parametric.measure import ask, greedy, mentions
from hybrid_sleep.sleep.cache import SleepCache

ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """Something to be asked about an experience, in words or in ids (see `CachedContext`); source:
    the text, or the cache, that has the answer."""

    question: Prompt
    answer: Prompt
    source: str | SleepCache


def answered(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], *, with_source: bool = False
) -> float | None:
    """The share of `questions` that `model` answers, greedily; None of none."""
    if not questions:
        return None
    right = 0
    words = [
        (str(x.question), str(x.answer), x.source) for x in questions if isinstance(x.source, str)
    ]
    prompts = [
        question_prompt(tokenizer, question, source if with_source else "")
        for question, _, source in words
    ]
    replies = ask(model, tokenizer, prompts, tokens=ANSWER_TOKENS)
    right += sum(mentions(reply, of[1]) for reply, of in zip(replies, words, strict=True))
    for cache in dict.fromkeys(x.source for x in questions if not isinstance(x.source, str)):
        own = [x for x in questions if x.source is cache]
        for tokens, some in _by_length(own).items():
            rows = [ids_of(tokenizer, x.question) for x in some]
            said_now = greedy(
                model, tokenizer, rows, tokens=tokens, cache=cache if with_source else None
            )
            right += sum(_is_right(tokenizer, *of) for of in zip(said_now, some, strict=True))
    return right / len(questions)


def _by_length(questions: Sequence[Question]) -> dict[int, list[Question]]:
    """By how many tokens a reply to them may have."""
    found: dict[int, list[Question]] = {}
    for x in questions:
        tokens = ANSWER_TOKENS if isinstance(x.answer, str) else len(x.answer)
        found.setdefault(tokens, []).append(x)
    return found


def _is_right(tokenizer: Any, reply: Sequence[int], asked: Question) -> bool:
    if isinstance(asked.answer, str):
        return mentions(tokenizer.decode(reply, skip_special_tokens=True), asked.answer)
    return list(reply) == list(asked.answer)
