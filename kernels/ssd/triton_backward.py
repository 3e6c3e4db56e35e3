"""Mamba-2's rule, backward: the gradients of all chunks at once.

`triton_forward.scan` gives the state S before each chunk and the gradient dS of the one after it.
With dO that of the outputs times scale, W = strength V what is written, and sums over tokens of
the chunk,

    dW = exp(c_C - c) K dS + P^T dO                   dP = (dO W^T) * Gamma
    dQ = exp(c) dO S^T + dP K                         dK = exp(c_C - c) W dS^T + dP^T Q

The gradient of a token's gate is made of what its decay is a factor of (`triton_tiles.crossing`).
The strength scales what is written as k does: its gradient is k_i dk_i / strength_i.

Predicted for K = V = 128, C = 64, bf16, per token and head, the states found again included:
241 kflop and 4.9 kB of memory traffic, of which the states kept in between are 2 kB. At B=8 T=8192
H=16 on an H200: 1.2 ms of traffic, 0.32 ms of products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_sleep.kernels.common.triton_launch import config, kernel
from hybrid_sleep.kernels.common.triton_tiles import (
    crossing,
    decay_between,
    decays_at_ends,
    load_decays,
    load_own,
    load_rows,
    program_of,
    read_or_left,
    real_tokens,
    sigmoid,
    square_mask,
    tile_mask,
)
from hybrid_sleep.kernels.ssd.triton_forward import decay_rate


@triton.jit
def save_rows(
    x, tile, b, start, i, h, d, stride_b, stride_t, stride_h, there, DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write tile [C, BLOCK] into x [B, T, H, DIM] by strides, tokens start + i where `there`."""
    base = x + b.to(tl.int64) * stride_b + start.to(tl.int64) * stride_t
    base += h.to(tl.int64) * stride_h
    offsets = i[:, None] * stride_t + d[None, :]
    tl.store(base + offsets, tile.to(x.dtype.element_ty), mask=tile_mask(there, d, DIM, BLOCK))


