"""Whether a contender computes the op, asked before its time is taken.

The question is put to the op's fp64 reference on the CPU, after the inputs were rounded: results,
final state, and with a backward pass every gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_sleep.kernels.benchmarks.cases import (
    BOTH,
    STATE,
    Inputs,
    Shape,
    Side,
    inputs,
    job,
    on_tensors,
    ours,
)
from hybrid_sleep.kernels.benchmarks.contenders import Op

TOKENS, HEADS = 257, 2
# The last two are those of an op with convolutions.
RESULTS = ("output", "state", "tail of q", "tail of kv")
# What the tests on a GPU allow as well. The chunked path multiplies in float32 whatever it is
# given, so twice its error alone would forbid products of half precision.
FLOOR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# A peer is somebody else's responsibility: only what is not the same op at all is called wrong.
PEERS_TOLERANCE = 0.05


class Question(NamedTuple):
    """One small call of `op`: its inputs on a device, and what each result is within."""

    given: Inputs
    direction: str
    wanted: list[Tensor]
    tolerances: list[float]
    names: list[str]


def question(op: Op, shape: Shape, direction: str, dtype: torch.dtype, device: Any) -> Question:
    """A call like one of `shape`, but of one sequence, two heads and few tokens, an odd number.

    Each result may be off by twice what the chunked path is in the same dtype and FLOOR of it,
    relative to the norm.
    """
    shape = shape._replace(T=min(shape.T, TOKENS), B=1, H=HEADS)
    given = inputs(op.inputs, shape, dtype, device, drawn_on="cpu")
    exact = on_tensors(lambda x: x.cpu().double(), given)
    wanted = job(ours(op.op, "reference"), exact, direction)()
    chunked = job(ours(op.op, "chunked"), given, direction)()
    tolerances = [2 * error(x, y) + FLOOR[dtype] for x, y in zip(chunked, wanted, strict=True)]
    tensors = [name for name, x in given.items() if isinstance(x, Tensor)]
    slopes = [f"gradient of {name}" for name in tensors] if direction == BOTH else []
    results = RESULTS[1:] if direction == STATE else RESULTS
    names = [*results[: len(wanted) - len(slopes)], *slopes]
    return Question(given, direction, wanted, tolerances, names)


def error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference relative to that of `wanted`; infinite for what is no number."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    relative = float((found - wanted).norm() / wanted.norm())
    return relative if math.isfinite(relative) else math.inf


def wrong(asked: Question, side: Side) -> str | None:
    """What of our `side` is beyond its tolerance, or None."""
    found = job(side, asked.given, asked.direction)()
    return _beyond(found, asked, asked.tolerances)


def wrong_peer(asked: Question, side: Side, given: Inputs | None) -> str | None:
    """What of a peer's `side` is wrong, or None; with inputs of its own form, `given`, its results
    alone are compared."""
    direction = asked.direction
    if given is None:
        found = job(side, asked.given, direction)()
    else:
        found = list(side(given, True))
    return _beyond(found, asked, [PEERS_TOLERANCE] * len(found))


def _beyond(found: list[Tensor], asked: Question, tolerances: list[float]) -> str | None:
    said = []
    for name, x, y, tolerance in zip(asked.names, found, asked.wanted, tolerances, strict=False):
        off = error(x, y)
        if not off <= tolerance:
            said.append(f"{name} is off by {off:.1e}, where {tolerance:.1e} is allowed")
    return "; ".join(said) or None
