"""Mamba-2's rule by mamba-ssm (https://github.com/state-spaces/mamba), forward only.

Its one-call entry, `mamba_chunk_scan_combined`, computes S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T
with one A a head: the step dt both decays and writes. Here g and v are free of each other. With
A = -1, dt = -g and x = v / dt that is the same rule, but x has no value at g = 0, and near it the
derivative by dt is the difference of two huge numbers. No other choice of its arguments avoids
that. Its three steps, taken one by one, do: they are given dt and the sums of dt A apart, so dt = 1
and the sums of g say exactly what is meant. Their derivative by the decay, though, is one that the
package itself calls unstable, so calls with a gradient are declined.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_sleep.kernels.common.checks import hide_pads
from hybrid_sleep.kernels.common.dispatch import Call

MODULE = "mamba_ssm.ops.triton.ssd_combined"
CHUNK = 128
LARGEST_DIM = 256


def limits(call: Call) -> str | None:
    """Why mamba-ssm cannot compute a call, or None; dims are (K, V)."""
    if call.dtype == torch.float32:
        return "mamba-ssm multiplies float32 in TF32, which is too coarse for it"
    if call.grad:
        return "mamba-ssm has no stable gradient for a decay that is apart from the write"
    too_large = [dim for dim in call.dims if dim > LARGEST_DIM]
    if too_large:
        return f"mamba-ssm is called here with K and V up to {LARGEST_DIM}, not {too_large[0]}"
    return None


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
    """The states each chunk adds, the states before each chunk, then the outputs.

    The package keeps a state as [V, K], takes full chunks of CHUNK tokens and has no mask: what
    fills up the last chunk, and every pad, is a token with g, q, k and v of zero.
    """
    steps = importlib.import_module(MODULE)
    T, V, K = v_BTHV.shape[1], v_BTHV.shape[3], k_BTGK.shape[3]
    inputs = hide_pads(mask, q_BTGK, k_BTGK, v_BTHV)
    q, k, v = (F.pad(x.to(v_BTHV.dtype), (0, 0, 0, 0, 0, -T % CHUNK)) for x in inputs)
    (g_BTH,) = hide_pads(mask, g_BTH)
    g_BTH = F.pad(g_BTH.float(), (0, 0, 0, -T % CHUNK))
    # As the package has them: head, chunk, token.
    sums = g_BTH.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2).cumsum(-1).contiguous()
    dt = torch.ones_like(sums)
    S_first = None if initial_state is None else initial_state.float().mT.flatten(2)
    added = steps.chunk_state(k, v, dt, sums, states_in_fp32=True)
    before, S_last = steps.state_passing(added.flatten(3), sums[..., -1], S_first)
    S = S_last.unflatten(2, (V, K)).mT.contiguous()
    if not output:
        return None, S
    o = steps.chunk_scan(k, q, v, dt, sums, before.unflatten(3, (V, K)))
    return (o[:, :T] * scale).to(v_BTHV.dtype), S
