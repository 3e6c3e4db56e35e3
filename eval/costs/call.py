"""How a cost is measured, as one value: how often, where, for how long, and where rows are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hybrid_sleep.eval.results import Result
from hybrid_sleep.support.provenance import check_device, provenance
from hybrid_sleep.support.resume import Row, collect
from hybrid_sleep.validation import check_count

R = TypeVar("R", bound=Result)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a benchmark, which a later one with the same `out` continues.

    repeats: rounds of each row at least, 2 or more. minutes: stop before a row that might take
    longer. out: folder whose results.json gets every row when it is finished, and whose rows of the
    same code, machine and settings are not measured again. command: what to call it in the result.
    progress: called with (rows done, rows in all). Raises ValueError for repeats or a device that
    cannot be.
    """

    repeats: int
    device: str = "cpu"
    minutes: float | None = None
    out: Path | None = None
    command: str | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        check_count("repeats", self.repeats, 2)
        check_device(self.device)

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""
        import torch

        return torch.device(self.device).type

    def measure(
        self, kind: type[R], planned: Sequence[Row], measure: Callable[[Row], Row], **fields: Any
    ) -> R:
        """The `kind` of result with `fields`, and a row for each of `planned`.

        Interrupted after the first row or out of `minutes`, it has the rows that are done.
        """
        content = {
            "benchmark": kind.benchmark,
            "repeats": self.repeats,
            **fields,
            "rows": [],
            "command": self.command,
            "provenance": provenance(self.device),
        }
        measured = collect(
            content, planned, measure,
            minutes=self.minutes, out=self.out, progress=self.progress,
        )  # fmt: skip
        return kind.from_content(measured)
