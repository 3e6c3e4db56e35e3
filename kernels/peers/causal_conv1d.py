"""The short convolution by causal-conv1d (https://github.com/Dao-AILab/causal-conv1d)."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from hybrid_sleep.kernels.common.dispatch import Call

MODULE = "causal_conv1d"
WIDTHS = (2, 3, 4)


def limits(call: Call) -> str | None:
    """Why causal-conv1d cannot compute a call, or None; heads are channels, dims the width."""
    if call.mask:
        return "causal-conv1d has no mask"
    if not call.dims:
        return None
    (width,) = call.dims
    if width not in WIDTHS:
        return f"causal-conv1d takes filters of width 2 to 4, not {width}"
    if call.heads % 8:
        return f"causal-conv1d takes multiples of 8 channels, not {call.heads}"
    if call.tokens < width:
        return f"causal-conv1d is called here with at least {width} tokens, as many as the width"
    return None


class _ContiguousGradients(torch.autograd.Function):
    """y and tail unchanged. Their gradients reach the package contiguous, and as zeros where there
    are none: its kernel reads the tail's by rows and takes no other layout."""

    @staticmethod
    def forward(ctx, y, tail):
        return y.view_as(y), tail.view_as(tail)

    @staticmethod
    def backward(ctx, dy, dtail):
        return dy.contiguous(), dtail.contiguous()


def short_conv(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The package takes [B, E, T] and keeps a state only in the layout with channels innermost,
    which is the transpose of a contiguous [B, T, E]."""
    state = initial_state
    if state is None:
        state = x_BTE.new_zeros(x_BTE.shape[0], weight_EW.shape[1] - 1, x_BTE.shape[2])
    y, tail = importlib.import_module(MODULE).causal_conv1d_fn(
        x_BTE.contiguous().mT,
        weight_EW,
        None if bias_E is None else bias_E.to(weight_EW.dtype),
        initial_states=state.to(x_BTE.dtype).contiguous().mT,
        return_final_states=True,
        activation=activation,
    )
    return _ContiguousGradients.apply(y.mT, tail.mT)
