"""Sentences that read the core and that the core never reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hybrid_sleep.eval.tasks.gsm_infinite.filling import fillable
from hybrid_sleep.eval.tasks.gsm_infinite.graph import (
    AVERAGE,
    COUNT,
    LARGEST_VALUE,
    Core,
    Definition,
    Form,
    Quantity,
    draw_constant,
    form,
)
from hybrid_sleep.eval.tasks.gsm_infinite.stream import Stream

TRIES = 4
FEW = 4  # names left before a place is added


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
    needed, drawn = list(core.values), {}
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
