"""Rows of a benchmark measured in slices: each is saved when it is done and not measured again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import hybrid_sleep
from hybrid_sleep.kernels.benchmarks.resume import Budget, record, rows_of
from hybrid_sleep.support.records import write_records
from hybrid_sleep.validation import check_count

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
    jobs: int = 1,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fill `result["rows"]` with `{**names, **measure(names)}` for each names of `wanted`.

    Rows that `out`/results.json has under the provenance of `result` are kept. After each row
    `finish(result)` brings sums up to date, and the whole is written there. `minutes`: stop before
    a row as long as the longest so far would end later. Interrupted, it returns what it has, and
    raises if that is nothing. `ended` says how it was: "done", "time is up" or "interrupted".
    jobs: rows measured side by side, each in a process of its own if more than one; `measure` and
    what it returns must then be picklable.
    """
    check_count("jobs", jobs)
    budget = Budget(minutes)
    wanted = [json.loads(json.dumps(names)) for names in wanted]
    before = rows_of(out, result["benchmark"], result["provenance"])
    there = {_name(names): row for names in wanted for row in before if _is(row, names)}

    def update(ended: str) -> None:
        result["rows"] = [there[name] for name in map(_name, wanted) if name in there]
        result["ended"], result["complete"] = ended, ended == "done"
        finish(result)

    pending = [names for names in wanted if _name(names) not in there]
    ended = "done"
    try:
        for names, row in _measured(pending, measure, jobs, budget):
            there[_name(names)] = {**names, **row}
            update("interrupted")
            if out is not None:
                write_records(out / "results.json", result)
            if progress is not None:
                progress(len(there), len(wanted))
        if len(there) < len({_name(names) for names in wanted}):
            ended = "time is up"
    except KeyboardInterrupt:
        if not there:
            raise
        ended = "interrupted"
    update(ended)
    return result


def _measured(
    pending: Sequence[Row], measure: Callable[[Row], Row], jobs: int, budget: Budget
) -> Iterator[tuple[Row, Row]]:
    """Names and what was measured, as rows are done, until the time is up."""
    if jobs == 1:
        for names in pending:
            if budget.over():
                return
            yield names, measure(names)
        return
    # Forked, a process would share torch's threads in whatever state they were.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        queue, running = list(pending), {}
        try:
            while queue or running:
                while queue and len(running) < jobs and not budget.over():
                    names = queue.pop(0)
                    running[pool.submit(measure, names)] = names
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Let this process end when the one that started it is killed, instead of working on."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _name(names: Row) -> str:
    return json.dumps(names, sort_keys=True)


def _is(row: Row, names: Row) -> bool:
    found = row.items() if isinstance(row, dict) else ()
    return all(pair in found for pair in names.items())
