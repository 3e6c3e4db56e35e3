"""Problems drawn one after another, each solved once more before it leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from hybrid_sleep.eval.tasks.base import SPLITS
from hybrid_sleep.eval.tasks.gsm_infinite import sentences
from hybrid_sleep.eval.tasks.gsm_infinite.filling import fillable
from hybrid_sleep.eval.tasks.gsm_infinite.graph import (
    AVERAGE,
    COUNT,
    GRAND,
    LARGEST_VALUE,
    TOTAL,
    Core,
    Definition,
    Form,
    Quantity,
    draw_core,
    form,
    forms_of,
    hide,
)
from hybrid_sleep.eval.tasks.gsm_infinite.noise import distractors, sure_definitions
from hybrid_sleep.eval.tasks.gsm_infinite.stream import Stream
from hybrid_sleep.eval.tasks.gsm_infinite.themes import THEMES, Naming, Theme

TEST_SHARE = 16  # one problem in this many is a test problem


@dataclass(frozen=True)
class Problem:
    """A problem in words. `length` is the number of tokens of problem and question."""

    theme: str
    mode: str
    op: int
    d: int
    length: int
    problem: str
    question: str
    solution: str
    answer: int


@dataclass(frozen=True)
class Recipe:
    """What to draw: each of `ops`, `themes` and `modes` as often as the others, `length` at most.

    What is longer is drawn anew, and so is what distractors cannot bring to `length` less `slack`
    (None: they need not). With `noise` they are there.
    """

    ops: tuple[int, ...]
    d: int
    themes: tuple[str, ...]
    modes: tuple[str, ...]
    length: int
    slack: int | None
    noise: bool


@dataclass(frozen=True)
class Draft:
    """A core, what of it is hidden (None: nothing), and the sentences that state it."""

    theme: Theme
    mode: str
    core: Core
    hidden: Quantity | None

    @property
    def asked(self) -> Quantity:
        """What the question asks for."""
        return self.core.last if self.hidden is None else self.hidden

    @property
    def answer(self) -> int:
        """Its value."""
        return self.core.values[self.asked]

    def naming(self, places: tuple[int, ...], items: tuple[int, ...]) -> Naming:
        """Names for the draft's places and items."""
        return Naming(self.theme, places, items)

    def statements(self, naming: Naming) -> list[str]:
        """The core's sentences; totals are implied by what is mentioned."""
        core, said = self.core, []
        for quantity, definition in core.definitions.items():
            if quantity == self.hidden:
                said.append(sentences.exists(quantity, naming))
            elif quantity.item >= 0:
                said.append(sentences.stated(quantity, definition, naming))
        if self.hidden is not None:
            said.append(sentences.given(core.last, core.values[core.last], naming))
        return said

    @cached_property
    def tokens(self) -> int:
        """Tokens of statements and question, which any names leave the same."""
        naming = self.naming(tuple(range(self.core.places)), tuple(range(self.core.items)))
        text = [*self.statements(naming), sentences.question(self.asked, naming)]
        return sum(len(sentences.split_tokens(sentence)) for sentence in text)

    @cached_property
    def costs(self) -> tuple[int, ...]:
        """Tokens of the distractors that can always be drawn."""
        naming = self.naming(tuple(range(self.core.places)), tuple(range(self.core.items)))
        other = next(q for q in self.core.definitions if q.item >= 0)._replace(sort=COUNT)
        return tuple(
            len(sentences.split_tokens(sentences.stated(other, definition, naming)))
            for definition in sure_definitions(self.core)
        )

    def fits(self, recipe: Recipe) -> bool:
        """Whether it is as long as `recipe` allows, and can be filled up to what it wants."""
        room = recipe.length - self.tokens
        return room >= 0 if recipe.slack is None else fillable(room, recipe.slack, self.costs)

    def forms(self) -> dict[Quantity, Form]:
        """Every quantity in the unknown, or as a number."""
        return forms_of(self.core.definitions, self.hidden)


def draw_draft(stream: Stream, recipe: Recipe) -> Draft:
    """A draft of `recipe`; op, theme and mode are drawn first and kept until a core fits."""
    op, mode = stream.pick(recipe.ops), stream.pick(recipe.modes)
    theme = THEMES[stream.pick(recipe.themes)]
    while True:
        core = draw_core(stream, op, recipe.d)
        hidden = hide(stream, core) if mode == "reverse" else None
        draft = Draft(theme, mode, core, hidden)
        if (mode == "forward" or hidden is not None) and draft.fits(recipe):
            return draft


def problems(recipe: Recipe, split: str, seed: int) -> Iterator[Problem]:
    """Problems of a split without end, the same ones for the same (split, seed)."""
    stream = Stream(SPLITS.index(split), seed)
    while True:
        draft = draw_draft(stream, recipe)
        # Names decide the split, so that both splits have the same mix of everything else.
        while True:
            naming = draft.naming(
                tuple(stream.distinct(draft.theme.places, draft.core.places)),
                tuple(stream.distinct(len(draft.theme.kinds), draft.core.items)),
            )
            if in_test(draft.core, naming) == (split == "test"):
                break
        yield _written(stream, recipe, draft, naming)


