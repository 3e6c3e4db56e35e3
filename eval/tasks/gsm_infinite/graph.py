"""Quantities, what defines them, and cores of exactly so many operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hybrid_sleep.eval.tasks.sampling import Stream

COUNT, AVERAGE, TOTAL, GRAND = "count", "average", "total", "grand"
LARGEST_CONSTANT = 4
LARGEST_VALUE = 1000
LARGEST_OP = 30

# (weight, (operands, constant, how many operands another definition already waits for)).
_SHAPES = tuple(
    (by_operands * by_constant * by_reuse, (operands, constant, reused))
    for operands, by_operands in enumerate((3, 4, 5, 2, 1))
    for constant, by_constant in enumerate(((0, 1), (1, 3), (1, 1), (1, 1), (1, 1))[operands])
    for reused, by_reuse in enumerate((4, 2, 1))
    if by_constant and reused <= operands
)


class Quantity(NamedTuple):
    """A number with a name: things of kind `item` at `place`, their average, or a place's total.

    `sort` is `count`, `average` (parts per thing), `total` (all things of a place) or `grand` (all
    their parts); totals have `item` -1.
    """

    sort: str
    place: int
    item: int = -1


class Definition(NamedTuple):
    """`[constant plus|times] the sum of, or the difference between, operands`.

    `constant` is 0 and `sign` empty where there is none; alone, a constant has `sign` "". `join`
    is "sum", "difference" (first minus second), or "" for one operand or none. A total has the
    join "total", a grand total "grand", with count and average in turn as operands; both are
    implied by what the problem mentions and never stated.
    """

    constant: int
    sign: str
    join: str
    operands: tuple[Quantity, ...]

    @property
    def op(self) -> int:
        """Operations: one for each number that is read, the constant included."""
        return len(self.operands) + (self.constant > 0)


class Form(NamedTuple):
    """The number `slope * x + level`, with x the unknown."""

    slope: int
    level: int


def form(definition: Definition, forms: Mapping[Quantity, Form]) -> Form | None:
    """What `definition` is worth, given its operands; None if it is not linear in the unknown."""
    read = [forms[operand] for operand in definition.operands]
    if definition.join == "grand":
        slope = level = 0
        for count, average in zip(read[::2], read[1::2], strict=True):
            if count.slope and average.slope:
                return None
            slope += count.slope * average.level + average.slope * count.level
            level += count.level * average.level
        return Form(slope, level)
    if definition.join == "difference":
        slope, level = read[0].slope - read[1].slope, read[0].level - read[1].level
    else:
        slope, level = sum(f.slope for f in read), sum(f.level for f in read)
    if definition.sign == "times":
        return Form(definition.constant * slope, definition.constant * level)
    return Form(slope, definition.constant + level)


class Core(NamedTuple):
    """What the question needs and nothing else: definitions, operands first, the asked one last.

    `values` are those of all quantities; `places` and `items` say how many there are to name.
    """

    definitions: dict[Quantity, Definition]
    values: dict[Quantity, int]
    places: int
    items: int

    @property
    def last(self) -> Quantity:
        """The quantity that everything else feeds."""
        return next(reversed(self.definitions))


def draw_core(stream: Stream, op: int, d: int) -> Core:
    """A core of exactly `op` operations; `d` = 3 has averages and grand totals, 2 has not.

    It is built from the asked quantity down. Whatever is defined leaves enough operations for the
    operands that still lack a definition, and none over when the last has one; what comes to a
    dead end all the same (no name left, or a value outside 1..1000) is drawn anew.
    """
    while True:
        places = 2 + stream.below(3) + op // 8
        items = 2 + stream.below(4) + op // 16
        builder = _Builder(stream, op, d, places, items)
        if builder.build():
            values = _settle(builder.defined)
            if values is not None:
                definitions = {q: builder.defined[q] for q in values}
                return Core(definitions, values, places, items)


def hide(stream: Stream, core: Core) -> Quantity | None:
    """A leaf of `core` that the last value determines, in a linear equation; None if none is."""
    leaves = [q for q, definition in core.definitions.items() if not definition.operands]
    for leaf in stream.shuffle(leaves):
        found = forms_of(core.definitions, leaf)
        if found is not None and found[core.last].slope:
            return leaf
    return None


def forms_of(
    definitions: Mapping[Quantity, Definition], unknown: Quantity | None
) -> dict[Quantity, Form] | None:
    """All quantities as forms in `unknown`; None if one is not linear. Operands come first."""
    forms: dict[Quantity, Form] = {}
    for quantity, definition in definitions.items():
        found = Form(1, 0) if quantity == unknown else form(definition, forms)
        if found is None:
            return None
        forms[quantity] = found
    return forms


def draw_constant(stream: Stream, sign: str) -> int:
    """1..4, or 2..4 to multiply with."""
    least = 2 if sign == "times" else 1
    return least + stream.below(LARGEST_CONSTANT - least + 1)


def _settle(defined: dict[Quantity, Definition]) -> dict[Quantity, int] | None:
    """Values, operands first, with differences turned to be positive; None if one is outside."""
    forms: dict[Quantity, Form] = {}
    for quantity, definition in reversed(defined.items()):
        if definition.join == "difference":
            one, other = definition.operands
            if forms[one].level == forms[other].level:
                return None
            if forms[one].level < forms[other].level:
                definition = defined[quantity] = definition._replace(operands=(other, one))
        found = form(definition, forms)
        if not 1 <= found.level <= LARGEST_VALUE:
            return None
        forms[quantity] = found
    return {quantity: found.level for quantity, found in forms.items()}


class _Builder:
    """Definitions from the asked quantity down, `left` operations still to spend.

    A total reads every thing of its kind that is mentioned at its place. So it is defined before
    any of them is, together with all that are waiting, and then the place takes no more: `closed`.
    """

    def __init__(self, stream: Stream, op: int, d: int, places: int, items: int):
        self.stream, self.left, self.d = stream, op, d
        self.places, self.items = places, items
        self.waiting: list[Quantity] = []
        self.defined: dict[Quantity, Definition] = {}
        self.totals: dict[int, str] = {}
        self.closed: set[int] = set()

    def build(self) -> bool:
        """Define everything; False at a dead end."""
        asked = self._asked()
        if asked is None:
            return False
        self.waiting.append(asked)
        while self.waiting:
            totals = [q for q in self.waiting if q.item < 0]
            quantity = self.stream.pick(totals or self.waiting)
            self.waiting.remove(quantity)
            self.defined[quantity] = Definition(0, "", "", ())  # its name is taken
            definition = self._total(quantity) if totals else self._ordinary()
            if definition is None:
                return False
            self.defined[quantity] = definition
        return self.left == 0

    def _asked(self) -> Quantity | None:
        sorts = [(5, COUNT)]
        if self.left >= 2:
            sorts.append((4, TOTAL))
        if self.d == 3:
            sorts.append((2, AVERAGE))
            if self.left >= 4:
                sorts.append((3, GRAND))
        return self._new(self.stream.weighted(sorts))

    def _needs(self) -> int:
        """The fewest operations that define all that waits."""
        need = 0
        for quantity in self.waiting:
            if quantity.item >= 0:
                need += 1
            else:
                members, missing = self._members(quantity)
                fresh = 0 if members else 1
                pairs = len(members) + fresh
                if quantity.sort == TOTAL:
                    need += pairs + fresh
                else:
                    need += 2 * pairs + missing + 2 * fresh
        return need

    def _members(self, total: Quantity) -> tuple[list[int], int]:
        """Kinds mentioned at the place of a total, and the counts and averages still lacking."""
        here = [q for q in self.waiting if q.place == total.place and q.item >= 0]
        if total.sort == TOTAL:
            return [q.item for q in here if q.sort == COUNT], 0
        kinds = list(dict.fromkeys(q.item for q in here))
        return kinds, 2 * len(kinds) - len(here)

    def _total(self, total: Quantity) -> Definition | None:
        kinds, missing = self._members(total)
        sorts = (COUNT,) if total.sort == TOTAL else (COUNT, AVERAGE)
        spent = len(sorts) * len(kinds) + missing  # with the leaves that it makes wait
        spare = self.left - self._needs() - spent
        fits = spare // (2 * len(sorts))
        free = [i for i in range(self.items) if i not in kinds]
        least = 0 if kinds else 1
        most = min(fits, len(free), 3)
        sizes = [(4 - n, n) for n in range(least, most + 1)]
        if not sizes:
            return None
        kinds = kinds + self.stream.shuffle(free)[: self.stream.weighted(sizes)]
        operands = tuple(Quantity(sort, total.place, i) for i in kinds for sort in sorts)
        self.waiting += [q for q in operands if q not in self.waiting]
        self.closed.add(total.place)
        self.left -= len(operands)
        join = "total" if total.sort == TOTAL else "grand"
        return Definition(0, "", join, operands)

    def _ordinary(self) -> Definition | None:
        needs, ready = self._needs(), len(self.waiting)
        shapes = [
            (weight, shape) for weight, shape in _SHAPES if self._feasible(*shape, needs, ready)
        ]
        if not shapes:
            return None
        count, constant, reused = self.stream.weighted(shapes)
        operands = [self.waiting[i] for i in self.stream.distinct(ready, reused)]
        self.left -= count + constant
        for _ in range(count - reused):
            spare = self.left - needs - (count - len(operands))
            operand = self._new(self._sort(spare))
            if operand is None:
                return None
            operands.append(operand)
            self.waiting.append(operand)
            needs = self._needs()
        self.stream.shuffle(operands)
        sign = ("plus", "times")[self.stream.below(2)] if constant and count else ""
        number = draw_constant(self.stream, sign) if constant else 0
        join = "" if count < 2 else "difference" if count == 2 and self.stream.below(2) else "sum"
        return Definition(number, sign, join, tuple(operands))

    def _feasible(self, count: int, constant: int, reused: int, needs: int, ready: int) -> bool:
        after = self.left - count - constant - needs - (count - reused)
        nothing_left = ready + count - reused == 0
        return reused <= ready and (after == 0 if nothing_left else after >= 0)

    def _sort(self, spare: int) -> str:
        sorts = [(5, COUNT)]
        if spare >= 1:
            sorts.append((2, TOTAL))
        if self.d == 3:
            sorts.append((2, AVERAGE))
            if spare >= 3:
                sorts.append((1, GRAND))
        return self.stream.weighted(sorts)

    def _new(self, sort: str) -> Quantity | None:
        """A quantity of this sort that nothing names yet; None if there is none."""
        if sort in (TOTAL, GRAND):
            begun = {q.place for q in self.defined if q.item >= 0}
            places = [p for p in range(self.places) if p not in begun and p not in self.totals]
            if not places:
                return self._new(COUNT)
            place = self.stream.pick(places)
            self.totals[place] = sort
            return Quantity(sort, place)
        free = [
            quantity
            for place in range(self.places)
            if place not in self.closed or (sort == AVERAGE and self.totals[place] == TOTAL)
            for quantity in (Quantity(sort, place, item) for item in range(self.items))
            if quantity not in self.defined and quantity not in self.waiting
        ]
        return self.stream.pick(free) if free else None
