"""Benchmarks that go on where they stopped: every finished row is saved and not measured again."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from hybrid_sleep.support.io import unreadable
from hybrid_sleep.support.provenance import MACHINE, machine
from hybrid_sleep.support.records import read_records, write_records
from hybrid_sleep.validation import check_count, check_number

Row = dict[str, Any]
# Nothing that is measured depends on these; all else in a provenance is part of a row's key.
NO_KEY = ("date", "commit")


def collect(
    result: dict[str, Any],
    planned: Sequence[Row],
    measure: Callable[[Row], Row],
    *,
    finish: Callable[[dict[str, Any]], None] = lambda result: None,
    minutes: float | None = None,
    jobs: int = 1,
    out: Path | None = None,
    anywhere: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fill `result["rows"]` with `{**key, **measure(key)}` for each key of `planned`.

    A key is a dict of JSON values that says all that its row depends on, beside the code and the
    machine. Rows that `out`/results.json has of the same keys and provenance are kept (see
    `finished_rows`). After each row `finish(result)` brings sums up to date, and the whole is
    written there. minutes: stop before a row as long as the longest so far would end later (see
    `Budget`). Interrupted, it returns what it has, and raises if that is nothing. `ended` says how
    it was: "done", "time is up" or "interrupted". jobs: rows measured side by side, each in a
    process of its own if more than one; `measure` and what it returns must then be picklable.
    anywhere: rows of another machine are kept as well, for benchmarks of answers, not of times.
    """
    check_count("jobs", jobs)
    budget = Budget(minutes)
    planned = [json.loads(json.dumps(key)) for key in planned]
    before = finished_rows(out, result["benchmark"], result["provenance"], anywhere=anywhere)
    there = {_text(key): row for key in planned for row in before if _has(row, key)}

    def update(ended: str) -> None:
        result["rows"] = [there[name] for name in map(_text, planned) if name in there]
        result["ended"], result["complete"] = ended, ended == "done"
        finish(result)

    pending = [key for key in planned if _text(key) not in there]
    ended = "done"
    try:
        for key, row in _measured(pending, measure, jobs, budget):
            there[_text(key)] = {**key, **row}
            update("interrupted")
            if out is not None:
                write_records(out / "results.json", result)
            if progress is not None:
                progress(len(there), len(planned))
        if len(there) < len({_text(key) for key in planned}):
            ended = "time is up"
    except KeyboardInterrupt:
        if not there:
            raise
        ended = "interrupted"
    update(ended)
    return result


def finished_rows(
    out: Path | None, benchmark: str, now: dict[str, Any], *, anywhere: bool = False
) -> list[Row]:
    """Rows in `out`/results.json that were measured under the same provenance as `now`, or none.

    The same but for date and commit: `source` says whether code changed that can change a number.
    anywhere: and but for the machine; its name is the `machine` of a row that is not of this one.
    A warning says that rows of another provenance, an earlier version's among them, count for
    nothing. Raises OSError or ValueError if the file is damaged: a new one would take its place.
    """
    path = None if out is None else out / "results.json"
    if path is None or not path.exists():
        return []
    result = read_records(path)
    if result.get("benchmark") != benchmark:
        return []
    before, rows = result.get("provenance"), result.get("rows")
    if not isinstance(before, dict) or not isinstance(rows, list):
        raise unreadable(path, "it has no rows and provenance; remove it to measure anew")
    names = sorted((before.keys() | now.keys()) - set(NO_KEY))
    differ = [name for name in names if before.get(name) != now.get(name)]
    if anywhere:
        differ = [name for name in differ if name not in MACHINE]
    if anywhere and not differ:
        rows = [_with_machine(row, machine(before), machine(now)) for row in rows]
    if differ and rows:
        warnings.warn(
            f"{path}: its {len(rows)} rows were measured with another {', '.join(differ)}; all "
            "rows are measured anew",
            stacklevel=3,
        )
    return [] if differ else rows


def _with_machine(row: Row, written: str, here: str) -> Row:
    """`row` as a result of the machine `here` has it, from a result that `written` wrote last."""
    measured = row.get("machine") or written
    rest = {name: value for name, value in row.items() if name != "machine"}
    return rest if measured == here else {**rest, "machine": measured}


class Budget:
    """Minutes that work may take: it is over when the next row might not fit.

    Raises ValueError unless `minutes` is None (no end) or above 0.
    """

    def __init__(self, minutes: float | None):
        if minutes is not None:
            check_number("minutes", minutes, above=0)
        self.seconds = None if minutes is None else 60 * minutes
        self.began = self.last = time.monotonic()
        self.longest = 0.0

    def over(self) -> bool:
        """Whether a row as long as the longest so far would end too late; call between rows."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.last)
        self.last = now
        return self.seconds is not None and now - self.began + self.longest > self.seconds


def _measured(
    pending: Sequence[Row], measure: Callable[[Row], Row], jobs: int, budget: Budget
) -> Iterator[tuple[Row, Row]]:
    """Keys and what was measured, as rows are done, until the time is up."""
    if jobs == 1:
        for key in pending:
            if budget.over():
                return
            yield key, measure(key)
        return
    # Forked, a process would share torch's threads in whatever state they were.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        queue = list(pending)
        running: dict[Future[Row], Row] = {}
        try:
            while queue or running:
                while queue and len(running) < jobs and not budget.over():
                    key = queue.pop(0)
                    running[pool.submit(measure, key)] = key
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Let this process end when the one that started it is killed, instead of working on."""

    starter = multiprocessing.parent_process()
    assert starter is not None

    def watch() -> None:
        starter.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _text(key: Row) -> str:
    return json.dumps(key, sort_keys=True)


def _has(row: Row, key: Row) -> bool:
    found = row.items() if isinstance(row, dict) else ()
    return all(pair in found for pair in key.items())
