"""Inputs of the two state-space ops, so that what must hold for both is tested on both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.ssd import ssd


# Session scope: hypothesis runs many examples in one test, and neither fixture has state.
@pytest.fixture(params=[gated_delta_rule, ssd], ids=lambda op: op.__name__, scope="session")
def op(request) -> Callable:
    return request.param


@pytest.fixture(scope="session")
def make() -> Callable:
    return make_inputs


def make_inputs(
    op: Callable,
    B: int = 2,
    T: int = 7,
    H: int = 2,
    K: int = 3,
    V: int = 4,
    G: int = 1,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """Keyword arguments of `op`, `initial_state` included; ssd has G key groups."""
    groups = H if op is gated_delta_rule else G
    inputs = {
        "q": normalize(torch.randn(B, T, groups, K, dtype=dtype), dim=-1),
        "k": normalize(torch.randn(B, T, groups, K, dtype=dtype), dim=-1),
        "v": torch.randn(B, T, H, V, dtype=dtype),
        "g": -torch.rand(B, T, H, dtype=dtype),
    }
    if op is gated_delta_rule:
        inputs["beta"] = torch.rand(B, T, H, dtype=dtype)
    inputs["initial_state"] = torch.randn(B, H, K, V, dtype=dtype)
    return inputs
