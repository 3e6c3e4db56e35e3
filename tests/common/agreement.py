"""What an op gives, gradients included, and how nearly two implementations of it agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Largest differences, relative to the largest value where that is above 1.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value of `wanted` where that is above 1."""
    found, wanted = found.detach().double(), wanted.detach().double()
    assert found.shape == wanted.shape
    if wanted.numel() == 0:
        return 0.0
    worst = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    return float(worst.nan_to_num(float("inf")))


def results(
    op: Callable[..., Any],
    inputs: dict[str, Tensor],
    names: Sequence[str],
    dtype: torch.dtype = torch.float64,
    only: str | None = None,
    guard: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """What `op` returns by `names`, and as d<name> the gradients of its inputs, in `dtype`.

    The gradients are those of one fixed random function of the results, or of `only` one of them.
    guard: see `Guards`. A result or gradient of None is left out.
    """
    leaves = {n: x.detach().to(dtype, copy=True).requires_grad_() for n, x in inputs.items()}
    given = leaves if guard is None else {name: guard(x) for name, x in leaves.items()}
    returned = op(**given, **options)
    returned = (returned,) if isinstance(returned, Tensor) else returned
    found = {name: x for name, x in zip(names, returned, strict=False) if x is not None}
    random = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    grad_outputs = {n: torch.randn(x.shape, **random).to(dtype) for n, x in found.items()}
    chosen = [n for n in found if only in (None, n) and found[n].requires_grad]
    torch.autograd.backward([found[n] for n in chosen], [grad_outputs[n] for n in chosen])
    return found | {f"d{name}": x.grad for name, x in given.items() if x.grad is not None}


def compare(
    wanted: dict[str, Tensor],
    found: dict[str, Tensor],
    dtype: torch.dtype = torch.float64,
    absent_is_zero: bool = False,
) -> None:
    """Assert that both have the same names and, within TOLERANCE of `dtype`, the same values.

    absent_is_zero: a gradient that one of them leaves out must be zero in the other.
    """
    for name in wanted.keys() ^ found.keys():
        assert absent_is_zero and name.startswith("d"), name
        assert not (wanted | found)[name].any(), name
    both = wanted.keys() & found.keys()
    assert {n: e for n in both if not (e := error(found[n], wanted[n])) <= TOLERANCE[dtype]} == {}
