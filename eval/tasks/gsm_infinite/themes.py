"""The words of the problems: places, kinds of things at them, and what each thing has some of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hybrid_sleep.eval.tasks.gsm_infinite.graph import AVERAGE, COUNT, GRAND, TOTAL, Quantity

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
