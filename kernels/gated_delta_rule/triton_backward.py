"""Gated delta rule, backward: along the chunks from the last to the first, then all at once.

What `triton_forward.scan` keeps (the state before each chunk, U) is recomputed from the inputs.
With G the gradient of beta W (so that the one of W, and of V, is beta G) and dS the one of the
state after a chunk:

    dU = P^T dO + exp(c_C - c) K dS               G = M^T dU
    dS <- exp(c_C) dS + Q^T (scale exp(c) dO) - K^T (exp(c) beta G)

`scan_back` runs that; `pairs` and `gradients` find the rest of each chunk from products over V of
G, dO and U with each other, and with the states before and after it. No gradient divides by beta.

Predicted for K = V = 128, C = 64, bf16, per token and head, the forward run again included: 480
kflop and 10 kB of memory traffic, of which 2 kB are the states kept in between and 0.5 kB the
pairs. At B=8 T=8192 H=16 on an H200: 2.5 ms of traffic, 0.65 ms of products.
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
    square_mask,
    store_rows,
)


@kernel(
    [config(4, 2, BV=16), config(4, 1, BV=32), config(4, 2, BV=32), config(8, 2, BV=64)],
    fp32=[config(4, 2, BV=32), config(8, 2, BV=64)],
    key=("K", "V", "C", "HAS_OUT", "busy"),
    blocks={"BV": "V"},
    fits=lambda blocks, given: given["BK"] <= 128 or blocks["BV"] <= 16,
)
@triton.jit
def scan_back(
    q, k, d_out, mask, inverse, weights, decay, strength, d_final, passed, d_states, d_initial,
    T, NT, busy, scale,
    q_b, q_t, q_h, k_b, k_t, k_h,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OUT: tl.constexpr, HAS_FINAL: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV columns of one head, from the last chunk to the first.

    d_out [B, T, H, V] or None, d_final [B, H, K, V] or None. Writes G as `passed` [B, T, H, V],
    the gradient of the state after each chunk as d_states [B, H, NT, K, V], and d_initial.
    """
    of_head = tl.cdiv(V, BV)
    block, bh = tl.program_id(0) % of_head, tl.program_id(0) // of_head
    b, h = bh // H, bh % H
    i, kk, vv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    inside = square_mask(kk, vv, K, V, BK, BV)
    tile = kk[:, None] * V + vv[None, :]
    dS = tl.zeros((BK, BV), ACC)
    if HAS_FINAL:
        dS = tl.load(d_final + bh.to(tl.int64) * K * V + tile, mask=inside, other=0.0).to(ACC)
    for step in range(0, NT):
        chunk = NT - 1 - step
        start = chunk * C
        real = real_tokens(mask, b, start, i, T, HAS_MASK)
        place = bh.to(tl.int64) * NT + chunk
        after = dS.to(DOT)
        tl.store(d_states + place * K * V + tile, after, mask=inside)
        k_tile = load_rows(k, b, start, i, h // R, kk, k_b, k_t, k_h, real, K, BK).to(DOT)
        M = tl.load(inverse + place * C * C + i[:, None] * C + i[None, :])
        beta = tl.load(strength + place * C + i)
        into, left, kept = decays_at_ends(decay, place, i, C)
        dU = left[:, None] * tl.dot(k_tile, after, input_precision=MODE).to(ACC)
        dS = dS * kept
        if HAS_OUT:
            q_tile = load_rows(q, b, start, i, h // R, kk, q_b, q_t, q_h, real, K, BK).to(DOT)
            dO = load_own(d_out, b, start, i, h, vv, T, H, real, V, BV).to(ACC) * scale
            P = tl.load(weights + place * C * C + i[:, None] * C + i[None, :])
            dU += tl.dot(tl.trans(P), dO.to(DOT), input_precision=MODE)
            dS += tl.dot(tl.trans(q_tile), (into[:, None] * dO).to(DOT), input_precision=MODE)
        G = tl.dot(tl.trans(M), dU.to(DOT), input_precision=MODE).to(ACC)
        store_rows(passed, G.to(DOT), b, start, i, h, vv, T, H, V, BV)
        dS -= tl.dot(tl.trans(k_tile), ((into * beta)[:, None] * G).to(DOT), input_precision=MODE)
    tl.store(d_initial + bh.to(tl.int64) * K * V + tile, dS, mask=inside)


@kernel(
    [config(4, BV=16), config(4, 2, BV=32), config(8, 2, BV=64)],
    key=("K", "V", "C", "HAS_OUT"),
    blocks={"BV": "V"},
)
@triton.jit
def pairs(
    q, k, v, d_out, mask, decay, strength, written, passed, dv, d_mixed, d_weights,
    d_decay, d_strength,
    T, NT, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OUT: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What the tokens of one chunk of one head give each other, and dv [B, T, H, V].

    d_mixed and d_weights [B, H, NT, C, C]: the gradients of K K^T (below the diagonal, where A is)
    and of Q K^T. d_decay, d_strength [B, H, NT, C]: what these pairs add to those of g and beta.
    They go through memory because `gradients` needs them transposed: a left operand transposed in
    registers is miscompiled for wgmma (compute capability 9.0) by Triton 3.4 to 3.7.
    """
    bh, chunk = program_of(NT)
    b, h = bh // H, bh % H
    i, kk = tl.arange(0, C), tl.arange(0, BK)
    start = chunk * C
    real = real_tokens(mask, b, start, i, T, HAS_MASK)
    there = i < T - start
    place = bh.to(tl.int64) * NT + chunk
    whole, rest = load_decays(decay, place, i, C)
    beta = tl.load(strength + place * C + i)
    GU = tl.zeros((C, C), ACC)
    OU = tl.zeros((C, C), ACC)
    d_beta = tl.zeros((C,), ACC)
    for at in range(0, V, BV):
        vv = at + tl.arange(0, BV)
        G = load_own(passed, b, start, i, h, vv, T, H, there, V, BV)
        U = load_own(written, b, start, i, h, vv, T, H, there, V, BV)
        values = load_rows(v, b, start, i, h, vv, v_b, v_t, v_h, real, V, BV).to(ACC)
        d_beta += tl.sum(G.to(ACC) * values, axis=1)
        d_values = (beta[:, None] * G.to(ACC)).to(dv.dtype.element_ty)
        store_rows(dv, d_values, b, start, i, h, vv, T, H, V, BV)
        GU += tl.dot(G, tl.trans(U), input_precision=MODE)
        if HAS_OUT:
            dO = load_own(d_out, b, start, i, h, vv, T, H, real, V, BV).to(DOT)
            OU += tl.dot(dO, tl.trans(U), input_precision=MODE)

    square = place * C * C + i[:, None] * C + i[None, :]
    k_tile = load_rows(k, b, start, i, h // R, kk, k_b, k_t, k_h, real, K, BK).to(DOT)
    Gamma = decay_between(whole, rest, i[:, None] > i[None, :])
    X = tl.dot(k_tile, tl.trans(k_tile), input_precision=MODE).to(ACC) * Gamma
    d_beta -= tl.sum(GU * X, axis=1)
    dX = -beta[:, None] * GU
    tl.store(d_mixed + square, (dX * Gamma).to(DOT))
    terms = dX * X
    if HAS_OUT:
        q_tile = load_rows(q, b, start, i, h // R, kk, q_b, q_t, q_h, real, K, BK).to(DOT)
        P = tl.dot(q_tile, tl.trans(k_tile), input_precision=MODE).to(ACC)
        dP = OU * scale * decay_between(whole, rest, i[:, None] >= i[None, :])
        tl.store(d_weights + square, dP.to(DOT))
        terms += dP * P
    tl.store(d_decay + place * C + i, crossing(terms, i, False, DOT, MODE))
    tl.store(d_strength + place * C + i, d_beta)


@kernel(
    [config(4, BV=16, BKK=16), config(4, 2, BV=32, BKK=32), config(8, 2, BV=64, BKK=64)],
    fp32=[config(8, BV=32, BKK=32), config(8, 2, BV=64, BKK=64)],
    key=("K", "V", "C", "HAS_OUT"),
    blocks={"BV": "V", "BKK": "K"},
)
@triton.jit
def gradients(
    q, k, d_out, mask, decay, strength, states, d_states, written, passed,
    d_mixed, d_weights, d_decay, d_strength, dq, dk, dg, dbeta,
    T, NT, scale,
    q_b, q_t, q_h, k_b, k_t, k_h,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OUT: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr,
    BV: tl.constexpr, BKK: tl.constexpr,
):  # fmt: skip
    """The rest of the gradients of one chunk of one head, BKK columns of q and k at a time.

    dq, dk [B, T, H, K] (one each for a value head, so that sharing heads are summed later), dg,
    dbeta [B, T, H].
    """
    bh, chunk = program_of(NT)
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    start = chunk * C
    real = real_tokens(mask, b, start, i, T, HAS_MASK)
    there = i < T - start
    place = bh.to(tl.int64) * NT + chunk
    beta = tl.load(strength + place * C + i)
    into, left, kept = decays_at_ends(decay, place, i, C)
    before, after = states + place * K * V, d_states + place * K * V
    square = place * C * C + i[:, None] * C + i[None, :]
    d_beta = tl.load(d_strength + place * C + i)
    reads = tl.zeros((C,), ACC)
    remains = tl.zeros((C,), ACC)
    d_kept = tl.zeros((1,), ACC)
    for begin in range(0, K, BKK):
        kk = begin + tl.arange(0, BKK)
        GS = tl.zeros((C, BKK), ACC)
        OS = tl.zeros((C, BKK), ACC)
        US = tl.zeros((C, BKK), ACC)
        through = tl.zeros((BKK,), ACC)
        for at in range(0, V, BV):
            vv = at + tl.arange(0, BV)
            inside = square_mask(kk, vv, K, V, BKK, BV)
            tile = kk[:, None] * V + vv[None, :]
            S = tl.load(before + tile, mask=inside, other=0.0)
            dS = tl.load(after + tile, mask=inside, other=0.0)
            G = load_own(passed, b, start, i, h, vv, T, H, there, V, BV)
            U = load_own(written, b, start, i, h, vv, T, H, there, V, BV)
            through += tl.sum(S.to(ACC) * dS.to(ACC), axis=1)
            GS += tl.dot(G, tl.trans(S), input_precision=MODE)
            US += tl.dot(U, tl.trans(dS), input_precision=MODE)
            if HAS_OUT:
                dO = load_own(d_out, b, start, i, h, vv, T, H, real, V, BV).to(DOT)
                OS += tl.dot(dO, tl.trans(S), input_precision=MODE)
        keys = load_rows(k, b, start, i, h // R, kk, k_b, k_t, k_h, real, K, BKK).to(DOT)
        keys_acc = keys.to(ACC)
        d_into = -into[:, None] * GS
        d_left = left[:, None] * US
        d_beta += tl.sum(d_into * keys_acc, axis=1)
        d_into = d_into * beta[:, None]
        reads += tl.sum(d_into * keys_acc, axis=1)
        remains += tl.sum(d_left * keys_acc, axis=1)
        d_kept += tl.sum(through, axis=0)
        dX = tl.load(d_mixed + square)
        d_keys = d_into + d_left
        d_keys += tl.dot(dX, keys, input_precision=MODE)
        d_keys += tl.dot(tl.trans(dX), keys, input_precision=MODE)
        if HAS_OUT:
            queries = load_rows(q, b, start, i, h // R, kk, q_b, q_t, q_h, real, K, BKK).to(DOT)
            dP = tl.load(d_weights + square)
            d_queries = scale * into[:, None] * OS
            reads += tl.sum(d_queries * queries.to(ACC), axis=1)
            d_queries += tl.dot(dP, keys, input_precision=MODE)
            d_keys += tl.dot(tl.trans(dP), queries, input_precision=MODE)
            store_rows(dq, d_queries.to(dq.dtype.element_ty), b, start, i, h, kk, T, H, K, BKK)
        store_rows(dk, d_keys.to(dk.dtype.element_ty), b, start, i, h, kk, T, H, K, BKK)

    d_gates = tl.load(d_decay + place * C + i) + read_or_left(reads, remains, i)
    d_gates += tl.sum(d_kept, axis=0) * kept
    gates = (b.to(tl.int64) * T + start + i) * H + h
    tl.store(dg + gates, tl.where(real, d_gates, 0.0), mask=there)
    tl.store(dbeta + gates, tl.where(real, d_beta, 0.0), mask=there)
