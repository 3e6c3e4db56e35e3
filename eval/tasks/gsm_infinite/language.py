"""The language of the problems: themes, sentences and how they are parsed, a closed vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

from hybrid_sleep.eval.tasks.gsm_infinite.graph import (
    AVERAGE,
    COUNT,
    GRAND,
    TOTAL,
    Definition,
    Form,
    Quantity,
)

FILL, END = "<fill>", "<end>"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TOKEN = re.compile(r"[A-Za-z]+|\d|[^\w\s]")
_OTHER_WORDS = (
    "The the equals plus times sum difference between and exists its number is greater than How "
    "many does have What Define as so unknown It given that Answer Solution"
)
TOLERANCE = 20  # a problem lacks at most one part in so many of its target
ROOMY = 256  # here a few sentences of any task's lengths reach every room
FIRST_NAMES = (
    "Amber", "Birch", "Copper", "Crane", "Ember", "Falcon", "Granite", "Heron",
    "Ivory", "Juniper", "Larch", "Marble", "Otter", "Raven", "Silver", "Thistle",
)  # fmt: skip


@dataclass(frozen=True)
class Theme:
    """Things of several kinds at several places, each with a number of parts.

    A place is one of `FIRST_NAMES` and one of `sites`, a kind of thing one of `kinds` and
    `thing` (`things`): one word each, so that every problem has the length it would have under
    other names.
    """

    name: str
    thing: str
    things: str
    parts: str
    kinds: tuple[str, ...]
    sites: tuple[str, ...]

    @property
    def places(self) -> int:
        """How many places there are."""
        return len(FIRST_NAMES) * len(self.sites)

    def place(self, index: int) -> str:
        """The name of a place."""
        first, site = divmod(index, len(self.sites))
        return f"{FIRST_NAMES[first]} {self.sites[site]}"

    @cached_property
    def phrases(self) -> dict[str, str]:
        """How each sort of quantity is named, with `{kind}` and `{place}` to fill in."""
        return {
            COUNT: f"number of {{kind}} {self.things} in {{place}}",
            AVERAGE: f"average number of {self.parts} per {{kind}} {self.thing} in {{place}}",
            TOTAL: f"total number of {self.things} in {{place}}",
            GRAND: f"total number of {self.parts} in {{place}}",
        }


THEMES = {
    theme.name: theme
    for theme in (
        Theme(
            "orchard", "tree", "trees", "nests",
            ("almond", "apple", "apricot", "cherry", "chestnut", "fig", "hazel", "lemon",
             "medlar", "mulberry", "olive", "peach", "pear", "plum", "quince", "walnut"),
            ("Estate", "Farm", "Garden", "Grove", "Hill", "Orchard", "Terrace", "Valley"),
        ),
        Theme(
            "harbour", "boat", "boats", "sailors",
            ("cargo", "ferry", "fishing", "mail", "patrol", "pilot", "racing", "rescue",
             "research", "river", "sailing", "salvage", "supply", "survey", "training", "whaling"),
            ("Bay", "Cove", "Harbour", "Haven", "Landing", "Port", "Quay", "Sound"),
        ),
        Theme(
            "library", "shelf", "shelves", "books",
            ("art", "chess", "cookery", "craft", "drama", "history", "language", "law",
             "medicine", "music", "mystery", "nature", "poetry", "science", "sports", "travel"),
            ("Academy", "Archive", "College", "Hall", "House", "Institute", "Library", "School"),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Naming:
    """What the places and items of a problem, which are numbers, are called."""

    theme: Theme
    places: tuple[int, ...]
    items: tuple[int, ...]

    def kind(self, quantity: Quantity) -> str:
        """The kind of thing of a count or an average."""
        return self.theme.kinds[self.items[quantity.item]]

    def place(self, quantity: Quantity) -> str:
        """Where the quantity is counted."""
        return self.theme.place(self.places[quantity.place])

    def name(self, quantity: Quantity) -> str:
        """`number of pear trees in Amber Hill` and the like."""
        kind = self.kind(quantity) if quantity.item >= 0 else ""
        return self.theme.phrases[quantity.sort].format(kind=kind, place=self.place(quantity))


def stated(quantity: Quantity, definition: Definition, naming: Naming) -> str:
    """`The number of A equals 2 times the sum of B and C.`; not for totals, which are implied."""
    names = [f"the {naming.name(operand)}" for operand in definition.operands]
    if definition.join:
        link = " of" if definition.join == "sum" else " between"
        names = [f"the {definition.join}{link} {_listed(names)}"]
    parts = [str(definition.constant)] * (definition.constant > 0)
    parts += [definition.sign] * bool(definition.sign) + names
    return f"The {naming.name(quantity)} equals {' '.join(parts)}."


def exists(quantity: Quantity, naming: Naming) -> str:
    """What is said of the unknown."""
    return f"The {naming.name(quantity)} exists, and its number is greater than 0."


def given(quantity: Quantity, value: int, naming: Naming) -> str:
    """What is said of the last quantity where the unknown is asked for."""
    return f"The {naming.name(quantity)} equals {value}."


def question(quantity: Quantity, naming: Naming) -> str:
    """`How many pear trees does Amber Hill have?` or `What is the total number of ...?`"""
    if quantity.sort == COUNT:
        things = f"{naming.kind(quantity)} {naming.theme.things}"
        return f"How many {things} does {naming.place(quantity)} have?"
    return f"What is the {naming.name(quantity)}?"


def solution(
    definitions: Mapping[Quantity, Definition],
    forms: Mapping[Quantity, Form],
    unknown: Quantity | None,
    last_value: int,
    answer: int,
    naming: Naming,
) -> str:
    """`Define the number of ... as A; so A = 2. ... Answer: 23.`, operands first.

    With an unknown, values are written in it, and the equation for the last one is solved.
    """
    letters: dict[Quantity, str] = {}
    lines = []
    for index, (quantity, definition) in enumerate(definitions.items()):
        turn, letter = divmod(index, len(LETTERS))
        name = letters[quantity] = LETTERS[letter] + (str(turn) if turn else "")
        line = f"Define the {naming.name(quantity)} as {name}; "
        if quantity == unknown:
            lines.append(f"{line}{name} is unknown.")
            continue
        steps = [name, _expression(definition, letters)]
        value = _written(forms[quantity], letters.get(unknown, ""))
        steps += [value] * (value != steps[1])
        lines.append(f"{line}so {' = '.join(steps)}.")
    if unknown is not None:
        x, value = letters[unknown], _written(forms[quantity], letters[unknown])
        equation = f"so {value} = {last_value}; " if value not in (x, name) else ""
        lines.append(f"It is given that {name} = {last_value}; {equation}so {x} = {answer}.")
    return " ".join([*lines, f"Answer: {answer}."])


def _expression(definition: Definition, letters: Mapping[Quantity, str]) -> str:
    """The right-hand side in letters."""
    names = [letters[operand] for operand in definition.operands]
    if definition.join == "grand":
        products = zip(names[::2], names[1::2], strict=True)
        return " + ".join(f"{count} * {average}" for count, average in products)
    joined = (" - " if definition.join == "difference" else " + ").join(names)
    if not definition.sign:
        return joined or str(definition.constant)
    joined = f"({joined})" if len(names) > 1 else joined
    return f"{definition.constant} {'*' if definition.sign == 'times' else '+'} {joined}"


def _written(value: Form, x: str) -> str:
    """`3 * A + 2`, `7 - A`, or a number."""
    slope, level = value
    if not slope:
        return str(level)
    term = x if abs(slope) == 1 else f"{abs(slope)} * {x}"
    if slope < 0:
        return f"{level} - {term}"
    return f"{term} {'+' if level > 0 else '-'} {abs(level)}" if level else term


def _listed(names: Sequence[str]) -> str:
    """`B and C`, or `B, C, and D`."""
    if len(names) == 2:
        return " and ".join(names)
    return f"{', '.join(names[:-1])}, and {names[-1]}"


def all_words() -> list[str]:
    """Marks, letters, and the words of all themes in alphabetical order, whatever a task uses."""
    words = {*_OTHER_WORDS.split(), *FIRST_NAMES}
    for theme in THEMES.values():
        words |= {*theme.kinds, *theme.sites}
        for phrase in theme.phrases.values():
            words |= set(phrase.format(kind="", place="").split())
    return [*".,?;:()=+-*", *LETTERS, *sorted(words)]


def split_tokens(text: str) -> list[str]:
    """The tokens of a text: words, single digits, single marks."""
    return _TOKEN.findall(text)


class Vocabulary:
    """`<fill>`, `<end>`, digits (a number is read digit by digit), and `words`, in that order.

    `encode` and `decode` turn texts into ids 0..size-1 and back.
    """

    def __init__(self, words: Iterable[str]):
        self.tokens = (FILL, END, *"0123456789", *words)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.fill, self.end = self.ids[FILL], self.ids[END]

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises ValueError naming the first word that no problem uses."""
        try:
            return [self.ids[token] for token in split_tokens(text)]
        except KeyError as error:
            raise ValueError(
                f"text must have words, digits and marks of the task, got {error.args[0]!r}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, spaced as the task spaces it; fill and end are left out."""
        text = ""
        for i in ids:
            token = self.tokens[int(i)]
            if token in (FILL, END):
                continue
            # A number is one word, and so is a letter with its number; a mark clings to a word.
            clings = token in ".,?;:)" or (token.isdigit() and _ends_in_name(text))
            text += token if not text or clings or text[-1] == "(" else f" {token}"
        return text


def _ends_in_name(text: str) -> bool:
    """Whether a digit would continue the last word: a number, or a single letter."""
    last = text.rpartition(" ")[2].lstrip("(")
    return last.isdigit() or last[:1] in LETTERS and not last[1:].strip("0123456789") != ""


def theme_of(question: str) -> Theme | None:
    """The theme in whose words a question is asked; None if it is no question."""
    found = [t for t in THEMES.values() if re.fullmatch(_grammar(t)["question"], question)]
    return found[0] if found else None


def read_statement(theme: Theme, sentence: str) -> tuple[str, str | None] | None:
    """Name and definition in `The NAME equals DEFINITION`, None where NAME only exists.

    None for a sentence (without its full stop) that the theme has not.
    """
    grammar = _grammar(theme)
    if found := re.fullmatch(grammar["exists"], sentence):
        return found[1], None
    found = re.fullmatch(grammar["equals"], sentence)
    return (found[1], found[2]) if found else None


@cache
def _grammar(theme: Theme) -> dict[str, str]:
    """Patterns for `question`, `exists` and `equals`."""
    kind = f"(?:{'|'.join(theme.kinds)})"
    place = f"(?:{'|'.join(FIRST_NAMES)}) (?:{'|'.join(theme.sites)})"
    names = {
        sort: phrase.format(kind=kind, place=place) for sort, phrase in theme.phrases.items()
    }
    name = f"(?:{'|'.join(names.values())})"
    others = "|".join(phrase for sort, phrase in names.items() if sort != COUNT)
    one = f"the {name}"
    several = f"the sum of {one}(?: and {one}|(?:, {one})+, and {one})"
    operands = f"(?:{one}|{several}|the difference between {one} and {one})"
    return {
        "question": (
            f"How many {kind} {theme.things} does {place} have\\?|What is the (?:{others})\\?"
        ),
        "exists": f"The ({name}) exists, and its number is greater than 0",
        "equals": f"The ({name}) equals (\\d+|(?:\\d (?:plus|times) )?{operands})",
    }


def slack(length: int, shortest: int) -> int:
    """How many tokens may lack of `length`: 5 %, and fewer than the `shortest` sentence has."""
    return min(length // TOLERANCE, shortest - 1)


@lru_cache(maxsize=1 << 14)
def fillable(room: int, left: int, costs: tuple[int, ...]) -> bool:
    """Whether sentences of `costs` tokens, any number of each, leave at most `left` of `room`."""
    if room <= left or room >= ROOMY:
        return room >= 0
    return any(fillable(room - cost, left, costs) for cost in costs if cost <= room)
