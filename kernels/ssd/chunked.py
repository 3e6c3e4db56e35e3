"""Mamba-2's rule, chunk after chunk, in plain PyTorch with its own backward pass.

Shapes as in `kernels.chunks`: N chunks of C tokens, M = B * H rows. The R = H / G heads of a group
share q and k, so what they read and write is one product per group: [C, K] with [K, R * V].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sleep.kernels.common.checks import compute_dtype, full_precision, hide_pads
from hybrid_sleep.kernels.common.chunks import (
    add_mm,
    batch_blocks,
    decays_at_ends,
    decays_between,
    from_chunks,
    gate_gradient,
    log2_decays,
    mm,
    split,
    to_chunks,
)


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
    """Inside a chunk that starts from S, with c_i the sum of g up to token i and
    D_ij = exp(c_i - c_j) for i >= j, else 0:

        P = scale Q K^T * D        O = scale exp(c) Q S + P V
        S' = exp(c_C) S + K^T (exp(c_C - c) V)

    (arXiv:2405.21060, section 6.) Only S' runs from chunk to chunk, one multiplication each. The
    derivative is once differentiable; `reference` has every higher one.
    """
    dtype = compute_dtype(q_BTGK, k_BTGK, v_BTHV)
    inputs = hide_pads(mask, q_BTGK if output else None, k_BTGK, v_BTHV, g_BTH)
    if chunk_size is None:
        chunk_size = _chunk_size(max(k_BTGK.shape[-1], v_BTHV.shape[-1]))
    leaves = [x for x in (*inputs, initial_state) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in leaves):
        return _ChunkedSSD.apply(*inputs, initial_state, scale, chunk_size, dtype)
    o, S, _ = _forward(*inputs, initial_state, scale, chunk_size, dtype, keep=False)
    return o, S


def _chunk_size(dim: int) -> int:
    """Longer chunks cost C products per token, shorter ones more passes over the [K, V] state."""
    return 32 if dim <= 64 else 64


class _Saved(NamedTuple):
    """What the backward pass reads; the last four are None without output, read without a state."""

    k: Tensor  # [N, B * G, C, K]
    v: Tensor  # [N, M, C, V]
    S: Tensor  # the state before each chunk and after the last [N + 1, B * G, K, R * V]
    into: Tensor  # exp(c) [N, M, C, 1]
    left: Tensor  # exp(c_C - c) [N, M, C, 1]
    q: Tensor | None  # [N, B * G, C, K], scaled
    D: Tensor | None  # [N, M, C, C]
    P: Tensor | None  # [N, M, C, C]
    read: Tensor | None  # exp(c) q S where a state is read [N or N - 1, B * G, C, R, V]


def _by_group(x_NMCV: Tensor, R: int) -> Tensor:
    """Heads side by side: a view [N, B * G, C, R, V]."""
    return x_NMCV.unflatten(1, (-1, R)).transpose(2, 3)


def _times(x_NMCV: Tensor, decay_NMC1: Tensor, R: int) -> Tensor:
    """x * decay with heads side by side, contiguous [N, B * G, C, R * V]."""
    x = _by_group(x_NMCV, R)
    out = x.new_empty(x.shape)
    return torch.mul(x, _by_group(decay_NMC1, R), out=out).flatten(3)


def _state_by_group(S_BHKV: Tensor, G: int) -> Tensor:
    """A view [B, G, K, R, V]."""
    return S_BHKV.unflatten(1, (G, -1)).transpose(2, 3)


def _blocks(
    B: int, T: int, H: int, K: int, V: int, chunk_size: int, device: torch.device
) -> list[slice]:
    """Depends on nothing but the sizes: with or without output, S takes the same path."""
    N, C = split(T, chunk_size)
    return batch_blocks(B, H * (T * (2 * K + 6 * V + 4 * C) + (N + 2) * K * V), device)


def _forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor | None, Tensor, list[_Saved]]:
    """o, S and, with `keep`, what the backward pass needs of each block of rows; no o without q."""
    B, T, H, V = v.shape
    K = k.shape[-1]
    o = None if q is None else v.new_empty(v.shape)
    S = v.new_empty((B, H, K, V), dtype=dtype)
    saved = []
    for rows in _blocks(B, T, H, K, V, chunk_size, k.device):
        block = (None if x is None else x[rows] for x in (q, k, v, g, initial_state, o, S))
        one = _forward_block(*block, scale, chunk_size, dtype)
        if keep:
            saved.append(one)
    return o, S, saved


def _forward_block(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    o: Tensor | None,
    final: Tensor,
    scale: float,
    chunk_size: int,
    dtype: torch.dtype,
) -> _Saved:
    """Fills o and the final state.

    The path to the state never looks at q, which keeps it the same to the last bit.
    """
    B, T, G, K = k.shape
    H, V = v.shape[2:]
    R = H // G
    N, C = split(T, chunk_size)
    first = 1 if initial_state is None else 0  # the first chunk that a state enters
    k = to_chunks(k, N, C, dtype)
    v = to_chunks(v, N, C, dtype)
    c = log2_decays(g, N, C)
    into, left = decays_at_ends(c, dtype)

    S = k.new_empty(N + 1, B * G, K, R * V)
    mm(k.mT, _times(v, left, R), out=S[1:])
    if first == 0:
        S[0].view(B, G, K, R, V).copy_(_state_by_group(initial_state, G))
    gamma = into[:, :, -1, 0].unflatten(1, (-1, 1, R, 1))
    states = S.unflatten(3, (R, V)).unbind(0)
    for n in range(first, N):
        states[n + 1].addcmul_(states[n], gamma[n])
    _state_by_group(final, G).copy_(S[N].view(B, G, K, R, V))

    D = P = read = None
    if q is not None:
        D = decays_between(c, dtype)
        q = to_chunks(q, N, C, dtype).mul_(scale)
        P = (mm(q, k.mT).unsqueeze(2) * D.unflatten(1, (-1, R))).flatten(1, 2)
        out = mm(P, v)
        if first < N:
            read = mm(q[first:], S[first:N]).unflatten(3, (R, V))
            read.mul_(_by_group(into[first:], R))
            _by_group(out[first:], R).add_(read)
        from_chunks(out, o)
    return _Saved(k, v, S, into, left, q, D, P, read)


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, initial_state, scale, chunk_size, dtype):
        o, S, saved = _forward(q, k, v, g, initial_state, scale, chunk_size, dtype, keep=True)
        ctx.save_for_backward(*(tensor for block in saved for tensor in block))
        ctx.given = k.shape, v.shape, scale, chunk_size, dtype
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, g, initial_state)]
        ctx.set_materialize_grads(False)
        return o, S

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dS):
        (B, T, G, K), (*_, H, V), scale, chunk_size, dtype = ctx.given
        q_dtype, *dtypes, state_dtype = ctx.dtypes
        dtypes = (None if do is None else q_dtype, *dtypes)
        tensors = ctx.saved_tensors
        like = tensors[0]
        shapes = ((B, T, G, K), (B, T, G, K), (B, T, H, V), (B, T, H))
        grads = [
            None if kind is None else like.new_empty(shape, dtype=kind)
            for shape, kind in zip(shapes, dtypes, strict=True)
        ]
        dS_0 = None
        if ctx.needs_input_grad[4]:
            dS_0 = like.new_empty((B, H, K, V), dtype=dtype)
        fields = len(_Saved._fields)
        first = 1 if state_dtype is None else 0
        blocks = _blocks(B, T, H, K, V, chunk_size, like.device)
        with full_precision(like):
            for n, rows in enumerate(blocks):
                saved = _Saved(*tensors[n * fields : (n + 1) * fields])
                block = (None if x is None else x[rows] for x in (do, dS, dS_0))
                chunks = _backward(saved, *block, G, scale, first)
                for grad, x in zip(grads, chunks, strict=True):
                    if grad is not None:
                        from_chunks(x, grad[rows])
        return *grads, None if dS_0 is None else dS_0.to(state_dtype), None, None, None


def _backward(
    saved: _Saved,
    do: Tensor | None,
    dS: Tensor | None,
    dS_0: Tensor | None,
    G: int,
    scale: float,
    first: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g of one block, as chunks; fills dS_0, if it is asked for."""
    k, v, S, into, left, q, D, P, read = saved
    N, BG, C, K = k.shape
    M, V = v.shape[1], v.shape[-1]
    R, B = M // BG, BG // G
    dS_N = torch.empty_like(S)
    if dS is None:
        dS_N[N] = 0
    else:
        dS_N[N].view(B, G, K, R, V).copy_(_state_by_group(dS, G))
    reach = 1 if dS_0 is None else 0  # the first chunk whose starting state needs a gradient
    if do is None:
        dS_N[reach:N] = 0
    else:
        dO = to_chunks(do, N, C, k.dtype)
        dO_into = _times(dO, into, R) if first < N else None
        if reach < N:
            mm(q[reach:].mT, dO_into[reach:], out=dS_N[reach:N])
    gamma = into[:, :, -1, 0].unflatten(1, (-1, 1, R, 1))
    states = dS_N.unflatten(3, (R, V)).unbind(0)
    for n in reversed(range(reach, N)):
        states[n].addcmul_(states[n + 1], gamma[n])
    if dS_0 is not None:
        _state_by_group(dS_0, G).copy_(dS_N[0].view(B, G, K, R, V))

    dv_left = mm(k, dS_N[1:]).unflatten(3, (R, V)).transpose(2, 3)
    dv = torch.empty_like(v)
    torch.mul(dv_left, left.unflatten(1, (-1, R)), out=dv.unflatten(1, (-1, R)))
    left_shares = (v * dv).sum(-1)
    dk = mm(_times(v, left, R), dS_N[1:].mT)
    dq = pairs = read_shares = kept = None
    if first < N:
        kept = (S[first:N] * dS_N[first + 1 :]).unflatten(3, (R, V)).sum((2, 4)).flatten(1)
        kept *= into[first:, :, -1, 0]
        read_shares = torch.zeros_like(left_shares[first:])
    if do is not None:
        add_mm(dv, P.mT, dO)
        dP = mm(dO, v.mT)
        pairs = dP * P
        dP.mul_(D)
        if R > 1:
            dP = dP.unflatten(1, (-1, R)).sum(2)
        dq = mm(dP, k)
        add_mm(dk, dP.mT, q)
        if first < N:
            add_mm(dq[first:], dO_into[first:], S[first:N].mT)
            read_shares = (read * _by_group(dO[first:], R)).sum(-1).transpose(2, 3).flatten(1, 2)
        dq.mul_(scale)
    return dq, dk, dv, gate_gradient(pairs, read_shares, left_shares, kept)
