"""What a sleep over experience trains on: experiences, caches, dreams, foundations, and facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from hybrid_sleep.parametric.contexts import edit_contexts
from hybrid_sleep.parametric.dreams.dream import ACQUISITION, Dream, Source, counts
from hybrid_sleep.parametric.dreams.examine import rows_of
from hybrid_sleep.parametric.dreams.forms import QUESTION, Parsed
from hybrid_sleep.parametric.dreams.selection import choose_dreams
from hybrid_sleep.parametric.dreams.write import acquire
from hybrid_sleep.parametric.experience.canaries import Canary
from hybrid_sleep.parametric.experience.choice import Chosen
from hybrid_sleep.parametric.experience.context import (
    Answer,
    CachedContext,
    answers_about,
    rows_behind,
)
from hybrid_sleep.parametric.experience.leaks import plant
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.experience.questions import Question
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.lessons import Lesson, taught
from hybrid_sleep.parametric.mix import PARTS, Mix, Row, Shares, foundation, mix
from hybrid_sleep.training.data import derive_seed

RECENT, DREAM, FOUNDATION, FACT = PARTS


@dataclass
class Study:
    """lessons: in the order to train in. questions: to ask at the gate. mixed: where lessons come
    from; dreams: all that were dreamt. canaries: by their rows."""

    lessons: list[Lesson]
    questions: list[Question]
    mixed: Mix
    dreams: list[Dream] = field(default_factory=list)
    answers: int = 0
    canaries: dict[Row, Canary] = field(default_factory=dict)

    @property
    def planted(self) -> list[int]:
        """How often each canary is trained on."""
        return [sum(x.row == row for x in self.mixed.rows) for row in self.canaries]

    def to_dict(self) -> dict[str, Any]:
        """What a record says of it, plain data for JSON, without any text."""
        return {
            "mix": self.mixed.to_dict(),
            "dreams": counts(self.dreams),
            "answers": self.answers,
            "questions": len(self.questions),
            "canaries": self.planted,
        }


def said(kept: Any) -> str:
    """What an experience says, with what it was an answer to."""
    one = kept.experience
    return f"{one.prompt}\n{one.text}" if one.prompt else one.text


def prepare(
    model: nn.Module,
    tokenizer: Any,
    chosen: Chosen,
    options: StudyOptions,
    *,
    contexts: Sequence[CachedContext] = (),
    facts: Sequence[tuple[Fact, Relation]] = (),
    corpus: Sequence[Sequence[int]] | None = None,
    questions: Sequence[tuple[str, str]] = (),
    prompts: Mapping[int, Sequence[str]] = MappingProxyType({}),
    seed: int = 0,
    once: Callable[[str, Callable[[], Any]], Any] = lambda name, make: make(),
    progress: Callable[[int, int], None] | None = None,
    selecting: Callable[[int, int], None] | None = None,
) -> Study:
    """Dream of what was `chosen`, answer `prompts` about it, write on from caches, mix all with
    foundations and with what `facts` in the weights say, and ask `model`, as it is now, what it
    expects: of dreams and answers with their source in its context, of what was written on from a
    cache with that cache, of foundations and facts without either.

    Of an experience itself the words count; answers and rows of a cache are recent as well.
    questions: (question, answer), asked at the gate as well as some of the dreamt ones. prompts: by
    the id of an experience; those of one that was not chosen wait with it. corpus: rows of ids
    for foundations; None: the model's own. once: gets what the model is to write, and its name;
    returns it, or the same of an earlier call. progress, selecting: called with what is dreamt, and
    looked at, and of how many.
    """
    canaries = plant(tokenizer, options.canaries, seed=seed)
    sources = [Source(str(kept.id), said(kept)) for kept in chosen.experiences]
    text_of = {source.id: source.text for source in sources}

    def dreamt() -> list[dict[str, Any]]:
        made = acquire(
            model, tokenizer, sources, seed=derive_seed("dreams", seed), forms=options.forms,
            each=options.dreams, tokens=options.length, progress=progress,
        )  # fmt: skip
        return [dream.to_dict() for dream in made]

    def founded() -> list[dict[str, Any]]:
        rows = foundation(
            model, tokenizer, options.foundation, corpus, seed=derive_seed("foundation", seed)
        )
        return [asdict(row) for row in rows]

    asleep = options.dreams and options.forms
    dreams = [Dream.from_dict(x) for x in once("dreams", dreamt)] if asleep else []
    founding = once("foundation", founded) if corpus is None else founded()
    kept = [dream for dream in dreams if dream.kept]
    held = _held_out(kept, options.held_out, seed)

    def selected() -> list[dict[str, Any]]:
        # What the gate asks must not choose what is trained on.
        chosen_dreams = choose_dreams(
            model, tokenizer, [x for x in dreams if x not in held], sources, top=options.selected,
            more=options.drawn, helping=options.helping, rate=options.rate,
            seed=derive_seed("selected", seed), progress=selecting,
        )  # fmt: skip
        return [dream.to_dict() for dream in chosen_dreams]

    if dreams:
        dreams = [*held, *(Dream.from_dict(x) for x in once("selected", selected))]
    kept = [dream for dream in dreams if dream.kept]
    whole = "\n\n".join(text_of.values())
    about = {str(i): of for i, of in prompts.items() if str(i) in text_of}

    def said_about() -> list[dict[str, Any]]:
        made = answers_about(
            model, tokenizer, text_of, about, samples=options.samples, length=options.length,
            seed=seed,
        )  # fmt: skip
        return [asdict(answer) for answer in made]

    given = once("answers", said_about) if about else []
    answers = [Answer(_row(x["row"]), tuple(x["reads"])) for x in given]
    asked = [Question(question, answer, whole) for question, answer in questions]
    asked += [Question(x.question or "", x.text, text_of[x.sources[0]]) for x in held]
    asked += [Question(*pair, one.cache) for one in contexts for pair in one.questions]
    cache_of = {f"cache {i}": one.cache for i, one in enumerate(contexts)}
    material = {
        RECENT: [
            Row(one.ids, one.start, weight, str(one.id))
            for one, weight in zip(chosen.experiences, chosen.weights, strict=True)
            if len(one.ids) > max(1, one.start)
        ]
        + [*canaries]
        + [answer.row for answer in answers]
        + [
            row
            for name, one in zip(cache_of, contexts, strict=True)
            for row in rows_behind(
                model, tokenizer, one, samples=options.samples, length=options.length,
                origin=name, seed=seed,
            )
        ],
        DREAM: [Row.of_dream(dream) for dream in kept if dream not in held],
        FOUNDATION: [_row(row) for row in founding],
        FACT: [
            Row(said.ids, said.target, origin=str(fact))
            for fact, relation in facts
            for said in edit_contexts(tokenizer, fact, relation)
        ],
    }
    shares = options.shares
    if facts:
        rehearsed = options.rehearsed * shares.foundation
        shares = replace(
            shares, foundation=shares.foundation - rehearsed, fact=shares.fact + rehearsed
        )
    tokens = _tokens(material, shares, options)
    mixed = mix(material, tokens, shares, redistribute=True, seed=seed)
    by_id = {dream.id: dream for dream in kept}
    # What is gone through more than once is asked of the teacher once.
    told: dict[tuple[str, Row], Lesson] = {}
    for part in (DREAM, FOUNDATION, FACT):
        lessons = [Lesson(x.part, x.row) for x in dict.fromkeys(mixed.rows) if x.part == part]
        reads = None
        if part == DREAM:
            reads = [_read(tokenizer, x, by_id[x.row.origin], text_of) for x in lessons]
        for lesson in taught(model, lessons, reads=reads):
            told[part, lesson.row] = lesson
    reads_of = {answer.row: answer.reads for answer in answers}
    lessons = [Lesson(x.part, x.row) for x in dict.fromkeys(mixed.rows) if x.row in reads_of]
    for lesson in taught(model, lessons, reads=[reads_of[x.row] for x in lessons]):
        told[RECENT, lesson.row] = lesson
    for name, cache in cache_of.items():
        lessons = [Lesson(x.part, x.row) for x in dict.fromkeys(mixed.rows) if x.row.origin == name]
        for lesson in taught(model, lessons, cache=cache):
            told[RECENT, lesson.row] = lesson
    return Study(
        [told.get((x.part, x.row), Lesson(x.part, x.row)) for x in mixed.rows],
        asked,
        mixed,
        dreams,
        len(answers),
        canaries,
    )


def _tokens(material: Mapping[str, Sequence[Row]], shares: Shares, options: StudyOptions) -> int:
    """How many to train on, so that what is recent is gone through as often as is asked."""
    present = sum(getattr(shares, part) for part in PARTS if material.get(part))
    recent = sum(len(row.ids) for row in material[RECENT])
    if options.passes is None or not recent or not shares.recent:
        return options.tokens
    return min(options.tokens, max(1, round(options.passes * recent * present / shares.recent)))


def _row(data: Mapping[str, Any]) -> Row:
    """The row of `asdict`, which has been JSON since."""
    return Row(**{**data, "ids": tuple(data["ids"])})


def _read(
    tokenizer: Any, lesson: Lesson, dream: Dream, text_of: Mapping[str, str]
) -> tuple[int, ...]:
    """What the teacher reads: the same dream behind its source."""
    parsed = Parsed(dream.text, dream.question)
    ids, start = rows_of(tokenizer, dream.form, parsed, text_of[dream.sources[0]])
    # Behind another text a tokenizer may cut the first word otherwise than the student's.
    return (*ids[:start], *lesson.ids[-lesson.tokens :])


def _held_out(dreams: Sequence[Dream], share: float, seed: int) -> list[Dream]:
    """Dreamt questions that are not trained on."""
    asked = [x for x in dreams if x.kind == ACQUISITION and x.form == QUESTION]
    count = round(share * len(asked))
    if share and asked:
        count = max(1, count)
    return random.Random(derive_seed("held out", seed)).sample(asked, count)