def in_test(core: Core, naming: Naming) -> bool:
    """Whether a core belongs to the test split: by a hash of what its definitions say.

    Order, distractors, and which quantity is hidden make no difference, so a problem and its
    reverse are in the same split.
    """

    def named(quantity: Quantity) -> tuple[str, int, int]:
        item = naming.items[quantity.item] if quantity.item >= 0 else -1
        return quantity.sort, naming.places[quantity.place], item

    said = []
    for quantity, definition in core.definitions.items():
        operands = [named(operand) for operand in definition.operands]
        if definition.join != "difference":
            operands.sort()
        if quantity.item >= 0:  # a total reads whatever is mentioned at its place
            said.append((named(quantity), definition[:3], operands))
    content = repr((naming.theme.name, named(core.last), sorted(said))).encode()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") % TEST_SHARE == 0


def _written(stream: Stream, recipe: Recipe, draft: Draft, naming: Naming) -> Problem:
    """The problem of a draft, with distractors if `recipe` has any; verified."""
    core, said = draft.core, draft.statements(naming)
    length, extra = draft.tokens, {}
    if recipe.noise:
        places, kinds = draft.theme.places, len(draft.theme.kinds)
        naming = draft.naming(
            _filled(stream, naming.places, places), _filled(stream, naming.items, kinds)
        )

        def cost(quantity: Quantity, definition: Definition) -> int:
            return len(sentences.split_tokens(sentences.stated(quantity, definition, naming)))

        room = recipe.length - length
        extra = distractors(
            stream, core, recipe.d, places, kinds, room, cost, recipe.slack, draft.costs
        )
        noise = [sentences.stated(*pair, naming) for pair in extra.items()]
        length += sum(len(sentences.split_tokens(sentence)) for sentence in noise)
        said += noise
    stated = {q: definition for q, definition in core.definitions.items() if q.item >= 0} | extra
    last = None if draft.hidden is None else (core.last, core.values[core.last])
    found = solve(stated, draft.asked, draft.hidden, last)
    if found != draft.answer:
        raise RuntimeError(f"the answer is {found}, not {draft.answer}, to: {' '.join(said)}")
    text = sentences.solution(
        core.definitions,
        draft.forms(),
        draft.hidden,
        core.values[core.last],
        draft.answer,
        naming,
    )
    return Problem(
        theme=draft.theme.name,
        mode=draft.mode,
        op=sum(definition.op for definition in core.definitions.values()),
        d=recipe.d,
        length=length,
        problem=" ".join(stream.shuffle(said)),
        question=sentences.question(draft.asked, naming),
        solution=text,
        answer=draft.answer,
    )


def _filled(stream: Stream, drawn: tuple[int, ...], n: int) -> tuple[int, ...]:
    """`drawn` and then, in random order, the rest of 0..n-1."""
    return drawn + tuple(stream.shuffle([i for i in range(n) if i not in drawn]))


def solve(
    stated: Mapping[Quantity, Definition],
    asked: Quantity,
    unknown: Quantity | None = None,
    last: tuple[Quantity, int] | None = None,
) -> int | None:
    """The one answer that follows from what is stated, or None if none or several do.

    Totals are over all that is mentioned, distractors included. `unknown`: a quantity that is only
    said to exist, whatever `stated` says of it; `last`: a quantity and its value. None as well if
    any quantity is then outside 0..1000.
    """
    forms: dict[Quantity, Form | None] = {} if unknown is None else {unknown: Form(1, 0)}

    def read(quantity: Quantity) -> Form | None:
        if quantity not in forms:
            forms[quantity] = None  # until it is known, so that a circle ends
            definition = _implied(quantity, stated) if quantity.item < 0 else stated.get(quantity)
            if definition is not None and all(read(operand) for operand in definition.operands):
                forms[quantity] = form(definition, forms)
        return forms[quantity]

    wanted = read(asked)
    if wanted is None or not all(read(quantity) for quantity in stated):
        return None
    x = 0
    if unknown is not None:
        slope, level = read(last[0]) or (0, 0)
        if not slope or (last[1] - level) % slope or (x := (last[1] - level) // slope) < 1:
            return None
    inside = all(0 <= slope * x + level <= LARGEST_VALUE for slope, level in forms.values())
    return wanted.slope * x + wanted.level if inside else None


def _implied(total: Quantity, stated: Mapping[Quantity, Definition]) -> Definition | None:
    """The definition of a total; None if a count has no average, or the reverse."""
    here = [q for q in stated if q.place == total.place]
    counts = [q for q in here if q.sort == COUNT]
    if total.sort == TOTAL:
        return Definition(0, "", "total", tuple(counts)) if counts else None
    averages = {q.item: q for q in here if q.sort == AVERAGE}
    if not counts or {q.item for q in counts} != averages.keys():
        return None
    pairs = tuple(q for count in counts for q in (count, averages[count.item]))
    return Definition(0, "", GRAND, pairs)
