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


class _WholeSlopes(torch.autograd.Function):
    """y and tail as they are. Their slopes arrive contiguous, and zeros where nothing asked: the
    kernel reads the tail's by rows and takes no other layout."""

    @staticmethod
    def forward(ctx, y, tail):
        return y.view_as(y), tail.view_as(tail)

    @staticmethod
    def backward(ctx, dy, dtail):
        return dy.contiguous(), dtail.contiguous()


def short_conv(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The package counts [B, C, T] and keeps a state only in the layout with channels innermost,
    which is the transpose of a contiguous [B, T, C]."""
    state = initial_state
    if state is None:
        state = x_BTC.new_zeros(x_BTC.shape[0], weight_CW.shape[1] - 1, x_BTC.shape[2])
    y, tail = importlib.import_module(MODULE).causal_conv1d_fn(
        x_BTC.contiguous().mT,
        weight_CW,
        None if bias_C is None else bias_C.to(weight_CW.dtype),
        initial_states=state.to(x_BTC.dtype).contiguous().mT,
        return_final_states=True,
        activation=activation,
    )
    return _WholeSlopes.apply(y.mT, tail.mT)
