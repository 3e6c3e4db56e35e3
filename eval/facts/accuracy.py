"""How well a model of the small world states facts, by wording, slept windows and sleep depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hybrid_sleep.eval.facts.world import World
from hybrid_sleep.parametric.facts import SLOT, Fact
from hybrid_sleep.validation import check_count

KINDS = ("statement", "held_out", "question", "held_out_question", "negation")
ROWS = 128  # at a time


def prompts(tokenizer: Any, world: World, fact: Fact) -> list[tuple[str, str]]:
    """Pairs (one of `KINDS`, text that the object of `fact` completes)."""
    relation = world.relations[fact.relation]
    assert relation.negation is not None
    texts = [("statement", text) for text in relation.statements]
    texts += [("held_out", text) for text in relation.held_out]
    texts += [("negation", relation.negation)]
    for kind, questions in (
        ("question", relation.questions),
        ("held_out_question", relation.held_out_questions),
    ):
        for question in questions:
            turn = {"role": "user", "content": question}
            chat = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
            texts.append((kind, chat))
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
    import torch

    check_count("windows", windows, minimum=0)
    check_count("facts", len(facts))
    length = windows * model.config.window
    # By the number of tokens in prompt and object, so that no row needs padding.
    groups = defaultdict(list)
    for i, fact in enumerate(facts):
        before = world.filler(length, i, without=[fact.subject]) if length else ""
        answer = tokenizer(fact.object).input_ids
        for kind, text in prompts(tokenizer, world, fact):
            ids = tokenizer(f"{before} {text}").input_ids
            groups[len(ids), len(answer)].append((kind, ids + answer))
    right = defaultdict(list)
    for (_, answered), rows in groups.items():
        for start in range(0, len(rows), ROWS):
            kinds, ids = zip(*rows[start : start + ROWS], strict=True)
            tokens = torch.tensor(ids, device=model.device)
            with torch.no_grad():
                logits = model(tokens, sleep_passes=passes, use_cache=False).logits
            guess = logits[:, -answered - 1 : -1].argmax(-1)
            for kind, hit in zip(kinds, (guess == tokens[:, -answered:]).all(1), strict=True):
                right[kind].append(bool(hit))
    return {kind: sum(right[kind]) / len(right[kind]) for kind in KINDS}
