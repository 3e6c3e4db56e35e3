"""The gated delta rule, chunk after chunk, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    """Inside a chunk that starts from S, with c the running sum of g and D_ij = exp(c_i - c_j):

    (I + tril(beta K K^T * D, -1)) U = beta (V - exp(c) K S)
    O = scale (exp(c) Q S + tril(Q K^T * D) U)
    S' = exp(c_last) S + (exp(c_last - c) K)^T U
    """
    dtype, out_dtype = compute_dtype(q_BTHK, k_BTHK, v_BTHV), v_BTHV.dtype
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    N = -(-T // (chunk_size or 64))
    C = -(-T // N)
    q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH = hide_pads(
        mask, q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH
    )

    def chunks(x: Tensor) -> Tensor:
        x = x.to(dtype).transpose(1, 2)
        x = F.pad(x, (0, 0, 0, N * C - T))
        return x.reshape(B * H, N, C, x.shape[-1])

    k = chunks(k_BTHK)
    v = chunks(v_BTHV)
    c = chunks(g_BTH[..., None]).cumsum(2)
    beta = chunks(beta_BTH[..., None])
    upper = torch.ones(C, C, dtype=torch.bool, device=k.device).triu(1)
    D = (c - c.mT).masked_fill(upper, float("-inf")).exp()
    A = (k @ k.mT) * D * beta
    rhs = torch.cat([v * beta, k * (beta * c.exp())], -1)
    uw = torch.linalg.solve_triangular(A, rhs, upper=False, unitriangular=True)
    u, w = uw[..., :V], uw[..., V:]
    k_last = (k * (c[:, :, -1:] - c).exp()).mT
    gamma = c[:, :, -1:].exp()
    if output:
        q = chunks(q_BTHK) * scale
        P = (q @ k.mT) * D
        q = q * c.exp()
    if initial_state is None:
        S = k.new_zeros(B * H, K, V)
    else:
        S = initial_state.to(dtype).reshape(B * H, K, V)
    outputs = []
    for n in range(N):
        U = u[:, n] - w[:, n] @ S
        if output:
            outputs.append(q[:, n] @ S + P[:, n] @ U)
        S = gamma[:, n] * S + k_last[:, n] @ U
    S_BHKV = S.view(B, H, K, V)
    if not output:
        return None, S_BHKV
    o = torch.cat(outputs, 1).view(B, H, N * C, V)[:, :, :T].transpose(1, 2)
    return o.to(out_dtype).contiguous(), S_BHKV
