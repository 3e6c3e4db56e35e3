"""The ops of this tree against those of another commit, each in a process of its own.

Both processes live through the whole comparison and work alternately, a few calls at a time, so
that other load on the machine slows both. A ratio is that of one such pair.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hybrid_sleep
from hybrid_sleep.kernels.benchmarks import timing
from hybrid_sleep.kernels.benchmarks.cases import Shape
from hybrid_sleep.kernels.benchmarks.ops import Op, ended
from hybrid_sleep.support.provenance import check_device, provenance
from hybrid_sleep.support.records import write_records
from hybrid_sleep.support.resume import Budget, finished_rows
from hybrid_sleep.validation import check_count

BURST_SECONDS = 0.02
MOST_CALLS = 50
WORKER = Path(__file__).with_name("worker.py")


def root() -> Path:
    """The checkout that this package runs from; ValueError where it is none, or has no git."""
    folder = Path(hybrid_sleep.__file__).resolve().parents[1]
    if not (folder / ".git").exists() or not (folder / "kernels").is_dir():
        raise ValueError(f"base needs a git checkout to compare with, and {folder} is none")
    return folder


def run(
    revision: str,
    ops: Sequence[Op],
    *,
    device: str = "cpu",
    shapes: Sequence[Shape] | None = None,
    repeats: int = 7,
    minutes: float | None = None,
    checkout: Path | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time this tree, with its uncommitted changes, and `revision` on every shape (default: each
    op's own) and direction; float32 on a CPU, bfloat16 on a GPU.

    A row's `ratio` is the median over `repeats` rounds of the revision's time over this tree's
    (above 1: this tree is faster). With `out`, results.json is written there after each row, and
    rows that it has from the same two states, versions and device are kept. With `minutes` the work
    stops before they are over, and `complete` is False.

    Raises ValueError for a device that is not here, an unknown revision, a tree without git,
    `repeats` below 2 or `minutes` not above 0; ChildProcessError where the ops of either cannot
    run at all.
    """
    check_device(device)
    check_count("repeats", repeats, 2)
    budget = Budget(minutes)
    checkout = root() if checkout is None else checkout
    commit = _commit(checkout, revision)
    now = {**provenance(device), "base": commit}
    if shapes is not None:
        ops = [replace(op, shapes=tuple(shapes)) for op in ops]
    planned = {
        (op.name, *shape, direction): (op, shape, direction)
        for op in ops
        for shape in op.shapes
        for direction in op.directions
    }
    rows = {_key(row): row for row in finished_rows(out, "base", now)}

    def result() -> dict[str, Any]:
        return {
            "benchmark": "base",
            **ended(all(key in rows for key in planned)),
            "revision": revision,
            "rows": list(rows.values()),
            "command": command,
            "provenance": now,
        }

    missing = {key: one for key, one in planned.items() if key not in rows}
    if not missing:
        return result()
    with _worktree(checkout, commit) as before, _worker(checkout) as ours, _worker(before) as base:
        for index, (key, one) in enumerate(missing.items()):
            if index and budget.over():
                break
            rows[key] = _row(*one, device, repeats, ours, base)
            if out is not None:
                write_records(out / "results.json", result())
            if progress is not None:
                progress(sum(key in rows for key in planned), len(planned))
    return result()


def _key(row: dict[str, Any]) -> tuple:
    return (row["op"], row["T"], row["B"], row["H"], row["d"], row["direction"])


def _row(
    op: Op, shape: Shape, direction: str, device: str, repeats: int, ours: _Tree, base: _Tree
) -> dict[str, Any]:
    dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    row = {
        "op": op.name,
        **shape._asdict(),
        "direction": direction,
        "dtype": dtype,
        "reason": None,
    }
    request = {
        "do": "open",
        "op": op.op,
        "inputs": op.inputs,
        "shape": list(shape),
        "direction": direction,
        "dtype": dtype,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    opened = {tree.name: tree.request(**request) for tree in (ours, base)}
    failed = [f"{name}: {x['error']}" for name, x in opened.items() if "error" in x]
    if failed:
        return {**row, "reason": "; ".join(failed)}
    for tree in (ours, base):
        tree.check_place(opened[tree.name]["file"])
    longest = max(x["seconds"] for x in opened.values())
    calls = min(MOST_CALLS, max(1, math.ceil(BURST_SECONDS / max(longest, 1e-9))))
    seconds = timing.interleaved(
        {
            tree.name: functools.partial(tree.request, do="time", calls=calls)
            for tree in (ours, base)
        },
        repeats,
        0,
        lambda time: time()["seconds"],
    )
    for tree in (ours, base):
        tree.request(do="close")
    here, there = seconds[ours.name], seconds[base.name]
    ratios = [b / a for a, b in zip(here, there, strict=True)]
    ratio, quartiles = timing.median_and_quartiles(ratios)
    return {
        **row,
        "calls": calls,
        "paths": [opened[ours.name]["path"], opened[base.name]["path"]],
        "ratio": ratio,
        "quartiles": quartiles,
        "seconds": here,
        "base_seconds": there,
    }


def _git(checkout: Path, *words: str) -> subprocess.CompletedProcess:
    command = ["git", "-C", str(checkout), "-c", "core.hooksPath=/dev/null", *words]
    return subprocess.run(command, capture_output=True, text=True)


def _commit(checkout: Path, revision: str) -> str:
    name = f"{revision}^{{commit}}"
    done = _git(checkout, "rev-parse", "--verify", "--quiet", "--end-of-options", name)
    if done.returncode:
        raise ValueError(f"base must be a commit that git knows in {checkout}, got {revision!r}")
    return done.stdout.strip()


@contextlib.contextmanager
def _worktree(checkout: Path, commit: str) -> Iterator[Path]:
    """A folder with the files of `commit`, which is gone afterwards, from git's records as well."""
    folder = Path(tempfile.mkdtemp(prefix="hybrid-sleep-base-"))
    tree = folder / "tree"
    try:
        done = _git(checkout, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        if done.returncode:
            raise ValueError(f"git worktree add failed for base {commit}: {done.stderr.strip()}")
        yield tree
    finally:
        _git(checkout, "worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder, ignore_errors=True)
        _git(checkout, "worktree", "prune")


class _Tree:
    """The checkout `folder`, with a worker process that runs its ops."""

    def __init__(self, folder: Path, process: subprocess.Popen, errors: Any):
        self.folder, self.process, self.errors = folder, process, errors
        self.name = str(folder)

    def request(self, **request: Any) -> dict[str, Any]:
        """The worker's answer; ChildProcessError if it ended instead, with its last line."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or ["nothing"]
            raise ChildProcessError(f"the ops of {self.folder} cannot run; last line: {lines[-1]}")
        return json.loads(answer)

    def check_place(self, file: str) -> None:
        """ChildProcessError unless `file` lies in this tree."""
        if not Path(file).resolve().is_relative_to(self.folder.resolve()):
            raise ChildProcessError(f"the ops of {self.folder} were to run, and {file} did")


@contextlib.contextmanager
def _worker(folder: Path) -> Iterator[_Tree]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    # Named on the command line, the file's folder would be the first to import from; so the tree
    # is, by PYTHONPATH and as the current folder.
    program = f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')"
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Ctrl-C is for the parent, which ends its workers in order.
            start_new_session=True,
        )
        try:
            yield _Tree(folder, process, errors)
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
