"""The short convolution, one token after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_sleep.kernels.common.checks import compute_dtype, hide_pads


def short_conv(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_w weight[:, w] * past_t[w]), past_t the last W real inputs up to t."""
    dtype, out_dtype = compute_dtype(x_BTC, weight_CW), x_BTC.dtype
    B, T, C = x_BTC.shape
    W = weight_CW.shape[1]
    weight_WC = weight_CW.to(dtype).T
    (x_BTC,) = hide_pads(mask, x_BTC)
    if initial_state is None:
        tail_BWC = x_BTC.new_zeros(B, W - 1, C)
    else:
        tail_BWC = initial_state.to(out_dtype)
    outputs = []
    for t in range(T):
        past_BWC = torch.cat([tail_BWC, x_BTC[:, t : t + 1]], 1)
        y_BC = (past_BWC.to(dtype) * weight_WC).sum(1)
        if bias_C is not None:
            y_BC = y_BC + bias_C.to(dtype)
        if activation == "silu":
            y_BC = F.silu(y_BC)
        if mask is None:
            tail_BWC = past_BWC[:, 1:]
        else:
            real = mask[:, t, None]
            y_BC = y_BC.where(real, 0)
            tail_BWC = past_BWC[:, 1:].where(real[:, :, None], tail_BWC)
        outputs.append(y_BC)
    return torch.stack(outputs, 1).to(out_dtype), tail_BWC
