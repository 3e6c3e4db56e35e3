"""The short convolution over a whole sequence at once, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_sleep.kernels.checks import compute_dtype, hide_pads


def short_conv(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """y = act(bias + sum_w weight[:, w] * (x shifted by W - 1 - w)), real tokens moved together."""
    dtype, out_dtype = compute_dtype(x_BTC, weight_CW), x_BTC.dtype
    B, T, C = x_BTC.shape
    W = weight_CW.shape[1]
    (x_BTC,) = hide_pads(mask, x_BTC)
    if mask is not None:
        # Real tokens first, in their order; the pads behind them reach none of them.
        order_BT = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        x_BTC = x_BTC.gather(1, order_BT[:, :, None].expand(B, T, C))
    if initial_state is None:
        past = F.pad(x_BTC, (0, 0, W - 1, 0))
    else:
        past = torch.cat([initial_state.to(out_dtype), x_BTC], 1)
    weight_WC = weight_CW.to(dtype).T
    padded = past.to(dtype)
    y = padded[:, W - 1 :] * weight_WC[W - 1]
    for w in range(W - 1):
        y = torch.addcmul(y, padded[:, w : w + T], weight_WC[w])
    if bias_C is not None:
        y = y + bias_C.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    y = y.to(out_dtype)
    if mask is None:
        # A copy: a kept tail must not keep the whole sequence in memory.
        return y, past[:, T:].clone()
    count_B = mask.sum(1)
    tail_BW = count_B[:, None] + torch.arange(W - 1, device=mask.device)
    final_state = past.gather(1, tail_BW[:, :, None].expand(B, W - 1, C))
    place_BT = (mask.cumsum(1) - 1).clamp(min=0)
    y = y.gather(1, place_BT[:, :, None].expand(B, T, C))
    return y.where(mask[:, :, None], 0), final_state
