"""Markdown of results: one way to make a table, and one footer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hybrid_sleep.support.provenance import describe

DONE = "done"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "r") -> list[str]:
    """Lines of a table. `align`: a letter a column, l(eft) or r(ight); its last holds for the rest.

    Raises ValueError for a row that is not as long as the head.
    """
    rows = [list(map(str, row)) for row in rows]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"row must be {len(head)} cells long, got {row!r}")
    align = align + align[-1] * (len(head) - len(align))
    ruler = [{"l": ":---", "r": "---:"}[letter] for letter in align[: len(head)]]
    return [f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows)]


def footer(
    provenance: dict[str, Any],
    command: str | None,
    ended: str = DONE,
    versions: str = "",
    *,
    continues: bool = True,
) -> list[str]:
    """Whether anything is missing, where the numbers came from, and the command that gave them.

    ended: "done", or why the work stopped before it was. versions: of further packages. continues:
    whether the same call would keep what there is and do the rest.
    """
    how = "; the same call goes on" * continues
    lines = [] if ended == DONE else ["", f"Not complete ({ended}){how}."]
    lines += ["", "; ".join([describe(provenance), *([versions] if versions else [])])]
    return [*lines, "", f"`{command}`"] if command else lines
