"""The gated delta rule, one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_sleep.kernels.checks import compute_dtype, hide_pads


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
        k_BHK1 = k_BTHK[:, t, :, :, None]
        S_BHKV = decay_BTH[:, t, :, None, None] * S_BHKV
        held_BHV = (S_BHKV * k_BHK1).sum(-2)
        write_BHV = beta_BTH[:, t, :, None] * (v_BTHV[:, t] - held_BHV)
        S_BHKV = torch.addcmul(S_BHKV, k_BHK1, write_BHV[:, :, None])
        if output:
            outputs.append((S_BHKV * q_BTHK[:, t, :, :, None]).sum(-2))
    if not output:
        return None, S_BHKV
    return (torch.stack(outputs, 1) * scale).to(out_dtype), S_BHKV
