"""A model writes its dreams: of experiences, and freely."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from hybrid_sleep.parametric.dreams.dream import RETENTION, Check, Dream, Source, check_sources
from hybrid_sleep.parametric.dreams.examine import RULES, Draft, Rules, examine
from hybrid_sleep.parametric.dreams.forms import FORMS, form_prompt
from hybrid_sleep.parametric.dreams.novel import Seen
from hybrid_sleep.parametric.facts import Relation
from hybrid_sleep.parametric.measure import encode, user_turn
from hybrid_sleep.parametric.sampling import SAMPLED_AT_ONCE, continuations
from hybrid_sleep.parametric.statistics import SAMPLE_LENGTH, own_samples
from hybrid_sleep.sleep.weights import weights_digest
from hybrid_sleep.validation import check_choice, check_count

FREE, TURN = "free", "turn"


def write_drafts(
    model: nn.Module,
    tokenizer: Any,
    sources: Sequence[Source],
    *,
    forms: Sequence[str] = tuple(FORMS),
    each: int = 4,
    tokens: int = 96,
    seed: int = 0,
    at_once: int = SAMPLED_AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Draft]:
    """`each` texts of every form for every source, in that order, at temperature 1, unfiltered.

    tokens: at most, of one. A text ends at the first special token of the tokenizer, which no
    filter makes likelier. Raises ValueError, before the model runs, for an unknown form, a source
    that is a dream, and one too long for the positions that the model has.
    """
    check_count("each", each)
    check_count("tokens", tokens)
    check_sources(sources)
    for form in forms:
        check_choice("forms", form, tuple(FORMS))
    asked = [(source, form) for source in sources for form in forms for _ in range(each)]
    begun = [encode(tokenizer, form_prompt(tokenizer, form, source.text)) for source, form in asked]
    limit = getattr(model.config, "max_position_embeddings", None)
    for (source, _), ids in zip(asked, begun, strict=True):
        if limit is not None and len(ids) + tokens > limit:
            raise ValueError(
                f"source {source.id!r} must leave room for {tokens} tokens of the {limit} that the "
                f"model has positions for, got {len(ids)} with what is asked; split it"
            )
    written = continuations(
        model, tokenizer, begun, tokens, seed=seed, at_once=at_once, progress=progress
    )
    ends = set(tokenizer.all_special_ids)
    drafts = []
    for (source, form), ids in zip(asked, written, strict=True):
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = tokenizer.decode(ids[:length])
        drafts.append(Draft(source, form, text, ended=length < len(ids)))
    return drafts


def acquire(
    model: nn.Module,
    tokenizer: Any,
    sources: Sequence[Source],
    *,
    rules: Rules = RULES,
    relations: Iterable[Relation] = (),
    earlier: Sequence[Dream] = (),
    seed: int = 0,
    **draft: Any,
) -> list[Dream]:
    """Acquisition dreams of `sources`, rejected ones among them: `write_drafts`, then `examine`.

    earlier: dreams of other calls, of which none may be a source or come again.
    """
    check_sources(sources, earlier)
    drafts = write_drafts(model, tokenizer, sources, seed=seed, **draft)
    return examine(
        model, tokenizer, drafts, rules=rules, relations=relations, earlier=earlier, seed=seed
    )


def retain(
    model: nn.Module,
    tokenizer: Any,
    tokens: int,
    *,
    form: str = FREE,
    length: int = SAMPLE_LENGTH,
    rules: Rules = RULES,
    earlier: Sequence[Dream] = (),
    seed: int = 0,
    **sample: Any,
) -> list[Dream]:
    """Retention dreams, about `tokens` tokens in all, each of `length`: for KL to this very model.

    form: "free" begins with the tokenizer's first token, "turn" behind what opens a user's turn, so
    that a chat model writes a question and its reply. Dreams nearly the same as one kept before are
    rejected, and such as hold fewer than `rules.least` tokens that are not special. Raises
    ValueError for "turn" without a chat template.
    """
    check_choice("form", form, (FREE, TURN))
    turn = user_turn(tokenizer) if form == TURN else []
    if form == TURN and not turn:
        raise ValueError("form must be 'free' for a tokenizer without chat template, got 'turn'")
    behind = [turn] if turn else []
    rows = own_samples(model, tokenizer, tokens, length=length, behind=behind, seed=seed, **sample)
    weights, special = weights_digest(model), set(tokenizer.all_special_ids)
    seen = Seen(rules.ngram)
    for dream in earlier:
        if dream.kept and dream.kind == RETENTION:
            seen.add(dream.id, dream.text)
    made = []
    for number, row in enumerate(rows):
        start = len(turn) or 1
        own = sum(token not in special for token in row[start:])
        text = tokenizer.decode(row[start:], skip_special_tokens=True)
        fits = own >= rules.least
        checks = [Check("length", fits, own, "" if fits else f"{own} tokens")]
        if fits:
            value, name = seen.nearest(text)
            alike = value > rules.similarity
            checks.append(Check("unique", not alike, value, f"as {name}" if alike else ""))
        dream = Dream(
            kind=RETENTION,
            form=form,
            text=text,
            ids=tuple(row),
            start=start,
            sources=(),
            weights=weights,
            seed=seed,
            number=number,
            checks=tuple(checks),
        )
        if dream.kept:
            seen.add(dream.id, text)
        made.append(dream)
    return made
