"""Gates at the edge of what a log decay may be, and how a gradient of them is held to fp64."""

from __future__ import annotations

import torch

# Position (None: everywhere) -> gate, of 24 tokens whose other gates are weak.
GATES: dict[str, dict[int | None, float]] = {
    "none": {None: 0.0},
    "-5 each": {None: -5.0},
    "-50 each": {None: -50.0},
    "-50 at every seventh": dict.fromkeys(range(0, 24, 7), -50.0),
    "one of -1e4": {11: -1e4},
    "one of -1e30": {11: -1e30},
    "one of -inf": {11: -float("inf")},
    "mixed": {3: -50.0, 5: -1e4, 11: -1e30, 14: -float("inf"), 21: -5.0, 22: -20.0},
}


def with_gates(inputs: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The inputs with these gates, all of them numbers of fp32, in fp64."""
    g = inputs["g"] * 0.2
    for at, gate in GATES[name].items():
        g[:, slice(None) if at is None else at] = gate
    return {n: x.float().double() for n, x in (inputs | {"g": g}).items()}


def differentiate(op, inputs, dtype, **options) -> dict[str, torch.Tensor]:
    """o, S and the gradients by name, of one fixed random function of both."""
    leaves = {n: x.detach().to(dtype, copy=True).requires_grad_() for n, x in inputs.items()}
    o, S = op(**leaves, **options)
    drawn = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(x.shape, generator=drawn).to(x) for x in (o, S)]
    torch.autograd.backward([o, S], grad_outputs)
    return {"o": o.detach(), "S": S.detach()} | {f"d{n}": x.grad for n, x in leaves.items()}


def far(found, wanted, limit: float, through: float) -> dict[str, float]:
    """What is off by more than `limit` of its own norm, however small that is; the gradients of
    the gates and of the initial state, which go through every decay, by more than `through`."""
    errors = {}
    for name, x in wanted.items():
        off = (found[name].cpu().double() - x).norm() / x.norm().clamp(min=1e-300)
        if not off <= (through if name in ("dg", "dinitial_state") else limit):
            errors[name] = float(off)
    return errors
