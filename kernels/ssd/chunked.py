"""Mamba-2's rule, chunk after chunk, in plain PyTorch with its own backward pass.

Shapes as in `common.chunks`: NT chunks of C tokens. The R = H / G heads of a group share q and k,
so what they read and write is one product per group: [C, K] with [K, R * V].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_sleep.kernels.common import chunked_rule
from hybrid_sleep.kernels.common.chunks import (
    add_mm,
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
    Gamma_ij = exp(c_i - c_j) for i >= j, else 0:

        P = scale Q K^T * Gamma        O = scale exp(c) Q S + P V
        S' = exp(c_C) S + K^T (exp(c_C - c) V)

    (arXiv:2405.21060, section 6.) A write does not depend on what is there, so that only S' runs
    from chunk to chunk, one multiplication each.
    """
    inputs = (q_BTGK, k_BTGK, v_BTHV, g_BTH)
    return chunked_rule.run(RULE, inputs, initial_state, mask, scale, chunk_size, output)


def _chunk_size(dim: int) -> int:
    """Longer chunks cost C products per token, shorter ones more passes over the [K, V] state."""
    return 32 if dim <= 64 else 64


class _Saved(NamedTuple):
    """What the backward pass reads; the last four are None without output, read without a state."""

    k: Tensor  # [NT, B, G, C, K]
    v: Tensor  # [NT, B * H, C, V]
    S: Tensor  # the state before each chunk and after the last [NT + 1, B * G, K, R * V]
    into: Tensor  # exp(c) [NT, B * H, C, 1]
    left: Tensor  # exp(c_C - c) [NT, B * H, C, 1]
    q: Tensor | None  # [NT, B * G, C, K], scaled
    Gamma: Tensor | None  # [NT, B * H, C, C]
    P: Tensor | None  # [NT, B * H, C, C]
    read: Tensor | None  # exp(c) q S where a state is read [NT or NT - 1, B * G, C, R, V]


def _by_group(x: Tensor, R: int) -> Tensor:
    """[NT, B * H, C, V] with the heads of a group side by side: a view [NT, B * G, C, R, V]."""
    return x.unflatten(1, (-1, R)).transpose(2, 3)


def _times(x: Tensor, decay: Tensor, R: int) -> Tensor:
    """x [NT, B * H, C, V] * decay [NT, B * H, C, 1] as contiguous [NT, B * G, C, R * V]."""
    x = _by_group(x, R)
    out = x.new_empty(x.shape)
    return torch.mul(x, _by_group(decay, R), out=out).flatten(3)


def _state_by_group(S_BHKV: Tensor, G: int) -> Tensor:
    """A view [B, G, K, R, V]."""
    return S_BHKV.unflatten(1, (G, -1)).transpose(2, 3)


def _forward(
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
    keep: bool,
) -> _Saved | None:
    B, T, G, K = k.shape
    H, V = v.shape[2:]
    R = H // G
    NT, C = split(T, chunk_size)
    first = 1 if initial_state is None else 0  # the first chunk that a state enters
    k = to_chunks(k, NT, C, dtype)
    v = to_chunks(v, NT, C, dtype)
    c = log2_decays(g, NT, C)
    into, left = decays_at_ends(c, dtype)

    S = k.new_empty(NT + 1, B * G, K, R * V)
    mm(k.mT, _times(v, left, R), out=S[1:])
    if first == 0:
        S[0].view(B, G, K, R, V).copy_(_state_by_group(initial_state, G))
    gamma = into[:, :, -1, 0].unflatten(1, (-1, 1, R, 1))
    states = S.unflatten(3, (R, V)).unbind(0)
    for i in range(first, NT):
        states[i + 1].addcmul_(states[i], gamma[i])
    _state_by_group(final, G).copy_(S[NT].view(B, G, K, R, V))

    Gamma = P = read = None
    if q is not None:
        Gamma = decays_between(c, dtype)
        q = to_chunks(q, NT, C, dtype).mul_(scale)
        P = (mm(q, k.mT).unsqueeze(2) * Gamma.unflatten(1, (-1, R))).flatten(1, 2)
        out = mm(P, v)
        if first < NT:
            read = mm(q[first:], S[first:NT]).unflatten(3, (R, V))
            read.mul_(_by_group(into[first:], R))
            _by_group(out[first:], R).add_(read)
        from_chunks(out, o)
    if not keep:
        return None
    return _Saved(k.unflatten(1, (B, G)), v, S, into, left, q, Gamma, P, read)


def _backward(
    saved: _Saved,
    do: Tensor | None,
    dS: Tensor | None,
    dS_0: Tensor | None,
    scale: float,
    first: int,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    k, v, S, into, left, q, Gamma, P, read = saved
    NT, B, G, C, K = k.shape
    k = k.flatten(1, 2)
    V = v.shape[-1]
    R = v.shape[1] // (B * G)
    # Of the state before each chunk and after the last, as S.
    dS_all = torch.empty_like(S)
    if dS is None:
        dS_all[NT] = 0
    else:
        dS_all[NT].view(B, G, K, R, V).copy_(_state_by_group(dS, G))
    reach = 1 if dS_0 is None else 0  # the first chunk whose starting state needs a gradient
    if do is None:
        dS_all[reach:NT] = 0
    else:
        dO = to_chunks(do, NT, C, k.dtype)
        dO_into = _times(dO, into, R) if first < NT else None
        if reach < NT:
            mm(q[reach:].mT, dO_into[reach:], out=dS_all[reach:NT])
    gamma = into[:, :, -1, 0].unflatten(1, (-1, 1, R, 1))
    states = dS_all.unflatten(3, (R, V)).unbind(0)
    for i in reversed(range(reach, NT)):
        states[i].addcmul_(states[i + 1], gamma[i])
    if dS_0 is not None:
        _state_by_group(dS_0, G).copy_(dS_all[0].view(B, G, K, R, V))

    dv_left = mm(k, dS_all[1:]).unflatten(3, (R, V)).transpose(2, 3)
    dv = torch.empty_like(v)
    torch.mul(dv_left, left.unflatten(1, (-1, R)), out=dv.unflatten(1, (-1, R)))
    left_terms = (v * dv).sum(-1)
    dk = mm(_times(v, left, R), dS_all[1:].mT)
    dq = pairs = read_terms = kept = None
    if first < NT:
        kept = (S[first:NT] * dS_all[first + 1 :]).unflatten(3, (R, V)).sum((2, 4)).flatten(1)
        kept *= into[first:, :, -1, 0]
        read_terms = torch.zeros_like(left_terms[first:])
    if do is not None:
        add_mm(dv, P.mT, dO)
        dP = mm(dO, v.mT)
        pairs = dP * P
        dP.mul_(Gamma)
        if R > 1:
            dP = dP.unflatten(1, (-1, R)).sum(2)
        dq = mm(dP, k)
        add_mm(dk, dP.mT, q)
        if first < NT:
            add_mm(dq[first:], dO_into[first:], S[first:NT].mT)
            read_terms = (read * _by_group(dO[first:], R)).sum(-1).transpose(2, 3).flatten(1, 2)
        dq.mul_(scale)
    return dq, dk, dv, gate_gradient(pairs, read_terms, left_terms, kept)


RULE = chunked_rule.Rule(_chunk_size, lambda K, V: 2 * K + 6 * V, _forward, _backward, _Saved)
