"""What is timed: inputs of each op at a shape, and one call of it in each direction.

Imports torch alone at its top: `worker.py` loads this file together with the ops of another commit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

FORWARD, STATE, BOTH = "forward", "state only", "forward + backward"
WIDTH = 4

# By name: tensors, and sizes that no tensor shows.
Inputs = dict[str, Any]
# What is timed: of named inputs, and of whether the output is needed besides the state.
Compute = Callable[[Inputs, bool], Sequence[Tensor]]


class Shape(NamedTuple):
    """B sequences of T tokens, H heads, K = V = d."""

    T: int
    B: int
    H: int
    d: int


def gated_delta_rule(shape: Shape, draw: Callable[..., Tensor], dtype: torch.dtype) -> Inputs:
    """q, k, v in `dtype`; gates and state in float32, in which they are made and kept."""
    T, B, H, d = shape
    return {**ssd(shape, draw, dtype, groups=H), "beta": draw(B, T, H).sigmoid()}


def ssd(shape: Shape, draw: Callable[..., Tensor], dtype: torch.dtype, groups: int = 1) -> Inputs:
    """As `gated_delta_rule` without beta, q and k shared by all heads, as Mamba-2 has them.

    The decay leaves a token at most a few hundred tokens and at least ten.
    """
    T, B, H, d = shape
    q, k = (normalize(draw(B, T, groups, d), dim=-1).to(dtype) for _ in range(2))
    g = -0.003 - 0.05 * draw(B, T, H).abs()
    return {
        "q": q,
        "k": k,
        "v": draw(B, T, H, d).to(dtype),
        "g": g,
        "initial_state": draw(B, H, d, d),
    }


def short_conv(shape: Shape, draw: Callable[..., Tensor], dtype: torch.dtype) -> Inputs:
    """q, k and v side by side, 3 * H * d channels, as a layer convolves them."""
    T, B, H, d = shape
    channels = 3 * H * d
    return {
        "x": draw(B, T, channels).to(dtype),
        "weight": draw(channels, WIDTH).to(dtype),
        "bias": draw(channels).to(dtype),
        "initial_state": draw(B, WIDTH - 1, channels).to(dtype),
    }


def mamba2(
    shape: Shape, draw: Callable[..., Tensor], dtype: torch.dtype, groups: int = 1
) -> Inputs:
    """What the projections of a layer give, and its parameters; q and k shared by all heads.

    The decay is about that of `ssd`.
    """
    T, B, H, d = shape
    keys, both = groups * d, groups * d + H * d
    return {
        "q": draw(B, T, keys).to(dtype),
        "kv": draw(B, T, both).to(dtype),
        "a": draw(B, T, H).to(dtype),
        "q_weight": draw(keys, WIDTH).to(dtype) / 2,
        "kv_weight": draw(both, WIDTH).to(dtype) / 2,
        "A_log": -3 + 0.3 * draw(H),
        "dt_bias": draw(H) / 2,
        "skip": draw(H),
        "key_heads": groups,
        "initial_state": draw(B, H, d, d),
        "q_tail": draw(B, WIDTH - 1, keys).to(dtype),
        "kv_tail": draw(B, WIDTH - 1, both).to(dtype),
    }


def gated_delta_net(shape: Shape, draw: Callable[..., Tensor], dtype: torch.dtype) -> Inputs:
    """As `mamba2`, one key per head, and raw write strengths instead of skips."""
    T, B, H, d = shape
    made = mamba2(shape, draw, dtype, groups=H)
    del made["skip"]
    return {**made, "b": draw(B, T, H).to(dtype)}


def inputs(
    name: str, shape: Sequence[int], dtype: torch.dtype, device: Any, drawn_on: Any = None
) -> Inputs:
    """Inputs that the function `name` of this module makes, on `device`; always the same values
    where they are drawn on the same kind of device (`drawn_on`, by default `device`)."""
    place = torch.device(device if drawn_on is None else drawn_on)
    generator = torch.Generator(place).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=place)

    made = globals()[name](Shape(*shape), draw, dtype)
    return on_tensors(lambda x: x.to(device), made)


def on_tensors(change: Callable[[Tensor], Tensor], given: Inputs) -> Inputs:
    """`given` with `change` applied to its tensors."""
    return {name: change(x) if isinstance(x, Tensor) else x for name, x in given.items()}


def ours(op: str, impl: str) -> Compute:
    """The public op, with `impl` forced."""
    function = getattr(importlib.import_module(f"hybrid_sleep.kernels.{op}"), op)

    def compute(given: Inputs, output: bool) -> list[Tensor]:
        options = {} if output else {"output": False}
        return [x for x in function(**given, impl=impl, **options) if x is not None]

    return compute


def job(compute: Compute, given: Inputs, direction: str) -> Callable[[], list[Tensor]]:
    """One call of `compute` as a function of nothing, which returns results, then gradients."""
    if direction != BOTH:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return list(compute(given, direction == FORWARD))

        return forward
    given = on_tensors(lambda x: x.detach().requires_grad_(), given)
    leaves = [x for x in given.values() if isinstance(x, Tensor)]
    grad_outputs: list[Tensor] = []

    def both_ways() -> list[Tensor]:
        results = list(compute(given, True))
        if not grad_outputs:
            # Drawn on the CPU and rounded to bf16, they are the same on every device and in every
            # dtype; one vector is repeated, since drawing all of them would take minutes.
            drawn = torch.Generator().manual_seed(1)
            for x in results:
                vector = torch.randn(x.shape[-1], generator=drawn).bfloat16().to(x)
                grad_outputs.append(vector.expand(x.shape).contiguous())
        return [*results, *torch.autograd.grad(results, leaves, grad_outputs)]

    return both_ways
