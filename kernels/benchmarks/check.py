"""Whether an implementation computes the op, checked before it is timed.

The standard is the op's fp64 reference on the CPU, on the rounded inputs: results, final state, and
with a backward pass every gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_sleep.kernels.benchmarks.cases import (
    BOTH,
    STATE,
    Compute,
    Inputs,
    Shape,
    inputs,
    job,
    on_tensors,
    ours,
)
from hybrid_sleep.kernels.benchmarks.ops import Op

TOKENS, HEADS = 257, 2
# The last two are those of an op with convolutions.
RESULTS = ("output", "state", "tail of q", "tail of kv")
# What the tests on a GPU allow as well. The chunked path multiplies in float32 whatever it is
# given, so twice its error alone would forbid products of half precision.
FLOOR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# A baseline is not ours to correct: only what is not the same op at all is called wrong.
BASELINE_TOLERANCE = 0.05


class Expected(NamedTuple):
    """One small call of an op: its inputs on a device, and what each result must be, how nearly."""

    given: Inputs
    direction: str
    results: list[Tensor]
    tolerances: list[float]
    names: list[str]


def expected(op: Op, shape: Shape, direction: str, dtype: torch.dtype, device: Any) -> Expected:
    """A call like one of `shape`, but of one sequence, two heads and few tokens, an odd number.

    Each result may be off by twice what the chunked path is in the same dtype and FLOOR of it,
    relative to the norm.
    """
    shape = shape._replace(T=min(shape.T, TOKENS), B=1, H=HEADS)
    given = inputs(op.inputs, shape, dtype, device, drawn_on="cpu")
    exact = on_tensors(lambda x: x.cpu().double(), given)
    results = job(ours(op.op, "reference"), exact, direction)()
    chunked = job(ours(op.op, "chunked"), given, direction)()
    tolerances = [2 * error(x, y) + FLOOR[dtype] for x, y in zip(chunked, results, strict=True)]
    tensors = [name for name, x in given.items() if isinstance(x, Tensor)]
    gradients = [f"gradient of {name}" for name in tensors] if direction == BOTH else []
    outputs = RESULTS[1:] if direction == STATE else RESULTS
    names = [*outputs[: len(results) - len(gradients)], *gradients]
    return Expected(given, direction, results, tolerances, names)


def error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference relative to that of `exact`; infinite where it is not finite."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    relative = float((found - exact).norm() / exact.norm())
    return relative if math.isfinite(relative) else math.inf


def wrong(call: Expected, compute: Compute) -> str | None:
    """Which results of our `compute` are beyond their tolerance, in words, or None."""
    return _beyond(job(compute, call.given, call.direction)(), call, call.tolerances)


def wrong_baseline(call: Expected, compute: Compute, given: Inputs | None) -> str | None:
    """Which results of a baseline are wrong, in words, or None; of inputs in a form of its own,
    `given`, no gradients are compared."""
    if given is None:
        found = job(compute, call.given, call.direction)()
    else:
        found = list(compute(given, True))
    return _beyond(found, call, [BASELINE_TOLERANCE] * len(found))


def _beyond(found: list[Tensor], call: Expected, tolerances: list[float]) -> str | None:
    problems = []
    for name, x, y, tolerance in zip(call.names, found, call.results, tolerances, strict=False):
        off = error(x, y)
        if not off <= tolerance:
            problems.append(f"{name} is off by {off:.1e}, where {tolerance:.1e} is allowed")
    return "; ".join(problems) or None
