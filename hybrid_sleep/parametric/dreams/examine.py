"""Every check that a dream of an experience goes through before it is learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybrid_sleep.parametric.contexts import shared, spaced
from hybrid_sleep.parametric.dreams.claims import (
    contradicts,
    names,
    negation_differs,
    numbers,
    order_of_claims,
    unsupported,
)
from hybrid_sleep.parametric.dreams.dream import ACQUISITION, Check, Dream, Source, check_sources
from hybrid_sleep.parametric.dreams.forms import Parsed, form_prompt, parse, question_prompt
from hybrid_sleep.parametric.dreams.losses import mean_losses
from hybrid_sleep.parametric.dreams.novel import NGRAM, Seen, overlap
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.measure import encode
from hybrid_sleep.sleep.weights import weights_digest
from hybrid_sleep.validation import check_count, check_number


@dataclass(frozen=True)
class Rules:
    """What a dream must keep to; the values are choices, none is published.

    margin: nats a token by which the source in context must make a dream more likely. overlap: the
    largest share of a dream's n-grams of `ngram` words that its source may have. similarity: the
    largest Jaccard similarity of n-grams to a dream that is kept. least, most: tokens of a dream,
    a question and its answer together. Raises ValueError for one out of range.
    """

    margin: float = 0.1
    overlap: float = 0.6
    similarity: float = 0.6
    ngram: int = NGRAM
    least: int = 3
    most: int = 128

    def __post_init__(self) -> None:
        check_number("margin", self.margin, least=0)
        for name in ("overlap", "similarity"):
            if check_number(name, getattr(self, name), least=0) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        check_count("ngram", self.ngram)
        check_count("most", self.most, check_count("least", self.least))


RULES = Rules()


@dataclass(frozen=True)
class Draft:
    """What a model wrote behind the prompt of `form` for `source`, not looked at yet.

    ended: whether it ended the text there, rather than reaching the limit of tokens.
    """

    source: Source
    form: str
    written: str
    ended: bool


def rows_of(
    tokenizer: Any, form: str, dream: Parsed, source: str = ""
) -> tuple[tuple[int, ...], int]:
    """Ids of `dream` behind its prompt, and where it begins; `source`: the text to have in context.

    Without a source an answer stands behind its question as a user's turn, and a statement alone.
    """
    alone = dream.question is None and not source
    prompt = "" if alone else _prompt(tokenizer, form, dream, source)
    return _behind(tokenizer, prompt, dream.text)


def _prompt(tokenizer: Any, form: str, dream: Parsed, source: str) -> str:
    if dream.question is not None:
        return question_prompt(tokenizer, dream.question, source)
    return form_prompt(tokenizer, form, source)


def _behind(tokenizer: Any, prompt: str, text: str) -> tuple[tuple[int, ...], int]:
    ids = encode(tokenizer, prompt + (spaced(prompt, text) if prompt else text))
    return tuple(ids), shared(encode(tokenizer, prompt), ids)


def gain(
    model: nn.Module,
    tokenizer: Any,
    dreams: Sequence[tuple[str, Parsed, str]],
    at_once: int = 16,
) -> list[float]:
    """Nats a token by which the source makes each of `dreams` (form, dream, source) more likely.

    The prompt is otherwise the same: the question, or what the form asks for.
    """
    rows = [
        _behind(tokenizer, _prompt(tokenizer, form, dream, above), dream.text)
        for form, dream, source in dreams
        for above in (source, "")
    ]
    found = mean_losses(model, rows, at_once)
    return [without - given for given, without in zip(found[::2], found[1::2], strict=True)]


def examine(
    model: nn.Module,
    tokenizer: Any,
    drafts: Sequence[Draft],
    *,
    rules: Rules = RULES,
    relations: Iterable[Relation] = (),
    earlier: Sequence[Dream] = (),
    seed: int = 0,
    at_once: int = 16,
) -> list[Dream]:
    """A dream for every one of `drafts`, in their order, with the checks that it went through.

    The checks, each made if those before it passed:
        form: it parses; length: in tokens; words: no name, number or quote that the source has
        not, one of its names or numbers if it has any, and no negation more or less; facts: none
        of the source's facts with another object; novel: no copy of the source; grounded: more
        likely with the source in context; unique: no near-duplicate of a dream kept before it, here
        or in `earlier`.
    relations: the words of the facts' relations; plain ones where a relation is not among them.
    seed: that the drafts were made with. Raises ValueError, before the model runs, for a source
    that is a dream.
    """
    check_sources(list(dict.fromkeys(draft.source for draft in drafts)), earlier)
    weights = weights_digest(model)
    named = {relation.name.casefold(): relation for relation in relations}
    judged = [_by_words(tokenizer, draft, rules, named) for draft in drafts]
    open_ = [i for i, (_, checks) in enumerate(judged) if all(check.passed for check in checks)]
    likelier = gain(
        model,
        tokenizer,
        [(drafts[i].form, judged[i][0], drafts[i].source.text) for i in open_],
        at_once,
    )
    gains = dict(zip(open_, likelier, strict=True))
    seen = Seen(rules.ngram)
    for dream in earlier:
        if dream.kept and dream.kind == ACQUISITION:
            seen.add(dream.id, _all_words(Parsed(dream.text, dream.question)))
    made = []
    for number, (draft, (parsed, checks)) in enumerate(zip(drafts, judged, strict=True)):
        if number in gains:
            value = gains[number]
            enough = value >= rules.margin
            says = "" if enough else f"{value:.2f} nats a token likelier with its source"
            checks = [*checks, Check("grounded", enough, value, says)]
        text = _all_words(parsed)
        if all(check.passed for check in checks):
            value, name = seen.nearest(text)
            alike = value > rules.similarity
            checks = [*checks, Check("unique", not alike, value, f"as {name}" if alike else "")]
        ids, start = rows_of(tokenizer, draft.form, parsed)
        dream = Dream(
            kind=ACQUISITION,
            form=draft.form,
            text=parsed.text,
            question=parsed.question,
            ids=ids,
            start=start,
            sources=(draft.source.id,),
            weights=weights,
            seed=seed,
            number=number,
            checks=tuple(checks),
        )
        if dream.kept:
            seen.add(dream.id, text)
        made.append(dream)
    return made


def _all_words(dream: Parsed) -> str:
    return dream.text if dream.question is None else f"{dream.question} {dream.text}"


def _by_words(
    tokenizer: Any, draft: Draft, rules: Rules, relations: Mapping[str, Relation]
) -> tuple[Parsed, list[Check]]:
    """The dream in `draft`, and the checks up to the first that fails which need no model."""
    source = draft.source.text
    try:
        dream = parse(draft.form, draft.written, draft.ended, source)
    except ValueError as error:
        return Parsed(draft.written.strip()), [Check("form", False, says=str(error))]
    words = _all_words(dream)

    def length() -> Check:
        tokens = len(tokenizer(words, add_special_tokens=False)["input_ids"])
        fits = rules.least <= tokens <= rules.most
        return Check("length", fits, tokens, "" if fits else f"{tokens} tokens")

    def exact_words() -> Check:
        missing = unsupported(words, source)
        says = f"{', '.join(missing)} not in its source" if missing else ""
        if not says and (names(source) or numbers(source)) and not order_of_claims(words, source):
            says = "no name and no number of its source"
        says = says or negation_differs(words, source) or ""
        return Check("words", not says, len(missing), says)

    def facts() -> Check:
        pairs: list[tuple[Fact, Relation]] = [
            (fact, relations.get(fact.relation.casefold()) or Relation.plain(fact.relation))
            for fact in draft.source.facts
        ]
        against = contradicts(dream.text, dream.question, pairs)
        return Check("facts", against is None, len(pairs),
                     "" if against is None else f"against {str(against)!r}")  # fmt: skip

    def novel() -> Check:
        value = overlap(words, source, rules.ngram)
        new = value <= rules.overlap
        return Check("novel", new, value, "" if new else f"{value:.2f} of it is copied")

    checks = [Check("form", True)]
    steps: tuple[Callable[[], Check], ...] = (length, exact_words, facts, novel)
    for step in steps:
        checks.append(step())
        if not checks[-1].passed:
            break
    return dream, checks

