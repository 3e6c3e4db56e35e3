"""The gated delta rule by flash-linear-attention (https://github.com/fla-org)."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from hybrid_sleep.kernels.common.checks import hide_pads
from hybrid_sleep.kernels.common.dispatch import Call

MODULE = "fla.ops.gated_delta_rule"
LARGEST_KEY_DIM = 256


def limits(call: Call) -> str | None:
    """Why flash-linear-attention cannot compute a call, or None; dims are (K, V)."""
    if call.dtype == torch.float32:
        return "flash-linear-attention multiplies float32 in TF32, which is too coarse for it"
    if call.dims and call.dims[0] > LARGEST_KEY_DIM:
        return f"flash-linear-attention takes K up to {LARGEST_KEY_DIM}, not {call.dims[0]}"
    return None


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
    """The same rule, layout and state as here; its chunks always have 64 tokens.

    One token without a gradient takes its recurrent kernel, which has no backward pass. A pad is a
    token with g, beta, q, k and v of zero, which changes nothing.
    """
    module = importlib.import_module(MODULE)
    leaves = [q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH, initial_state]
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    if v_BTHV.shape[1] == 1 and not grad:
        compute = module.fused_recurrent_gated_delta_rule
    else:
        compute = module.chunk_gated_delta_rule
    q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH = hide_pads(
        mask, q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH
    )
    o, S = compute(
        q=q_BTHK.to(v_BTHV.dtype),
        k=k_BTHK.to(v_BTHV.dtype),
        v=v_BTHV,
        g=g_BTH.float(),
        beta=beta_BTH,
        scale=scale,
        initial_state=None if initial_state is None else initial_state.float(),
        output_final_state=True,
    )
    return (o if output else None), S
