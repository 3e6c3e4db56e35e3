"""What is measured: every op with its inputs, its least cost, and baseline implementations.

To measure another op, or another use of one (such as single tokens), add an entry to OPS.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybrid_sleep.kernels.benchmarks import roofline
from hybrid_sleep.kernels.benchmarks.cases import (
    BOTH,
    FORWARD,
    STATE,
    WIDTH,
    Compute,
    Inputs,
    Shape,
)
from hybrid_sleep.support.markdown import DONE
from hybrid_sleep.validation import check_choice

OURS = ("triton", "chunked")
# A batch that fills a GPU, one window of a model that sleeps, one long sequence.
SHAPES = (
    Shape(T=8192, B=8, H=16, d=128),
    Shape(T=2048, B=1, H=8, d=128),
    Shape(T=32768, B=1, H=32, d=128),
)


class Unavailable(Exception):
    """An implementation cannot run here; the text says why."""


class Baseline(NamedTuple):
    """An implementation of another project, to compare with.

    load: returns it, taking and returning what this package's op does (it gives no state alone);
        raises Unavailable.
    prepare: the inputs in the form that it takes, made before the clock runs; the gradients are
        then those of that form. None where it takes the inputs as they are.
    gpu: whether it runs on a GPU alone.
    """

    name: str
    load: Callable[[], Compute]
    prepare: Callable[[Inputs], Inputs] | None = None
    gpu: bool = True


@dataclass(frozen=True)
class Op:
    """One entry of the benchmark.

    name: of the entry; `op` is the public function's, and its module's under hybrid_sleep.kernels.
    inputs: the function of `cases` that makes them.
    cost: the least one call moves and multiplies, from (shape, direction, bytes of a number).
    ours: the implementations of this package to time; the first with a figure is compared.
    """

    name: str
    op: str
    inputs: str
    cost: Callable[[Shape, str, int], roofline.Cost]
    baselines: tuple[Baseline, ...]
    directions: tuple[str, ...] = (FORWARD, STATE, BOTH)
    shapes: tuple[Shape, ...] = SHAPES
    ours: tuple[str, ...] = OURS


class Target(NamedTuple):
    """How many times faster than `baseline` ours should be."""

    op: str
    shape: Shape
    direction: str
    baseline: str
    ratio: float


def _fla() -> Compute:
    compute = _load("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    return lambda given, output: compute(**given, output_final_state=True)


def _transformers_delta_rule() -> Compute:
    compute = _fallback("qwen3_next", "torch_chunk_gated_delta_rule")

    def run(given: Inputs, output: bool) -> tuple:
        # By position, since releases of transformers name them differently.
        q, k, v, g, beta = (given[name] for name in ("q", "k", "v", "g", "beta"))
        state = given["initial_state"]
        return compute(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)

    return run


def _steps(given: Inputs) -> Inputs:
    """q, k, v, g as C, B, x, dt with A = -1: dt = -g and x = v / dt, for g below 0."""
    v, dt = given["v"], -given["g"]
    return {
        "x": (v.float() / dt[..., None]).to(v.dtype),
        "dt": dt,
        "B": given["k"],
        "C": given["q"],
        "initial_states": given["initial_state"].mT.contiguous(),
    }


def _mamba_scan(compute: Callable) -> Compute:
    # A is a constant of a model: making it is not part of a call.
    constants: dict[int, torch.Tensor] = {}

    def run(given: Inputs, output: bool) -> tuple:
        x, dt, B, C = (given[name] for name in ("x", "dt", "B", "C"))
        heads = x.shape[2]
        if heads not in constants:
            constants[heads] = -torch.ones(heads, device=x.device)
        state = given["initial_states"]
        o, S = compute(
            x, dt, constants[heads], B, C, 256, initial_states=state, return_final_states=True
        )
        return o, S.mT

    return run


def _mamba_ssm() -> Compute:
    return _mamba_scan(_load("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"))


def _transformers_ssd() -> Compute:
    return _mamba_scan(_fallback("mamba2", "mamba2_chunk_scan"))


def _causal_conv1d() -> Compute:
    compute = _load("causal_conv1d", "causal_conv1d_fn")

    def run(given: Inputs, output: bool) -> tuple:
        y, state = compute(
            given["x"].mT,
            given["weight"],
            given["bias"],
            initial_states=given["initial_state"].mT,
            return_final_states=True,
            activation="silu",
        )
        return y.mT, state.mT

    return run


def _transformers_conv() -> Compute:
    compute = _fallback("qwen3_next", "causal_conv1d_fn")

    def run(given: Inputs, output: bool) -> tuple:
        # It has no state: the tokens before go in front, and their outputs are dropped.
        x = torch.cat([given["initial_state"], given["x"]], 1)
        y = compute(x.mT, given["weight"], given["bias"], activation="silu").mT
        return y[:, WIDTH - 1 :], x[:, x.shape[1] - (WIDTH - 1) :]

    return run


def _load(module: str, name: str) -> Callable:
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"not installed: {error}") from error
    # Kernel packages fail to import in every way there is: a driver, a compiler, an ABI.
    except Exception as error:
        raise Unavailable(f"importing {module} failed: {type(error).__name__}: {error}") from error


def _fallback(model: str, name: str) -> Callable:
    """A PyTorch function of transformers, without the decorator that would prefer a package."""
    return inspect.unwrap(_load(f"transformers.models.{model}.modeling_{model}", name))


OPS = (
    Op(
        "gated_delta_rule",
        "gated_delta_rule",
        "gated_delta_rule",
        roofline.gated_delta_rule,
        (Baseline("fla", _fla), Baseline("transformers", _transformers_delta_rule, gpu=False)),
    ),
    Op(
        "ssd",
        "ssd",
        "ssd",
        roofline.ssd,
        (
            Baseline("mamba_ssm", _mamba_ssm, prepare=_steps),
            Baseline("transformers", _transformers_ssd, prepare=_steps, gpu=False),
        ),
    ),
    Op(
        "short_conv",
        "short_conv",
        "short_conv",
        roofline.short_conv,
        (
            Baseline("causal_conv1d", _causal_conv1d),
            Baseline("transformers", _transformers_conv, gpu=False),
        ),
        # Its state is the tail of its input: there is nothing to compute without the output.
        directions=(FORWARD, BOTH),
    ),
    # Whole mixers, from raw projections on: no other project has an op of the same extent.
    Op("gated_delta_net", "gated_delta_net", "gated_delta_net", roofline.gated_delta_net, ()),
    Op("mamba2", "mamba2", "mamba2", roofline.mamba2, ()),
)

TARGETS = (
    Target("gated_delta_rule", SHAPES[0], FORWARD, "fla", 2.5),
    Target("gated_delta_rule", SHAPES[0], BOTH, "fla", 1.5),
)


def ended(complete: bool) -> dict[str, Any]:
    """What a result says of how its work ended."""
    return {"complete": complete, "ended": DONE if complete else "time is up"}


def chosen(names: str | None) -> tuple[Op, ...]:
    """The entries that a comma-separated list names, in the order of OPS; all of them for None.

    Raises ValueError for a name that is not there.
    """
    if names is None:
        return OPS
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        check_choice("ops", name, tuple(op.name for op in OPS))
    return tuple(op for op in OPS if op.name in chosen)
