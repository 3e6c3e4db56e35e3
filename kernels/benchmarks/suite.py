"""Every op against its peers on one device: in one process, in turn, in alternating order.

A row is one op at one shape in one direction, with all its contenders. A contender that is not
installed, fails or takes too long has a `reason` in place of a figure, one of ours that computes
something else than the fp64 reference a `warning`.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hybrid_sleep.kernels.benchmarks import check, roofline, timing
from hybrid_sleep.kernels.benchmarks.cases import STATE, Inputs, Shape, Side, inputs, job, ours
from hybrid_sleep.kernels.benchmarks.contenders import OURS, TARGETS, Missing, Op, Peer
from hybrid_sleep.support.io import write_json_atomic
from hybrid_sleep.support.provenance import check_device, provenance
from hybrid_sleep.support.resume import Budget, finished_rows

LEAST_SECONDS = 1.0
# Of one call: everybody else in the row waits for it, round after round.
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
    """Time all contenders of `ops`; with `out`, write results.json there after each row.

    At least `repeats` rounds of each row, more where they take less than `least_seconds`. Rows that
    `out` has from the same commit, code, versions and device are kept. With `minutes` the work
    stops before they are over, and `complete` is False. Bandwidth and rate are measured on a GPU
    alone, and so are shares of the roofline and targets: on a CPU they are None.

    Raises ValueError for a device that is not here, `repeats` below 2, or `minutes` not above 0.
    """
    check_device(device)
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: must be at least 2")
    budget = Budget(minutes)
    now = provenance(device)
    wanted = [
        (op, shape, direction) for op in ops for shape in op.shapes for direction in op.directions
    ]
    order = [_name(*one) for one in wanted]
    # Also those of ops that are not asked for now: a file may be filled op by op.
    rows = {_key(row): row for row in finished_rows(out, "kernels", now) if _has_a_figure(row)}
    limits: roofline.Limits | None = None
    measured = 0

    def result() -> dict[str, Any]:
        others = [key for key in rows if key not in order]
        found = [rows[key] for key in [*order, *others] if key in rows]
        return {
            "benchmark": "kernels",
            "complete": all(key in rows for key in order),
            "rows": found,
            "targets": targets(found, torch.device(device).type),
            "command": command,
            "provenance": now,
        }

    for (op, shape, direction), key in zip(wanted, order, strict=True):
        if key in rows:
            continue
        if measured and budget.over():
            break
        if limits is None and torch.device(device).type == "cuda":
            limits = roofline.measure(device)
        rows[key] = _row(op, shape, direction, dtype, device, repeats, least_seconds, limits)
        measured += 1
        if out is not None:
            write_json_atomic(out / "results.json", result())
        if progress is not None:
            progress(sum(key in rows for key in order), len(order))
    return result()


def _has_a_figure(row: dict[str, Any]) -> bool:
    # Without any, what failed may have been the device, and a fresh process deserves a try.
    return any("seconds" in entry for entry in row["contenders"].values())


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
    found = _contend(op, shape, direction, dtype, device, repeats, least_seconds)
    _forget(device)
    for entry in found.values():
        if "seconds" in entry:
            median, quartiles = timing.spread(entry["seconds"])
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
        "contenders": found,
        "speedups": speedups(found, op.ours),
    }


def _contend(
    op: Op,
    shape: Shape,
    direction: str,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    least_seconds: float,
) -> dict[str, dict[str, Any]]:
    """What a row says of each contender, with its `seconds` if it was timed."""
    names = [*op.ours, *(peer.name for peer in op.peers)]
    try:
        given = inputs(op.inputs, shape, dtype, device)
        asked = check.question(op, shape, direction, dtype, device)
    # As for a contender: the other rows are still worth measuring.
    except Exception as error:
        reason = f"no question could be put to it: {_failure(error)}"
        return {name: {"reason": reason, "warning": None} for name in names}
    loads = {name: (functools.partial(_ours, op, name, asked, device), None) for name in op.ours}
    for peer in op.peers:
        load = functools.partial(_peer, peer, asked, direction, device)
        loads[peer.name] = (load, peer.prepare)
    found, works = {}, {}
    for name, (load, prepare) in loads.items():
        found[name], work = _enter(load, given, direction, device, prepare)
        if work is not None:
            works[name] = work
    seconds = _in_turn(works, found, repeats, least_seconds, timing.timer(device))
    for name, values in seconds.items():
        found[name]["seconds"] = values
    return found


def _ours(op: Op, name: str, asked: check.Question, device: str) -> tuple[Side, str | None]:
    if name == "triton" and torch.device(device).type != "cuda":
        raise Missing("runs on a GPU alone; what its interpreter takes means nothing")
    side = ours(op.op, name)
    try:
        return side, check.wrong(asked, side)
    except ValueError as error:
        # The dispatcher's own words, where it has no such implementation or that one declines.
        raise Missing(str(error)) from error


def _peer(
    peer: Peer, asked: check.Question, direction: str, device: str
) -> tuple[Side, str | None]:
    if direction == STATE:
        raise Missing("computes the output whether it is wanted or not")
    if peer.gpu and torch.device(device).type != "cuda":
        raise Missing("runs on a GPU alone")
    side = peer.load()
    own = None if peer.prepare is None else peer.prepare(asked.given)
    return side, check.wrong_peer(asked, side, own)


def _enter(
    load: Callable[[], tuple[Side, str | None]],
    given: Inputs,
    direction: str,
    device: str,
    prepare: Callable[[Inputs], Inputs] | None,
) -> tuple[dict[str, Any], Callable | None]:
    """What a row says of a contender before it is timed, and its warm work if it will be."""
    said: dict[str, Any] = {"reason": None, "warning": None}
    try:
        side, said["warning"] = load()
        if said["warning"] is not None:
            return said, None
        work = job(side, given if prepare is None else prepare(given), direction)
        time_one = timing.timer(device)
        for index in range(WARM_UPS):
            took = time_one(work)
            # The first call may have compiled and tuned.
            if index and took > SLOWEST_SECONDS:
                raise Missing(f"one call takes {took:.1f} s")
        return said, work
    except Missing as error:
        said["reason"] = str(error)
    # A row per failure: the others are still worth measuring.
    except Exception as error:
        said["reason"] = _failure(error)
    _forget(device)
    return said, None


def _failure(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "needs more memory than the device has left"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def _forget(device: str) -> None:
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _in_turn(
    works: dict[str, Callable],
    found: dict[str, dict[str, Any]],
    repeats: int,
    least_seconds: float,
    time_one: Callable,
) -> dict[str, list[float]]:
    """Times of all; one that fails now is put aside and the others start again."""

    def guarded(name: str) -> Callable:
        def work() -> None:
            try:
                works[name]()
            except Exception as error:
                raise _Failed(name) from error

        return work

    while works:
        try:
            everyone = {name: guarded(name) for name in works}
            return timing.in_turn(everyone, repeats, least_seconds, time_one)
        except _Failed as failed:
            (name,) = failed.args
            del works[name]
            found[name]["reason"] = _failure(failed.__cause__)
    return {}


class _Failed(Exception):
    """Names the contender whose call failed."""


def speedups(
    contenders: dict[str, dict[str, Any]], ours: Sequence[str] = OURS
) -> dict[str, dict[str, Any]]:
    """How many times faster the first of `ours` with a figure is than each other contender: medians
    over rounds, with quartiles. Empty where none of ours has a figure."""
    timed = {name: x["seconds"] for name, x in contenders.items() if "seconds" in x}
    us = next((name for name in ours if name in timed), None)
    found = {}
    for name, theirs in timed.items():
        if us is not None and name != us:
            ratios = [b / a for a, b in zip(timed[us], theirs, strict=True)]
            median, quartiles = timing.spread(ratios)
            found[name] = {"of": us, "ratio": median, "quartiles": quartiles}
    return found


def targets(rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Each target, whether it is reached, or the reason why these rows cannot tell (None)."""
    by_key = {_key(row): row for row in rows}
    said = []
    for target in TARGETS:
        ratio, reason = None, None
        row = by_key.get((target.op, *target.shape, target.direction))
        if device != "cuda":
            reason = "measured on a CPU; this is a target for a GPU"
        elif row is None:
            reason = "not measured yet"
        else:
            for name in ("triton", target.peer):
                entry = row["contenders"][name]
                if "seconds" not in entry:
                    reason = f"{name} has no figure: {entry['warning'] or entry['reason']}"
                    break
            else:
                ratio = row["speedups"][target.peer]["ratio"]
        said.append(
            {
                "op": target.op,
                **target.shape._asdict(),
                "direction": target.direction,
                "peer": target.peer,
                "target": target.ratio,
                "ratio": ratio,
                "reached": None if ratio is None else ratio >= target.ratio,
                "reason": reason,
            }
        )
    return said
