"""The ops of one checkout, timed on request: a process that `base` starts in each of two trees.

Run as a program, not imported. The files next to it come from the tree that compares, so that both
trees get the same work; the ops come from the tree in whose folder it was started. A request is a
line of JSON on standard input, its answer a line on what was standard output.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def _beside(name: str) -> ModuleType:
    path = Path(__file__).resolve().with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    # Where the class of a named tuple in it looks for its own module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class _Worker:
    def __init__(self) -> None:
        self.cases, self.timing = _beside("cases"), _beside("timing")
        self.work: Any = None
        self.time_one: Any = None

    def open(
        self, op: str, inputs: str, shape: list[int], direction: str, dtype: str, device: str,
        threads: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Prepare a call and warm it up; where its op lies, which path it took, its seconds."""
        import torch

        torch.set_num_threads(threads)
        self.close()
        given = self.cases.inputs(inputs, shape, getattr(torch, dtype), device)
        self.work = self.cases.job(self.cases.ours(op, "auto"), given, direction)
        self.time_one = self.timing.timer(device)
        seconds = [self.time_one(self.work) for _ in range(3)]
        dispatch = importlib.import_module("hybrid_sleep.kernels.common.dispatch")
        return {
            "file": sys.modules[f"hybrid_sleep.kernels.{op}"].__file__,
            "path": dispatch.explain(op)["implementation"],
            "seconds": seconds[-1],
        }

    def time(self, calls: int) -> dict[str, Any]:
        """The median of a few calls."""
        return {"seconds": statistics.median(self.time_one(self.work) for _ in range(calls))}

    def close(self) -> dict[str, Any]:
        """Free everything, so that the other tree has the memory."""
        import torch

        self.work = self.time_one = None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return {}


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Compilers and tuners print; their output must not look like an answer.
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        # Whatever a tree fails with is an answer, too.
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main()
