"""How well a model of the small world states facts, by wording, slept windows and sleep depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hybrid_sleep.eval.facts.world import World
from hybrid_sleep.parametric.facts import SLOT, Fact
from hybrid_sleep.parametric.measure import ask, chat_prompt, states
from hybrid_sleep.validation import check_count

KINDS = ("statement", "held_out", "question", "held_out_question", "negation")
LONGEST = 2  # tokens of an object
ROWS = 128  # at a time


def prompts(tokenizer: Any, world: World, fact: Fact) -> list[tuple[str, str]]:
    """Pairs (one of `KINDS`, text that the object of `fact` completes)."""
    relation = world.relations[fact.relation]
    assert relation.negation is not None
    texts = [("statement", text) for text in relation.statements]
    texts += [("held_out", text) for text in relation.held_out]
    texts += [("question", chat_prompt(tokenizer, text)) for text in relation.questions]
    texts += [
        ("held_out_question", chat_prompt(tokenizer, text)) for text in relation.held_out_questions
    ]
    texts += [("negation", relation.negation)]
    return [(kind, text.replace(SLOT, fact.subject)) for kind, text in texts]


def accuracy(
    model: Any,
    tokenizer: Any,
    world: World,
    facts: Sequence[Fact],
    *,
    windows: int = 0,
    passes: int = 1,
) -> dict[str, float]:
    """The share of `facts` that greedy decoding completes with the whole object, by `KINDS`.

    windows: of text about other people that the model reads first, each followed by a sleep of
    `passes`. Of a negation, the share that is completed with the object that it denies. Raises
    ValueError for no facts.
    """
    check_count("windows", windows, minimum=0)
    check_count("facts", len(facts))
    length = windows * model.config.window
    asked = [
        (kind, f"{before} {text}".strip(), fact.object)
        for i, fact in enumerate(facts)
        for before in [world.filler(length, i, without=[fact.subject]) if length else ""]
        for kind, text in prompts(tokenizer, world, fact)
    ]
    texts = [text for _, text, _ in asked]
    said = ask(model, tokenizer, texts, tokens=LONGEST, at_once=ROWS, sleep_passes=passes)
    right = defaultdict(list)
    for (kind, _, value), answer in zip(asked, said, strict=True):
        right[kind].append(states(answer, value))
    return {kind: sum(right[kind]) / len(right[kind]) for kind in KINDS}
