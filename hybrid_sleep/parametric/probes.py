"""What a memory is tested with: its facts in several wordings, what the model knew, other text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrid_sleep.parametric.facts import SLOT, Fact, Relation
from hybrid_sleep.parametric.gate import Measured
from hybrid_sleep.parametric.measure import (
    ask,
    chat_prompt,
    mentions,
    read,
    right_padded,
    states,
)
from hybrid_sleep.parametric.sites import frozen

# By kind: the texts of a relation, and whether they are asked in a chat.
KINDS = {
    "statement": ("statements", False),
    "question": ("questions", True),
    "held_out": ("held_out", False),
    "held_out_question": ("held_out_questions", True),
}
EDITED, HELD_OUT = ("statement", "question"), ("held_out", "held_out_question")
SPARE_TOKENS = 4
REPLY_TOKENS = 20

Audit = dict[str, bool]


def audit(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[tuple[Fact, Relation]],
    *,
    every: bool = False,
    prompt: Callable[[str, bool], str] | None = None,
    **generate: Any,
) -> list[Audit]:
    """For each fact, by kind of text, whether greedy decoding answers it; never teacher-forced.

    The first text of each kind is asked, with `every` all of them, each under "KIND I". A statement
    must go on with the object, a chat's reply must have it in it. "negation" is whether the object
    completes the fact's negation, which it should not.
    prompt: what the model is given for a text, and whether it is asked in a chat; None: the text,
    or a user's turn.
    """
    if prompt is None:
        prompt = lambda text, chat: chat_prompt(tokenizer, text) if chat else text  # noqa: E731
    asked: list[tuple[int, str, str, str, bool]] = []
    for i, (fact, relation) in enumerate(facts):
        for kind, (name, chat) in KINDS.items():
            texts = getattr(relation, name)
            for j, text in enumerate(texts if every else texts[:1]):
                words = prompt(text.replace(SLOT, fact.subject), chat)
                asked.append((i, f"{kind} {j}" if every else kind, words, fact.object, chat))
        if relation.negation is not None:
            words = prompt(relation.negation.replace(SLOT, fact.subject), False)
            asked.append((i, "negation", words, fact.object, False))
    found: list[Audit] = [{} for _ in facts]
    for chat in (False, True):
        part = [one for one in asked if one[-1] == chat]
        longest = max(
            (len(tokenizer(x[3], add_special_tokens=False)["input_ids"]) for x in part), default=0
        )
        # A reply may say the name, and more, before it comes to the object.
        tokens = longest + (SPARE_TOKENS + REPLY_TOKENS if chat else SPARE_TOKENS)
        texts = ask(model, tokenizer, [x[2] for x in part], tokens=tokens, **generate)
        right = mentions if chat else states
        for (i, kind, _, answer, _), text in zip(part, texts, strict=True):
            found[i][kind] = right(text, answer)
    return found


def is_healthy(result: Audit) -> bool:
    """Whether a fact is answered in all of the words that it was written with."""
    return all(right for kind, right in result.items() if kind.split()[0] in EDITED)


def shares(results: Sequence[Audit]) -> dict[str, float | None]:
    """Mean over facts: `recall` (of the words of the edit), `paraphrase`, `negation`."""

    def mean(kinds: Sequence[str]) -> float | None:
        per = [
            sum(own) / len(own)
            for result in results
            if (own := [right for kind, right in result.items() if kind.split()[0] in kinds])
        ]
        return sum(per) / len(per) if per else None

    return {
        "recall": mean(EDITED),
        "paraphrase": mean(HELD_OUT),
        "negation": mean(("negation",)),
    }


@dataclass(frozen=True)
class Probes:
    """What must stay as it is.

    known: pairs (prompt, answer); a prompt is a text, or what `chat_prompt` makes of a question.
        Those that the pristine model answers are what locality is measured on.
    rows: ids of ordinary text, in no statistics. Without `known`, locality is the share of their
        tokens for which the model's first guess is that of the pristine one.
    """

    known: tuple[tuple[str, str], ...]
    rows: tuple[tuple[int, ...], ...]

    def digest(self) -> str:
        """A digest of all of it."""
        return hashlib.sha256(json.dumps([self.known, self.rows]).encode()).hexdigest()


@dataclass(frozen=True)
class Baseline:
    """What the pristine model says to `Probes`: which of `known` it answers, the perplexity and the
    calibration error of the rows, and its guesses where they are needed."""

    answered: list[int]
    perplexity: float
    guesses: list[list[int]]
    calibration_error: float

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, probes: Probes) -> Baseline:
        """Measured on `model`, which has the pristine weights now."""
        right = _answered(model, tokenizer, probes, range(len(probes.known)))
        guesses = [] if probes.known else _guesses(model, probes.rows)
        found = read(model, probes.rows)
        return cls(right, found.perplexity, guesses, found.calibration_error)


def locality(model: nn.Module, tokenizer: Any, probes: Probes, baseline: Baseline) -> float:
    """The share of what the pristine model said that `model` says as well."""
    if probes.known:
        if not baseline.answered:
            raise ValueError("known must have something that the pristine model answers, got none")
        still = _answered(model, tokenizer, probes, baseline.answered)
        return len(still) / len(baseline.answered)
    now = _guesses(model, probes.rows)
    pairs = [
        pair for a, b in zip(now, baseline.guesses, strict=True) for pair in zip(a, b, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def measure(
    model: nn.Module,
    tokenizer: Any,
    results: Sequence[Audit],
    probes: Probes,
    baseline: Baseline,
) -> Measured:
    """All that the gate looks at; `results`: of `audit` on the facts, with `model` as it is."""
    now = read(model, probes.rows)
    return Measured(
        **shares(results),
        locality=locality(model, tokenizer, probes, baseline),
        perplexity_ratio=now.perplexity / baseline.perplexity,
        calibration=now.calibration_error - baseline.calibration_error,
    )


def _answered(model: nn.Module, tokenizer: Any, probes: Probes, which: Sequence[int]) -> list[int]:
    texts = ask(model, tokenizer, [probes.known[i][0] for i in which], tokens=REPLY_TOKENS)
    return [i for i, text in zip(which, texts, strict=True) if mentions(text, probes.known[i][1])]


@torch.no_grad()
def _guesses(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    device = next(model.parameters()).device
    found = []
    with frozen(model):
        for row in rows:
            ids, mask = right_padded([row], device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            found.append(logits[0, :-1].argmax(-1).tolist())
    return found
