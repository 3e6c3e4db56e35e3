"""Every op and its baseline implementations on one device, in one process, interleaved.

A row is one op at one shape in one direction, with all its implementations. One that is not
installed, fails or takes too long has a `reason` in place of a figure; one of ours that computes
something else than the fp64 reference has a `warning`.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hybrid_sleep.kernels.benchmarks import check, roofline, timing
from hybrid_sleep.kernels.benchmarks.cases import STATE, Compute, Inputs, Shape, inputs, job, ours
from hybrid_sleep.kernels.benchmarks.ops import OURS, TARGETS, Baseline, Op, Unavailable, ended
from hybrid_sleep.support.provenance import check_device, provenance
from hybrid_sleep.support.records import write_records
from hybrid_sleep.support.resume import Budget, finished_rows
from hybrid_sleep.validation import check_count

LEAST_SECONDS = 1.0
# Of one call: all others of the row wait for it, round after round.
SLOWEST_SECONDS = 2.0
WARM_UPS = 3


def run(
    ops: Sequence[Op],
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 20,
    least_seconds: float = LEAST_SECONDS,
    minutes: float | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time all implementations of `ops`; with `out`, write results.json there after each row.

    At least `repeats` rounds of each row, more where they take less than `least_seconds`. Rows that
    `out` has from the same code, versions and device are kept. With `minutes` the work
    stops before they are over, and `complete` is False. Bandwidth and rate are measured on a GPU
    alone, and so are shares of the roofline and targets: on a CPU they are None.

    Raises ValueError for a device that is not here, `repeats` below 2, or `minutes` not above 0.
    """
    check_device(device)
    check_count("repeats", repeats, 2)
    budget = Budget(minutes)
    now = provenance(device)
    planned = [
        (op, shape, direction) for op in ops for shape in op.shapes for direction in op.directions
    ]
    order = [_name(*one) for one in planned]
    # Also those of ops that are not measured now: a file may be filled op by op.
    rows = {_key(row): row for row in finished_rows(out, "kernels", now) if _has_a_figure(row)}
    limits: roofline.Limits | None = None
    measured = 0

    def result() -> dict[str, Any]:
        others = [key for key in rows if key not in order]
        found = [rows[key] for key in [*order, *others] if key in rows]
        return {
            "benchmark": "kernels",
            **ended(all(key in rows for key in order)),
            "rows": found,
            "targets": targets(found, torch.device(device).type),
            "command": command,
            "provenance": now,
        }

    for (op, shape, direction), key in zip(planned, order, strict=True):
        if key in rows:
            continue
        if measured and budget.over():
            break
        if limits is None and torch.device(device).type == "cuda":
            limits = roofline.measure(device)
        rows[key] = _row(op, shape, direction, dtype, device, repeats, least_seconds, limits)
        measured += 1
        if out is not None:
            write_records(out / "results.json", result())
        if progress is not None:
            progress(sum(key in rows for key in order), len(order))
    return result()


def _has_a_figure(row: dict[str, Any]) -> bool:
    # Without any, it may have been the device that failed, and a fresh process may succeed.
    return any("seconds" in entry for entry in row["implementations"].values())


def _name(op: Op, shape: Shape, direction: str) -> tuple:
    return (op.name, *shape, direction)


def _key(row: dict[str, Any]) -> tuple:
    return (row["op"], row["T"], row["B"], row["H"], row["d"], row["direction"])


def _row(
    op: Op,
    shape: Shape,
    direction: str,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    least_seconds: float,
    limits: roofline.Limits | None,
) -> dict[str, Any]:
    cost = op.cost(shape, direction, dtype.itemsize)
    floor = None if limits is None else roofline.floor_seconds(cost, limits)
    found = _measure(op, shape, direction, dtype, device, repeats, least_seconds)
    _forget(device)
    for entry in found.values():
        if "seconds" in entry:
            median, quartiles = timing.median_and_quartiles(entry["seconds"])
            entry |= {
                "median": median,
                "quartiles": quartiles,
                "tokens_per_second": shape.B * shape.T / median,
                "share": None if floor is None else floor / median,
            }
    return {
        "op": op.name,
        **shape._asdict(),
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "limits": None if limits is None else limits._asdict(),
        "floor_seconds": floor,
        "implementations": found,
        "speedups": speedups(found, op.ours),
    }


def _measure(
    op: Op,
    shape: Shape,
    direction: str,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    least_seconds: float,
) -> dict[str, dict[str, Any]]:
    """An entry for each implementation, with its `seconds` if it was timed."""
    names = [*op.ours, *(baseline.name for baseline in op.baselines)]
    try:
        given = inputs(op.inputs, shape, dtype, device)
        call = check.expected(op, shape, direction, dtype, device)
    # The other rows are still worth measuring.
    except Exception as error:
        reason = f"its inputs could not be made: {_failure(error)}"
        return {name: {"reason": reason, "warning": None} for name in names}
    loads: dict[str, tuple[Callable, Callable | None]] = {
        name: (functools.partial(_load_ours, op, name, call, device), None) for name in op.ours
    }
    for baseline in op.baselines:
        load = functools.partial(_load_baseline, baseline, call, direction, device)
        loads[baseline.name] = (load, baseline.prepare)
    found, works = {}, {}
    for name, (warm, prepare) in loads.items():
        found[name], work = _warm_up(warm, given, direction, device, prepare)
        if work is not None:
            works[name] = work
    seconds = _time(works, found, repeats, least_seconds, timing.timer(device))
    for name, values in seconds.items():
        found[name]["seconds"] = values
    return found


