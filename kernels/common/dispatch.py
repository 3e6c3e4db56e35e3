"""Which implementation of an op runs: one registry, and a record of what it took and why.

Every op folder registers its implementations here when it is imported. `impl="auto"` tries them,
highest rank first; any other `impl` forces one, and an implementation
that cannot run the call says so in the error. Nothing here looks at the contents of a tensor.

Adding an implementation means registering it, from its op's `__init__.py`:

    register("ssd", "triton", run, rank=50, wants=..., rejects=...)
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_sleep.validation import check_choice

OPS = ("gated_delta_net", "mamba2", "gated_delta_rule", "ssd", "short_conv", "gated_norm")
OWN = ("reference", "chunked", "triton")
PEERS = ("fla", "mamba_ssm", "causal_conv1d")
NAMES = (*OWN, *PEERS)


class Call(NamedTuple):
    """What a choice may depend on: metadata of the inputs, never their values.

    dims: the op's inner dimensions that limit a kernel (K and V; the width of a filter).
    grad: whether a gradient may be needed.
    """

    device: str
    dtype: torch.dtype
    batch: int
    tokens: int
    heads: int = 1
    dims: tuple[int, ...] = ()
    mask: bool = False
    grad: bool = False


def call_of(
    x: Tensor,
    others: Iterable[Tensor | None],
    batch: int,
    tokens: int,
    heads: int,
    dims: tuple[int, ...],
    mask: Tensor | None,
) -> Call:
    """The Call of an op whose main input is `x` and whose other inputs are `others`.

    Its dtype is float64 if any of them is: that decides what can compute it.
    """
    tensors = [x, *(y for y in others if y is not None)]
    grad = torch.is_grad_enabled() and any(y.requires_grad for y in tensors)
    double = any(y.dtype == torch.float64 for y in tensors)
    dtype = torch.float64 if double else x.dtype
    return Call(x.device.type, dtype, batch, tokens, heads, dims, mask is not None, grad)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op, and when.

    wants: why `impl="auto"` should take it for a call, or None.
    rejects: why it cannot run a call at all, or None.
    """

    name: str
    run: Callable
    rank: int
    wants: Callable[[Call], str | None]
    rejects: Callable[[Call], str | None]


class Path(NamedTuple):
    """The path one call took: which implementation, what was requested, and why."""

    name: str
    requested: str
    reason: str
    call: Call


_registry: dict[str, list[Implementation]] = {op: [] for op in OPS}
_last: dict[str, Path] = {}


def _never(call: Call) -> None:
    return None


def register(
    op: str,
    name: str,
    run: Callable,
    *,
    rank: int,
    wants: Callable[[Call], str | None],
    rejects: Callable[[Call], str | None] = _never,
) -> None:
    """Add an implementation of `op`. `impl="auto"` tries higher ranks first.

    Raises ValueError for an op or name that is not in OPS or NAMES, or a name already taken.
    """
    check_choice("op", op, OPS)
    check_choice("name", name, NAMES)
    if any(entry.name == name for entry in _registry[op]):
        raise ValueError(f"name must be one that {op} does not have yet, got {name!r}")
    _registry[op].append(Implementation(name, run, rank, wants, rejects))
    _registry[op].sort(key=lambda entry: -entry.rank)


def register_pytorch(op: str, reference: Callable, chunked: Callable) -> None:
    """Add the two implementations that every op has: sequential for one token, chunked for more."""
    register(
        op,
        "reference",
        reference,
        rank=100,
        wants=lambda call: "one token is one step" if call.tokens == 1 else None,
    )
    register(op, "chunked", chunked, rank=0, wants=lambda call: "several tokens, any device")


def select(op: str, impl: str, call: Call) -> Callable:
    """The function that runs `call`, recorded for `explain`.

    Raises ValueError when `impl` is no known name, is not registered for the op, or rejects the
    call; RuntimeError when no implementation takes it.
    """
    path, run = _choose(op, impl, call)
    _last[op] = path
    return run


def _choose(op: str, impl: str, call: Call) -> tuple[Path, Callable]:
    entries = _registry[op]
    if impl == "auto":
        for entry in entries:
            reason = entry.wants(call)
            if reason is not None and entry.rejects(call) is None:
                return Path(entry.name, impl, reason, call), entry.run
        raise RuntimeError(f"no implementation of {op} takes {call}")
    check_choice(f"impl of {op}", impl, ("auto", *(entry.name for entry in entries)))
    (entry,) = (entry for entry in entries if entry.name == impl)
    reason = entry.rejects(call)
    if reason is not None:
        raise ValueError(f"impl of {op} must be one that can run this call, got {impl!r}: {reason}")
    return Path(impl, impl, "forced", call), entry.run


@contextlib.contextmanager
def forced(op: str, name: str) -> Iterator[None]:
    """Within the block every call of `op` goes to implementation `name`, whatever it rejects.

    For looking at what an implementation does where it cannot run. Raises ValueError when `op` or
    `name` is not registered.
    """
    check_choice("op", op, OPS)
    importlib.import_module(f"hybrid_sleep.kernels.{op}")
    check_choice(f"name of an implementation of {op}", name, tuple(e.name for e in _registry[op]))
    (entry,) = (entry for entry in _registry[op] if entry.name == name)
    before = _registry[op]
    _registry[op] = [replace(entry, wants=lambda call: "forced", rejects=_never)]
    try:
        yield
    finally:
        _registry[op] = before


def explain(
    op: str,
    *,
    tokens: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> dict[str, Any]:
    """What `op` would run, or last ran, and why.

    With `tokens`: the path `impl="auto"` would take for such a call. Without: the last path taken
    in this process, with `implementation` None if the op has not run yet.

    Returns `op`, `implementation`, `requested`, `reason`, `call` (device, dtype, batch, tokens, or
    None) and `candidates`: name -> why it is not used for that call (or "" for the one taken).
    Raises ValueError when `op` is not one of OPS.
    """
    check_choice("op", op, OPS)
    importlib.import_module(f"hybrid_sleep.kernels.{op}")
    if tokens is None:
        path = _last.get(op)
    else:
        path = _choose(op, "auto", Call(device, dtype, batch, tokens))[0]
    candidates = {}
    for name in NAMES:
        entry = next((entry for entry in _registry[op] if entry.name == name), None)
        if entry is None:
            # Peers that only other ops have are left out: nothing is missing here.
            if name in OWN:
                candidates[name] = "not implemented"
        elif path is None or path.name == name:
            candidates[name] = ""
        else:
            candidates[name] = entry.rejects(path.call) or f"{path.name} is preferred"
    return {
        "op": op,
        "implementation": path and path.name,
        "requested": path and path.requested,
        "reason": path.reason if path else "has not run in this process",
        "call": path
        and {
            "device": path.call.device,
            "dtype": str(path.call.dtype).removeprefix("torch."),
            "batch": path.call.batch,
            "tokens": path.call.tokens,
        },
        "candidates": candidates,
    }


def paths() -> list[dict[str, Any]]:
    """`explain` of every op: the last path each took in this process."""
    return [explain(op) for op in OPS]
