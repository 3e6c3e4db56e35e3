"""Mamba-2's rule, one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_sleep.kernels.common.checks import compute_dtype, hide_pads


def ssd(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    scale: float,
    chunk_size: int | None,
    output: bool,
) -> tuple[Tensor | None, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T;  o_t = scale S_t^T q_t. `chunk_size` has no meaning."""
    dtype, out_dtype = compute_dtype(q_BTGK, k_BTGK, v_BTHV), v_BTHV.dtype
    B, T, G, K = k_BTGK.shape
    H, V = v_BTHV.shape[2:]
    q_BTGK, k_BTGK, v_BTHV, g_BTH = hide_pads(mask, q_BTGK, k_BTGK, v_BTHV, g_BTH)
    q_BTGK, k_BTGK, v_BTHV, g_BTH = (x.to(dtype) for x in (q_BTGK, k_BTGK, v_BTHV, g_BTH))
    q_BTHK, k_BTHK = (x.repeat_interleave(H // G, 2) for x in (q_BTGK, k_BTGK))
    if initial_state is None:
        S_BHKV = v_BTHV.new_zeros(B, H, K, V)
    else:
        S_BHKV = initial_state.to(dtype)
    decay_BTH = g_BTH.exp()
    outputs = []
    for t in range(T):
        S_BHKV = decay_BTH[:, t, :, None, None] * S_BHKV
        S_BHKV = torch.addcmul(S_BHKV, k_BTHK[:, t, :, :, None], v_BTHV[:, t, :, None])
        if output:
            outputs.append((q_BTHK[:, t, :, None] @ S_BHKV)[:, :, 0])
    if not output:
        return None, S_BHKV
    return (torch.stack(outputs, 1) * scale).to(out_dtype), S_BHKV