@kernel(
    [config(8, BV=16), config(8, BV=32), config(8, BV=64)],
    key=("K", "V", "C", "HAS_OUT", "RAW"),
    blocks={"BV": "V"},
    fp32=[config(8, BV=32)],
    fits=lambda blocks, given: blocks["BV"] <= 32 or (given["BK"] <= 64 and not given["RAW"]),
)
@triton.jit
def gradients(
    q, k, v, d_out, g, A_log, dt_bias, skip, mask, decay, strength, states, d_states,
    dq, dk, dv, dg, parts,
    T, NT, scale, q_b, k_b, v_b, dq_b, dk_b, dv_b,
    q_t: tl.constexpr, q_h: tl.constexpr, k_t: tl.constexpr, k_h: tl.constexpr,
    v_t: tl.constexpr, v_h: tl.constexpr, dq_t: tl.constexpr, dq_h: tl.constexpr,
    dk_t: tl.constexpr, dk_h: tl.constexpr, dv_t: tl.constexpr, dv_h: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OUT: tl.constexpr, RAW: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk of one head.

    q, k [B, T, H // R, K], v and d_out [B, T, H, V], states and d_states [B, H, NT, K, V].
    Writes dq, dk [B, T, H, K] (one each for a value head, so that sharing heads are summed later),
    dv [B, T, H, V], dg [B, T, H]. RAW: g is the projection a and dg its gradient, and
    parts [B, NT, H, 3] what this chunk adds to those of A_log, dt_bias and skip.
    """
    bh, chunk = program_of(NT)
    b, h = bh // H, bh % H
    i, kk = tl.arange(0, C), tl.arange(0, BK)
    start = chunk * C
    real = real_tokens(mask, b, start, i, T, HAS_MASK)
    there = i < T - start
    place = bh.to(tl.int64) * NT + chunk
    _, left, _ = decays_at_ends(decay, place, i, C)
    before, after = states + place * K * V, d_states + place * K * V
    if RAW:
        step = tl.load(strength + place * C + i)
        past = tl.load(skip + h).to(ACC)
    k_tile = load_rows(k, b, start, i, h // R, kk, k_b, k_t, k_h, real, K, BK).to(DOT)
    if HAS_OUT:
        q_tile = load_rows(q, b, start, i, h // R, kk, q_b, q_t, q_h, real, K, BK).to(DOT)
        whole, rest = load_decays(decay, place, i, C)
        # P and dP transposed are products, not tl.trans(P): a left operand that is transposed in
        # registers is miscompiled for wgmma (compute capability 9.0) by Triton 3.4 to 3.7.
        P_T = tl.dot(k_tile, tl.trans(q_tile), input_precision=MODE).to(ACC) * scale
        P_T = (P_T * decay_between(-whole, -rest, i[:, None] <= i[None, :])).to(DOT)
        dQ = tl.zeros((C, BK), ACC)
        OV = tl.zeros((C, C), ACC)
        VO = tl.zeros((C, C), ACC)
    dK = tl.zeros((C, BK), ACC)
    through = tl.zeros((BK,), ACC)
    for at in range(0, V, BV):
        vv = at + tl.arange(0, BV)
        inside = square_mask(kk, vv, K, V, BK, BV)
        tile = kk[:, None] * V + vv[None, :]
        S = tl.load(before + tile, mask=inside, other=0.0)
        dS = tl.load(after + tile, mask=inside, other=0.0)
        values = load_rows(v, b, start, i, h, vv, v_b, v_t, v_h, real, V, BV).to(DOT)
        through += tl.sum(S.to(ACC) * dS.to(ACC), axis=1)
        dK += tl.dot(values, tl.trans(dS), input_precision=MODE)
        dW = left[:, None] * tl.dot(k_tile, dS, input_precision=MODE).to(ACC)
        if HAS_OUT:
            dO = load_own(d_out, b, start, i, h, vv, T, H, real, V, BV).to(DOT)
            dQ += tl.dot(dO, tl.trans(S), input_precision=MODE)
            OV += tl.dot(dO, tl.trans(values), input_precision=MODE)
            VO += tl.dot(values, tl.trans(dO), input_precision=MODE)
            dW += tl.dot(P_T, dO, input_precision=MODE)
        if RAW:
            dW = dW * step[:, None]
            if HAS_OUT:
                dW += past * dO.to(ACC)
        save_rows(dv, dW, b, start, i, h, vv, dv_b, dv_t, dv_h, there, V, BV)

    # Loaded again: kept through the loop they would cost registers.
    into, left, kept = decays_at_ends(decay, place, i, C)
    if HAS_OUT and RAW:
        d_skip = tl.sum(tl.where(i[:, None] == i[None, :], OV, 0.0), axis=1)
    if HAS_OUT:
        whole, rest = load_decays(decay, place, i, C)
        dP = OV * scale * decay_between(whole, rest, i[:, None] >= i[None, :])
        if RAW:
            dP = dP * step[None, :]
        dP = dP.to(DOT)
        dQ = dQ * (into * scale)[:, None]
        reads = tl.sum(dQ * q_tile.to(ACC), axis=1)
        dQ += tl.dot(dP, k_tile, input_precision=MODE)
        save_rows(dq, dQ, b, start, i, h, kk, dq_b, dq_t, dq_h, there, K, BK)
    else:
        reads = tl.zeros((C,), ACC)
    dK = dK * left[:, None]
    if RAW:
        dK = dK * step[:, None]
    remains = tl.sum(dK * k_tile.to(ACC), axis=1)
    of_keys = remains
    d_gates = read_or_left(reads, remains, i) + tl.sum(through, axis=0) * kept
    if HAS_OUT:
        terms = VO * P_T.to(ACC)
        if RAW:
            terms = terms * step[:, None]
        d_gates += crossing(terms, i, True, DOT, MODE)
        dP_T = VO * scale * decay_between(-whole, -rest, i[:, None] <= i[None, :])
        if RAW:
            dP_T = dP_T * step[:, None]
        inner = tl.dot(dP_T.to(DOT), q_tile, input_precision=MODE).to(ACC)
        if RAW:
            of_keys += tl.sum(inner * k_tile.to(ACC), axis=1)
        dK += inner
    save_rows(dk, dK, b, start, i, h, kk, dk_b, dk_t, dk_h, there, K, BK)

    real = real_tokens(mask, b, start, i, T, HAS_MASK)
    d_gates = tl.where(real, d_gates, 0.0)
    gates = (b.to(tl.int64) * T + start + i) * H + h
    if RAW:
        rate = decay_rate(A_log, h, h < H, ACC)
        a = tl.load(g + gates, mask=real, other=0.0).to(ACC) + tl.load(dt_bias + h).to(ACC)
        d_softplus = sigmoid(a)
        # The step scales what is written as k does: its gradient is k dk / step, and that of a has
        # the ratio of sigmoid to softplus in it, which is 1 where both vanish.
        ratio = tl.where(step > 0.0, d_softplus / tl.where(step > 0.0, step, 1.0), 1.0)
        d_raw = tl.where(real, of_keys * ratio - rate * d_gates * d_softplus, 0.0)
        part = parts + ((b.to(tl.int64) * NT + chunk) * H + h) * 3
        tl.store(part, -rate * tl.sum(d_gates * step, axis=0))
        tl.store(part + 1, tl.sum(d_raw, axis=0))
        if HAS_OUT:
            tl.store(part + 2, tl.sum(d_skip, axis=0))
        else:
            tl.store(part + 2, 0.0)
        d_gates = d_raw
    tl.store(dg + gates, d_gates, mask=there)
