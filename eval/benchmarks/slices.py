"""Rows of a benchmark measured in slices: each is saved when it is done and not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hybrid_sleep
from hybrid_sleep.io import write_json_atomic
from hybrid_sleep.kernels.benchmarks.resume import Budget, record, rows_of

Row = dict[str, Any]


def record_of(device: Any) -> dict[str, Any]:
    """Versions, commit, device, and a fingerprint of all code that a sleep or its timing runs."""
    # In a checkout kernels/ and eval/ lie beside the package, elsewhere inside it.
    package, here = Path(hybrid_sleep.__file__).resolve().parent, Path(__file__).resolve()
    digest = hashlib.sha256()
    for folder in (package, here.parents[2] / "kernels", here.parents[1]):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return {**record(device), "source": digest.hexdigest()[:12]}


def collect(
    result: dict[str, Any],
    wanted: Sequence[Row],
    measure: Callable[[Row], Row],
    *,
    finish: Callable[[dict[str, Any]], None],
    minutes: float | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fill `result["rows"]` with `{**names, **measure(names)}` for each names of `wanted`.

    Rows that `out`/results.json has under the provenance of `result` are kept. After each row
    `finish(result)` brings sums up to date, and the whole is written there. `minutes`: stop before
    a row as long as the longest so far would end later. Interrupted, it returns what it has, and
    raises if that is nothing. `ended` says how it was: "done", "time is up" or "interrupted".
    """
    budget = Budget(minutes)
    wanted = [json.loads(json.dumps(names)) for names in wanted]
    before = rows_of(out, result["benchmark"], result["provenance"])
    there = {_name(names): row for names in wanted for row in before if _is(row, names)}

    def update(ended: str) -> None:
        result["rows"] = [there[name] for name in map(_name, wanted) if name in there]
        result["ended"], result["complete"] = ended, ended == "done"
        finish(result)

    ended = "done"
    try:
        for names in wanted:
            if _name(names) in there:
                continue
            if budget.over():
                ended = "time is up"
                break
            there[_name(names)] = {**names, **measure(names)}
            update("interrupted")
            if out is not None:
                write_json_atomic(out / "results.json", result)
            if progress is not None:
                progress(len(there), len(wanted))
    except KeyboardInterrupt:
        if not there:
            raise
        ended = "interrupted"
    update(ended)
    return result


def _name(names: Row) -> str:
    return json.dumps(names, sort_keys=True)


def _is(row: Row, names: Row) -> bool:
    return all(name in row and row[name] == value for name, value in names.items())
