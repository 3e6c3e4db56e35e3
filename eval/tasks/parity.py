"""Parity: how many of the first t bits are set, modulo 2? The word problem of the group Z2.

The least state there is to track, and out of reach for a state-space layer without negative
eigenvalues on words longer than those it was trained on (arXiv 2411.12537).
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_sleep.eval.tasks.groups import group
from hybrid_sleep.eval.tasks.prefix_products import PrefixProducts


class Parity(PrefixProducts):
    """The parity of the first t of `elements` random bits; layouts as in `word_problem`.

    In the layout `recall`, `prefixes=[elements]` asks for the parity of all bits only. Layouts,
    tokens and splits: see `PrefixProducts`.

    Raises ValueError for an unknown layout, fewer than 12 bits, `windows` that do not divide
    `elements` or leave fewer than two for each of `prefixes` to a window (`recall`), more windows
    than elements or any `prefixes` (`tagging`).
    """

    name = "parity"
    product = "parity"

    def __init__(
        self,
        elements: int = 32,
        layout: str = "recall",
        windows: int = 1,
        prefixes: Sequence[int] | None = None,
    ):
        super().__init__(group("Z2"), elements, layout, windows, prefixes)
