"""Mamba-2's rule, chunk after chunk, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_sleep.kernels.checks import compute_dtype, hide_pads


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
    """Inside a chunk that starts from S, with c the running sum of g and D_ij = exp(c_i - c_j):

    O = scale (exp(c) Q S + tril(Q K^T * D) V)
    S' = exp(c_last) S + K^T (exp(c_last - c) V)
    """
    dtype, out_dtype = compute_dtype(q_BTGK, k_BTGK, v_BTHV), v_BTHV.dtype
    B, T, G, K = k_BTGK.shape
    H, V = v_BTHV.shape[2:]
    R = H // G
    N = -(-T // (chunk_size or 64))
    C = -(-T // N)
    q_BTGK, k_BTGK, v_BTHV, g_BTH = hide_pads(mask, q_BTGK, k_BTGK, v_BTHV, g_BTH)

    def chunks(x: Tensor) -> Tensor:
        x = x.to(dtype).transpose(1, 2)
        x = F.pad(x, (0, 0, 0, N * C - T))
        return x.reshape(B, x.shape[1], N, C, x.shape[-1])

    k = chunks(k_BTGK)
    v = chunks(v_BTHV)
    c = chunks(g_BTH[..., None]).cumsum(3)
    kh = k.repeat_interleave(R, 1)
    writes = kh.mT @ (v * (c[:, :, :, -1:] - c).exp())
    gamma = c[:, :, :, -1:].exp()
    if initial_state is None:
        S = k.new_zeros(B, H, K, V)
    else:
        S = initial_state.to(dtype)
    before = []
    for n in range(N):
        before.append(S)
        S = gamma[:, :, n] * S + writes[:, :, n]
    if not output:
        return None, S
    q = chunks(q_BTGK) * scale
    upper = torch.ones(C, C, dtype=torch.bool, device=k.device).triu(1)
    D = (c - c.mT).masked_fill(upper, float("-inf")).exp()
    P = (q @ k.mT).repeat_interleave(R, 1) * D
    o = (q.repeat_interleave(R, 1) * c.exp()) @ torch.stack(before, 2) + P @ v
    o = o.reshape(B, H, N * C, V)[:, :, :T].transpose(1, 2)
    return o.to(out_dtype).contiguous(), S
