"""The short convolution, one token after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_sleep.kernels.common.checks import compute_dtype, hide_pads


def short_conv(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_w weight[:, w] * past_t[w]), past_t the last W real inputs up to t."""
    dtype, out_dtype = compute_dtype(x_BTE, weight_EW), x_BTE.dtype
    B, T, E = x_BTE.shape
    W = weight_EW.shape[1]
    weight_WE = weight_EW.to(dtype).T
    (x_BTE,) = hide_pads(mask, x_BTE)
    if initial_state is None:
        tail_BWE = x_BTE.new_zeros(B, W - 1, E)
    else:
        tail_BWE = initial_state.to(out_dtype)
    outputs = []
    for t in range(T):
        past_BWE = torch.cat([tail_BWE, x_BTE[:, t : t + 1]], 1)
        y_BE = (past_BWE.to(dtype) * weight_WE).sum(1)
        if bias_E is not None:
            y_BE = y_BE + bias_E.to(dtype)
        if activation == "silu":
            y_BE = F.silu(y_BE)
        if mask is None:
            tail_BWE = past_BWE[:, 1:]
        else:
            real = mask[:, t, None]
            y_BE = y_BE.where(real, 0)
            tail_BWE = past_BWE[:, 1:].where(real[:, :, None], tail_BWE)
        outputs.append(y_BE)
    return torch.stack(outputs, 1).to(out_dtype), tail_BWE
