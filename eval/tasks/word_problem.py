"""Word problems: the product of the first t elements of a word, in a group that does not commute.

State tracking in its purest form: S5 and A5 need a depth that grows with the word (arXiv
2404.08819), Z60 is as large as A5 and easy. Here the word has left the window when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_sleep.eval.tasks.groups import group as find_group
from hybrid_sleep.eval.tasks.prefix_products import PrefixProducts
from hybrid_sleep.validation import check_choice

GROUPS = ("S3", "S5", "A5", "Z60")


class WordProblem(PrefixProducts):
    """Products of the first t of `elements` random elements of `group`: S3, S5, A5 or Z60.

    S3, S5, A5: permutations, numbered in lexicographic order of their tuples (where 0, 1... go; of
    A5 the even ones), multiplied from left to right: a product a b applies a first. Z60: numbers,
    added modulo 60. The identity is 0. Layouts, tokens and splits: see `PrefixProducts`.

    Raises ValueError for an unknown group or layout, fewer than 4096 words, `windows` that do not
    divide `elements` or leave fewer than two for each of `prefixes` to a window (`recall`), more
    windows than elements or any `prefixes` (`tagging`).
    """

    name = "word_problem"

    def __init__(
        self,
        group: str = "S5",
        elements: int = 32,
        layout: str = "recall",
        windows: int = 1,
        prefixes: Sequence[int] | None = None,
    ):
        check_choice("group", group, GROUPS)
        super().__init__(find_group(group), elements, layout, windows, prefixes)
        self.params = {"group": group, **self.params}
