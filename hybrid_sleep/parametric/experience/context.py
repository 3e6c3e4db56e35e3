"""What a model is asked with a text in its context, or in a cache in its place, and then says."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybrid_sleep.parametric.dreams.forms import question_prompt
from hybrid_sleep.parametric.measure import encode, greedy
from hybrid_sleep.parametric.mix import Row
from hybrid_sleep.parametric.sampling import continuations
from hybrid_sleep.parametric.statistics import first_token
from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.sleep.weights import Owner, weights_digest
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.training.ranks import ranks
from hybrid_sleep.validation import check_count

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class CachedContext:
    """A text that a model has read and may have slept over, as the cache holds it.

    cache: of one row; only read, and not kept. prompts: what the model is asked with it for a
    sleep to learn from; none: it writes on from the cache by itself. questions: (question, answer),
    asked at the gate alone. All are texts, asked as a user's turn of a chat, or token ids, taken as
    they are: an answer in ids is right where the model goes on with just these, one in words where
    it says them.

    Raises ValueError for another kind of cache, an empty prompt or answer, and a question in
    words with an answer in ids or the other way round.
    """

    cache: SleepCache
    prompts: Sequence[Prompt] = ()
    questions: Sequence[tuple[Prompt, Prompt]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.cache, SleepCache):
            raise ValueError(f"cache must be a SleepCache, got {type(self.cache).__name__}")
        for name, given in (
            ("prompts", self.prompts),
            ("questions", [x for pair in self.questions for x in pair]),
        ):
            _check_sequence(name, given)
            for one in given:
                _check_prompt(name, one)
        for question, answer in self.questions:
            if isinstance(question, str) is not isinstance(answer, str):
                raise ValueError(
                    "questions must have question and answer both in words or both in ids, got "
                    f"{(question, answer)!r}"
                )


def _check_sequence(name: str, given: Sequence[Prompt]) -> None:
    if isinstance(given, str):
        raise ValueError(f"{name} must be a sequence of prompts, got the text {given!r}")


def _check_prompt(name: str, one: Prompt) -> None:
    if not len(one) or (isinstance(one, str) and not one.strip()):
        raise ValueError(f"{name} must be of at least a word or a token, got {one!r}")
    for token in () if isinstance(one, str) else one:
        check_count(f"token id in {name}", token, minimum=0)


def check_prompts(prompts: Mapping[int, Sequence[str]], waiting: Collection[int]) -> None:
    """Raise ValueError unless each is of words, and of an experience that waits for a sleep."""
    for number, given in prompts.items():
        if number not in waiting:
            raise ValueError(
                f"prompts must be of experiences that wait, {sorted(waiting)}, got {number!r}"
            )
        _check_sequence("prompts", given)
        for one in given:
            if not isinstance(one, str) or not one.strip():
                raise ValueError(f"prompts must be of at least a word, got {one!r}")


def check_contexts(model: Any, contexts: Sequence[CachedContext]) -> None:
    """Raise ValueError unless each is of one row, finite, and of the weights that `model` has, in a
    process of its own."""
    if contexts and ranks() > 1:
        raise ValueError(f"caches must be slept over in one process, got {ranks()}")
    for i, one in enumerate(contexts):
        name = f"caches[{i}]"
        if not isinstance(one, CachedContext):
            raise ValueError(f"{name} must be a CachedContext, got {type(one).__name__}")
        if not hasattr(model, "memory_owner"):
            raise ValueError(f"{name} must be of a model that sleeps, got {type(model).__name__}")
        if one.cache.batch_size != 1:
            raise ValueError(
                f"{name} must hold one row that has read something, got "
                f"{max(0, one.cache.batch_size)} rows; split() takes a batch apart"
            )
        # Of a copy: the first model that a cache serves becomes its owner.
        one.cache.copy().check(model.memory_owner(), model.options, name)
        one.cache.check_finite(name)


@contextmanager
def serving(model: Any, contexts: Sequence[CachedContext]) -> Iterator[None]:
    """The caches serve `model` behind the block if its weights are then, bit for bit, those before.

    A rollback counts as a change of the weights. Without this, a sleep that was only tried would
    cost the caches that the next attempt needs.
    """
    before = weights_digest(model) if contexts else None
    try:
        yield
    finally:
        if contexts and weights_digest(model) == before:
            for one in contexts:
                one.cache.owner = Owner.of(model)


def ids_of(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """A prompt's ids; words as a user's turn."""
    if isinstance(prompt, str):
        return tuple(encode(tokenizer, question_prompt(tokenizer, prompt)))
    return tuple(int(token) for token in prompt)


def rows_behind(
    model: nn.Module,
    tokenizer: Any,
    context: CachedContext,
    *,
    samples: int,
    length: int,
    origin: str,
    seed: int = 0,
) -> list[Row]:
    """What `model` writes on from the cache: at temperature 1, with every filter off.

    samples: rows, at least one for each prompt; of prompts each has as many as another, within one.
    length: tokens written at most; a row ends behind the tokenizer's last token. Behind a prompt
    only what is written is predicted; without prompts rows begin with the tokenizer's first token.
    """
    begun = [ids_of(tokenizer, prompt) for prompt in context.prompts] or [(first_token(tokenizer),)]
    count = max(samples, len(begun))
    asked = [begun[i % len(begun)] for i in range(count)]
    written = continuations(
        model, tokenizer, asked, length, cache=context.cache, seed=derive_seed(origin, seed)
    )
    end = getattr(tokenizer, "eos_token_id", None)
    return [
        Row((*prompt, *_ended(new, end)), len(prompt), origin=origin)
        for prompt, new in zip(asked, written, strict=True)
    ]


@dataclass(frozen=True)
class Answer:
    """What a model answered about a text: `row` without it; reads: the same row with it."""

    row: Row
    reads: tuple[int, ...]


def answers_about(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, str],
    prompts: Mapping[str, Sequence[str]],
    *,
    samples: int,
    length: int,
    seed: int = 0,
) -> list[Answer]:
    """What `model` answers to `prompts`, each with the text of its name in front of it.

    Of each prompt first the likeliest answer, token by token, then others at temperature 1 with
    every filter off. samples: answers in all, at least one for each prompt; of prompts each has as
    many as another, within one. length: tokens of one at most; it ends behind the tokenizer's last
    token. An answer's origin is the name of its text.
    """
    asked = [(name, prompt) for name, given in prompts.items() for prompt in given]
    if not asked:
        return []
    alone = [ids_of(tokenizer, prompt) for _, prompt in asked]
    behind = [
        tuple(encode(tokenizer, question_prompt(tokenizer, prompt, texts[name])))
        for name, prompt in asked
    ]
    count = max(samples, len(asked))
    places = [i % len(asked) for i in range(count)]
    written = greedy(model, tokenizer, behind, tokens=length)
    more = [behind[i] for i in places[len(asked) :]]
    if more:
        written += continuations(model, tokenizer, more, length, seed=derive_seed("answers", seed))
    end = getattr(tokenizer, "eos_token_id", None)
    found = []
    for i, new in zip(places, written, strict=True):
        said = tuple(_ended(new, end))
        row = Row((*alone[i], *said), len(alone[i]), origin=asked[i][0])
        found.append(Answer(row, (*behind[i], *said)))
    return found


def _ended(new: Sequence[int], end: int | None) -> Sequence[int]:
    """Up to the first `end`, that included."""
    return new if end is None or end not in new else new[: list(new).index(end) + 1]