def _load_ours(
    op: Op, name: str, call: check.Expected, device: str
) -> tuple[Compute, str | None]:
    if name == "triton" and torch.device(device).type != "cuda":
        raise Unavailable("runs on a GPU alone; the time its interpreter takes means nothing")
    compute = ours(op.op, name)
    try:
        return compute, check.wrong(call, compute)
    except ValueError as error:
        # The dispatcher's message, where it has no such implementation or that one declines.
        raise Unavailable(str(error)) from error


def _load_baseline(
    baseline: Baseline, call: check.Expected, direction: str, device: str
) -> tuple[Compute, str | None]:
    if direction == STATE:
        raise Unavailable("computes the output even where only the state is needed")
    if baseline.gpu and torch.device(device).type != "cuda":
        raise Unavailable("runs on a GPU alone")
    compute = baseline.load()
    given = None if baseline.prepare is None else baseline.prepare(call.given)
    return compute, check.wrong_baseline(call, compute, given)


def _warm_up(
    load: Callable[[], tuple[Compute, str | None]],
    given: Inputs,
    direction: str,
    device: str,
    prepare: Callable[[Inputs], Inputs] | None,
) -> tuple[dict[str, Any], Callable | None]:
    """The entry of an implementation before it is timed, and its warm work if it will be."""
    entry: dict[str, Any] = {"reason": None, "warning": None}
    try:
        compute, entry["warning"] = load()
        if entry["warning"] is not None:
            return entry, None
        work = job(compute, given if prepare is None else prepare(given), direction)
        time_one = timing.timer(device)
        for index in range(WARM_UPS):
            took = time_one(work)
            # The first call may have compiled and tuned.
            if index and took > SLOWEST_SECONDS:
                raise Unavailable(f"one call takes {took:.1f} s")
        return entry, work
    except Unavailable as error:
        entry["reason"] = str(error)
    # The others are still worth measuring.
    except Exception as error:
        entry["reason"] = _failure(error)
    _forget(device)
    return entry, None


def _failure(error: BaseException) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "needs more memory than the device has left"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def _forget(device: str) -> None:
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _time(
    works: dict[str, Callable],
    found: dict[str, dict[str, Any]],
    repeats: int,
    least_seconds: float,
    time_one: Callable,
) -> dict[str, list[float]]:
    """Seconds of all, interleaved; one that fails now is left out and the others start again."""

    def guarded(name: str) -> Callable:
        def work() -> None:
            try:
                works[name]()
            except Exception as error:
                raise _Failed(name) from error

        return work

    while works:
        try:
            guarded_works = {name: guarded(name) for name in works}
            return timing.interleaved(guarded_works, repeats, least_seconds, time_one)
        except _Failed as failed:
            (name,) = failed.args
            del works[name]
            found[name]["reason"] = _failure(failed.__cause__ or failed)
    return {}


class _Failed(Exception):
    """Names the implementation whose call failed."""


def speedups(
    implementations: dict[str, dict[str, Any]], ours: Sequence[str] = OURS
) -> dict[str, dict[str, Any]]:
    """How many times faster the first of `ours` with a figure is than each other one: medians
    over rounds, with quartiles. Empty where none of ours has a figure."""
    timed = {name: x["seconds"] for name, x in implementations.items() if "seconds" in x}
    first = next((name for name in ours if name in timed), None)
    found = {}
    for name, seconds in timed.items():
        if first is not None and name != first:
            ratios = [b / a for a, b in zip(timed[first], seconds, strict=True)]
            median, quartiles = timing.median_and_quartiles(ratios)
            found[name] = {"of": first, "ratio": median, "quartiles": quartiles}
    return found


def targets(rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Each target, whether it is reached, or the reason why these rows cannot tell (None)."""
    by_key = {_key(row): row for row in rows}
    found = []
    for target in TARGETS:
        ratio, reason = None, None
        row = by_key.get((target.op, *target.shape, target.direction))
        if device != "cuda":
            reason = "measured on a CPU; this is a target for a GPU"
        elif row is None:
            reason = "not measured yet"
        else:
            for name in ("triton", target.baseline):
                entry = row["implementations"][name]
                if "seconds" not in entry:
                    reason = f"{name} has no figure: {entry['warning'] or entry['reason']}"
                    break
            else:
                ratio = row["speedups"][target.baseline]["ratio"]
        found.append(
            {
                "op": target.op,
                **target.shape._asdict(),
                "direction": target.direction,
                "baseline": target.baseline,
                "target": target.ratio,
                "ratio": ratio,
                "reached": None if ratio is None else ratio >= target.ratio,
                "reason": reason,
            }
        )
    return found
