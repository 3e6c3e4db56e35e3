"""Problems drawn one after another, among distractors, each solved once more before it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hybrid_sleep.eval.tasks.base import SPLITS
from hybrid_sleep.eval.tasks.gsm_infinite import language
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
    draw_constant,
    draw_core,
    form,
    forms_of,
    hide,
)
from hybrid_sleep.eval.tasks.gsm_infinite.language import THEMES, Naming, Theme, fillable
from hybrid_sleep.eval.tasks.sampling import Stream, in_test

TRIES = 4
FEW = 4  # names left before a place is added


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
                said.append(language.exists(quantity, naming))
            elif quantity.item >= 0:
                said.append(language.stated(quantity, definition, naming))
        if self.hidden is not None:
            said.append(language.given(core.last, core.values[core.last], naming))
        return said

    @cached_property
    def tokens(self) -> int:
        """Tokens of statements and question, which any names leave the same."""
        naming = self.naming(tuple(range(self.core.places)), tuple(range(self.core.items)))
        text = [*self.statements(naming), language.question(self.asked, naming)]
        return sum(len(language.split_tokens(sentence)) for sentence in text)

    @cached_property
    def costs(self) -> tuple[int, ...]:
        """Tokens of the distractors that can always be drawn."""
        naming = self.naming(tuple(range(self.core.places)), tuple(range(self.core.items)))
        other = next(q for q in self.core.definitions if q.item >= 0)._replace(sort=COUNT)
        return tuple(
            len(language.split_tokens(language.stated(other, definition, naming)))
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
            if in_test(_content(draft.core, naming)) == (split == "test"):
                break
        yield _written(stream, recipe, draft, naming)


def _content(core: Core, naming: Naming) -> str:
    """What the definitions of a core say, for the hash that decides its split.

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
    return repr((naming.theme.name, named(core.last), sorted(said)))


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
            return len(language.split_tokens(language.stated(quantity, definition, naming)))

        room = recipe.length - length
        extra = distractors(
            stream, core, recipe.d, places, kinds, room, cost, recipe.slack, draft.costs
        )
        noise = [language.stated(*pair, naming) for pair in extra.items()]
        length += sum(len(language.split_tokens(sentence)) for sentence in noise)
        said += noise
    stated = {q: definition for q, definition in core.definitions.items() if q.item >= 0} | extra
    last = None if draft.hidden is None else (core.last, core.values[core.last])
    found = solve(stated, draft.asked, draft.hidden, last)
    if found != draft.answer:
        raise RuntimeError(f"the answer is {found}, not {draft.answer}, to: {' '.join(said)}")
    text = language.solution(
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
        question=language.question(draft.asked, naming),
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


def distractors(
    stream: Stream,
    core: Core,
    d: int,
    places: int,
    items: int,
    room: int,
    cost: Callable[[Quantity, Definition], int],
    slack: int,
    costs: tuple[int, ...],
) -> dict[Quantity, Definition]:
    """Definitions of other quantities, of `room` tokens less at most `slack`.

    Each reads one or two of the core's quantities or of the ones before it, or is a constant. None
    is a total, and none lies at a place whose total the core reads, so that nothing in the core
    changes. `places` and `items` are how many names there are; `cost` counts a sentence's tokens.
    `costs`: those of `sure_definitions` for a count, with which `room` must be fillable.
    """
    names = _Names(stream, core, d, places, items)
    values = {quantity: Form(0, value) for quantity, value in core.values.items()}
    needed = list(core.values)
    drawn: dict[Quantity, Definition] = {}
    while (quantity := names.draw(names.sorts)) is not None:
        definition = _reading(stream, needed, list(drawn), values)
        spent = cost(quantity, definition)
        if not fillable(room - spent, slack, costs):
            quantity = names.draw((COUNT,))
            if quantity is None:
                break
            sure = (_leaf(stream), *sure_definitions(core)[1:])
            ends = [fillable(room - spent, slack, costs) for spent in costs]
            if not any(ends):
                break
            definition, spent = sure[ends.index(True)], costs[ends.index(True)]
        room -= spent
        drawn[quantity] = definition
        values[quantity] = form(definition, values)
    return drawn


def _reading(
    stream: Stream, needed: list[Quantity], drawn: list[Quantity], values: dict[Quantity, Form]
) -> Definition:
    """A definition worth 1..1000 that reads something, if a few tries find one."""
    for _ in range(TRIES if stream.chance(85) else 0):
        pools = [drawn if drawn and stream.chance(50) else needed for _ in range(2)]
        operands = [stream.pick(pool) for pool in pools[: 1 + stream.below(2)]]
        if len(set(operands)) < len(operands):
            continue
        operands.sort(key=lambda operand: -values[operand].level)
        join = "" if len(operands) == 1 else stream.pick(("sum", "difference"))
        if join == "sum":
            stream.shuffle(operands)
        sign = stream.pick(("", "plus", "times"))
        constant = draw_constant(stream, sign) if sign else 0
        definition = Definition(constant, sign, join, tuple(operands))
        if 1 <= form(definition, values).level <= LARGEST_VALUE:
            return definition
    return _leaf(stream)


def sure_definitions(core: Core) -> tuple[Definition, ...]:
    """Definitions of three lengths, the shortest first, that any distractor can have."""
    leaf = next(q for q, definition in core.definitions.items() if not definition.operands)
    return (
        Definition(1, "", "", ()),
        Definition(0, "", "", (leaf,)),
        Definition(1, "plus", "", (leaf,)),
    )


def _leaf(stream: Stream) -> Definition:
    return Definition(draw_constant(stream, ""), "", "", ())


class _Names:
    """Names that are free: at the core's places without a total, then at ever more others."""

    def __init__(self, stream: Stream, core: Core, d: int, places: int, items: int):
        self.stream, self.limits = stream, (places, items)
        self.sorts = (COUNT,) if d == 2 else (COUNT, AVERAGE)
        closed = {quantity.place for quantity in core.values if quantity.item < 0}
        self.used = set(core.values)
        self.places: list[int] = []
        self.next_place, self.items = core.places, core.items
        self.free: list[Quantity] = []
        for place in range(core.places):
            if place not in closed:
                self._open(place)

    def draw(self, sorts: tuple[str, ...]) -> Quantity | None:
        """A free name of one of these sorts, or None if all are taken."""
        while True:
            options = [i for i, quantity in enumerate(self.free) if quantity.sort in sorts]
            if len(options) >= FEW or not self._more():
                break
        if not options:
            return None
        at = self.stream.pick(options)
        self.free[at], self.free[-1] = self.free[-1], self.free[at]
        return self.free.pop()

    def _more(self) -> bool:
        places, items = self.limits
        if self.next_place < places:
            self._open(self.next_place)
            self.next_place += 1
        elif self.items < items:
            self.items += 1
            self._add(self.places, (self.items - 1,))
        else:
            return False
        return True

    def _open(self, place: int) -> None:
        self.places.append(place)
        self._add((place,), range(self.items))

    def _add(self, places: Iterable[int], items: Sequence[int]) -> None:
        fresh = [Quantity(sort, p, i) for p in places for i in items for sort in self.sorts]
        self.free += [quantity for quantity in fresh if quantity not in self.used]
