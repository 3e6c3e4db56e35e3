"""The gated delta rule, one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_sleep.kernels.common.checks import compute_dtype, hide_pads


def gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    scale: float,
    chunk_size: int | None,
    output: bool,
) -> tuple[Tensor | None, Tensor]:
    """S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = scale S^T q.

    The same as S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T. `chunk_size` has
    no meaning here.
    """
    dtype, out_dtype = compute_dtype(q_BTHK, k_BTHK, v_BTHV), v_BTHV.dtype
    B, T, H, K = k_BTHK.shape
    q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH = hide_pads(
        mask, q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH
    )
    q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH = (
        x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH)
    )
    if initial_state is None:
        S_BHKV = v_BTHV.new_zeros(B, H, K, v_BTHV.shape[-1])
    else:
        S_BHKV = initial_state.to(dtype)
    decay_BTH = g_BTH.exp()
    outputs = []
    for t in range(T):
        k_BH1K = k_BTHK[:, t, :, None]
        S_BHKV = decay_BTH[:, t, :, None, None] * S_BHKV
        wrong_BH1V = v_BTHV[:, t, :, None] - k_BH1K @ S_BHKV
        write_BH1V = beta_BTH[:, t, :, None, None] * wrong_BH1V
        S_BHKV = torch.addcmul(S_BHKV, k_BH1K.mT, write_BH1V)
        if output:
            outputs.append((q_BTHK[:, t, :, None] @ S_BHKV)[:, :, 0])
    if not output:
        return None, S_BHKV
    return (torch.stack(outputs, 1) * scale).to(out_dtype), S_BHKV
