"""The token sequences in which a fact is written: prompts, where its key is read, the target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_sleep.parametric.facts import SLOT, Fact, Relation
from hybrid_sleep.parametric.measure import chat_prompt, encode

POSITIONS = ("subject_last", "prompt_last")


@dataclass(frozen=True)
class Context:
    """A prompt with its target behind it.

    ids: of both; at: the tokens whose keys hold the fact, wherever the prompt has its subject;
    target: where the target begins. A text without target, in which the model is to stay as it is,
    has `target == len(ids)`.
    """

    ids: tuple[int, ...]
    at: tuple[int, ...]
    target: int


def context(
    tokenizer: Any, prompt: str, subject: str, answer: str, position: str = "subject_last"
) -> Context:
    """`prompt`, which has `subject` in it, continued by `answer` ("" for none).

    Raises ValueError for an answer that tokenises to nothing and a subject that is not found.
    """
    ends = [match.end() for match in re.finditer(re.escape(subject), prompt)]
    if not ends:
        raise ValueError(f"prompt must have the subject {subject!r} in it, got {prompt!r}")
    before = encode(tokenizer, prompt)
    ids = encode(tokenizer, prompt + answer) if answer else before
    # A token may reach over the border between prompt and answer; it belongs to the answer.
    pairs = zip(before, ids, strict=False)
    shortest = min(len(before), len(ids))
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
    if answer and (len(ids) <= shared or not answer.strip()):
        raise ValueError(f"object must tokenise to something behind {prompt!r}, got {answer!r}")
    if position == "prompt_last":
        return Context(tuple(ids), (shared - 1,), shared)
    lengths = [len(encode(tokenizer, prompt[:end])) for end in ends]
    return Context(tuple(ids), tuple(min(n, shared) - 1 for n in lengths), shared)


def edit_contexts(
    tokenizer: Any,
    fact: Fact,
    relation: Relation,
    *,
    prefixes: Sequence[str] = (),
    statements: int | None = None,
    questions: int | None = None,
    position: str = "subject_last",
) -> list[Context]:
    """The contexts that `fact` is written in.

    The first `statements` of the relation (None: all); the first of them once more behind each of
    `prefixes`; the first `questions` as a user's turn of a chat, each answered by a statement.
    """
    texts = [text.replace(SLOT, fact.subject) for text in relation.statements]
    prompts = texts[:statements] + [prefix + texts[0] for prefix in prefixes]
    for i, text in enumerate(relation.questions[:questions]):
        asked = chat_prompt(tokenizer, text.replace(SLOT, fact.subject))
        prompts.append(asked + texts[i % len(texts)])
    return [
        context(tokenizer, prompt, fact.subject, f" {fact.object}", position) for prompt in prompts
    ]
