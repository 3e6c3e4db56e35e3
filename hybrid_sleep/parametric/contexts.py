"""The token sequences in which a fact is written: prompts, where its key is read, the target."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_sleep.parametric.facts import SLOT, Fact, Relation
from hybrid_sleep.parametric.measure import chat_prompt, encode, opening

POSITIONS = ("subject_last", "prompt_last")
REPLIES = ("statement", "object")
# Questions of no relation: whoever asks about the subject is told the fact.
ABOUT = ("Tell me about {}.", "What do you know about {}?")


@dataclass(frozen=True)
class Context:
    """A prompt with its target behind it.

    ids: of both; at: the tokens whose keys hold the fact, wherever the text has its subject;
    target: where the target begins; object: where the object in it does, which is its end. A text
    without target, in which the model is to stay as it is, has `target == len(ids)`.
    """

    ids: tuple[int, ...]
    at: tuple[int, ...]
    target: int
    object: int


def context(
    tokenizer: Any,
    prompt: str,
    subject: str,
    answer: str,
    position: str = "subject_last",
    reply: str = "",
) -> Context:
    """`prompt` and `reply`, with `subject` in them, continued by `answer` ("" for none).

    reply: the part of the target in front of the object. Raises ValueError for an answer that
    tokenises to nothing or to what no text is decoded from, and for a subject that is not found, or
    of which the tokenizer knows no part.
    """
    text = prompt + reply
    name = re.escape(subject)
    whole = [match.end() for match in re.finditer(rf"(?<!\w){name}(?!\w)", text)]
    # A text may have it inside of a word alone, "{}s".
    ends = whole or [match.end() for match in re.finditer(name, text)]
    if not ends:
        raise ValueError(f"prompt must have the subject {subject!r} in it, got {text!r}")
    ids = encode(tokenizer, text + answer)
    start = shared(encode(tokenizer, text), ids)
    if answer and (len(ids) <= start or not answer.strip()):
        raise ValueError(f"object must tokenise to something behind {text!r}, got {answer!r}")
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids[start:]:
        raise ValueError(f"object must be of tokens that the tokenizer knows, got {answer!r}")
    target = shared(encode(tokenizer, prompt), ids) if reply else start
    if not target:
        raise ValueError(f"prompt must have a token that what follows leaves alone, got {prompt!r}")
    named = set(encode(tokenizer, subject)) - set(encode(tokenizer, "")) - {unknown}
    if not named:
        raise ValueError(f"subject must have a token that the tokenizer knows, got {subject!r}")
    if position == "prompt_last":
        at: tuple[int, ...] = (start - 1,)
    else:
        at = tuple(_last(encode(tokenizer, text[:end]), ids, start) for end in ends)
    return Context(tuple(ids), at, target, start)


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with that are the same.

    A token may reach over the border between a prompt and what follows; it belongs to the latter.
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _last(subject: Sequence[int], ids: Sequence[int], start: int) -> int:
    """Where in `ids` the text `subject` ends, before `start`: in a token that may reach over it."""
    return min(shared(subject, ids), len(subject) - 1, start - 1)


def edit_contexts(
    tokenizer: Any,
    fact: Fact,
    relation: Relation,
    *,
    prefixes: Sequence[str] = (),
    statements: int | None = None,
    questions: int | None = None,
    about: int = 0,
    position: str = "subject_last",
    reply: str = "statement",
) -> list[Context]:
    """The contexts that `fact` is written in.

    The first `statements` of the relation (None: all); the first of them once more behind each of
    `prefixes`; the first `questions` as a user's turn of a chat, with `reply` (one of `REPLIES`);
    the first `about` of `ABOUT`, with a statement as the reply.
    """
    texts = [text.replace(SLOT, fact.subject) for text in relation.statements]
    prompts = [(text, "") for text in texts[:statements]]
    prompts += [(prefix + texts[0], "") for prefix in prefixes]
    for i, text in enumerate(relation.questions[:questions]):
        asked = chat_prompt(tokenizer, text.replace(SLOT, fact.subject))
        # A reply may say the name again, which the edit at its last token must not disturb.
        prompts.append((asked, texts[i % len(texts)] if reply == "statement" else ""))
    for text in ABOUT[:about]:
        prompts.append((chat_prompt(tokenizer, text.replace(SLOT, fact.subject)), texts[0]))
    return [
        context(
            tokenizer, prompt, fact.subject, spaced(prompt + said, fact.object), position, said
        )
        for prompt, said in prompts
    ]


def beginnings(tokenizer: Any, relations: Iterable[Relation]) -> list[list[int]]:
    """Ids of what stands before the subject in the texts of `relations` that edits are made in,
    where that is more than a turn's opening; each once."""
    turn = opening(tokenizer)
    heads = {
        before + text.partition(SLOT)[0]
        for relation in relations
        for before, texts in (("", relation.statements), (turn, relation.questions))
        for text in texts
    } - {"", turn}
    # Without the space, which belongs to the next word's token.
    return [encode(tokenizer, head.rstrip()) for head in sorted(heads)]


def spaced(text: str, answer: str) -> str:
    """`answer` with the space that words need behind words, and a turn's beginning does not."""
    return answer if text[-1:].isspace() else f" {answer}"


def by_token(contexts: Sequence[Context]) -> list[tuple[Context, ...]]:
    """`contexts` of one fact, once for every token of its object, each with that as the target.

    The key is then at the token in front of it. For edits at the last token of a prompt: what a
    late block gives there says one token and reaches none behind it.
    """
    longest = max(len(c.ids) - c.object for c in contexts)
    return [
        tuple(
            Context(c.ids[: place + 1], (place - 1,), place, place)
            for c in contexts
            if (place := c.object + i) < len(c.ids)
        )
        for i in range(longest)
    ]
