"""Gated delta rule, forward: one kernel over all chunks at once, one along the chunks of a head.

Algebra as in `chunked` (arXiv:2412.06464): with c_i the sum of g up to token i of a chunk that
starts from S, and Gamma_ij = exp(c_i - c_j) for i >= j, else 0,

    A = diag(beta) tril(K K^T * Gamma, -1)     M = (I + A)^-1      P = Q K^T * Gamma
    W = V - exp(c) K S                         U = M (beta W)
    O = scale (exp(c) Q S + P U)               S' = exp(c_C) S + K^T (exp(c_C - c) U)

`prepare` fills M, P, c and beta, so that nothing which could be done at once waits in the chain of
products that `scan` runs from chunk to chunk with S on chip. Where B * H is small, the chunks are
cut into segments: each maps its starting state S to Phi S + Z, `scan` finds Phi and Z of all
segments at once (Phi is Z of no values from the identity), `combine` chains them, and a last `scan`
writes the outputs of all segments at once.

Predicted for K = V = 128, C = 64, bf16, per token and head: prepare reads 520 B and writes 264 B,
scan reads 1032 B and writes 256 B, 2.1 kB in all where the least possible are 1032 B; 41 + 148
kflop. At B=8 T=8192 H=16 on an H200 (4.3 TB/s, 790 TFLOP/s): 0.50 ms of memory traffic, 0.25 ms of
products, and 128 steps along the chunks, which at 3 us each are 0.4 ms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_sleep.kernels.common.triton_launch import config, kernel
from hybrid_sleep.kernels.common.triton_tiles import (
    decay_between,
    decays_at_ends,
    load_rows,
    log2_decay,
    program_of,
    real_tokens,
    running_decays,
    square_mask,
    store_rows,
)


@triton.jit
def unit_lower_inverse(A, C: tl.constexpr, FINE: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A [C, C], C = 16, 32 or 64.

    Forward substitution in the diagonal blocks of 16, all of them side by side, then merges of
    neighbours: [[X, 0], [-Y L X, Y]]. No power of A is formed, so nothing cancels.
    """
    parts: tl.constexpr = C // 16
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    r = tl.arange(0, 16)
    row = r[None, :, None]
    blocks = tl.where(i // 16 == j // 16, A, 0.0)
    blocks = tl.sum(tl.reshape(blocks, (parts, 16, parts, 16)), axis=2)
    X = tl.where(row == r[None, None, :], 1.0, 0.0).to(A.dtype) + tl.zeros_like(blocks)
    for s in range(1, 16):
        of_row = tl.sum(tl.where(row == s, blocks, 0.0), axis=1)
        known = tl.sum(of_row[:, :, None] * X, axis=1)
        X = tl.where(row == s, X - known[:, None, :], X)
    full = tl.broadcast_to(X[:, :, None, :], (parts, 16, parts, 16))
    inverse = tl.where(i // 16 == j // 16, tl.reshape(full, (C, C)), 0.0)
    if C >= 32:
        between = tl.where((i // 32 == j // 32) & (i // 16 > j // 16), A, 0.0)
        left = tl.dot(inverse, between, input_precision=FINE)
        inverse -= tl.dot(left.to(A.dtype), inverse, input_precision=FINE)
    if C >= 64:
        between = tl.where(i // 32 > j // 32, A, 0.0)
        left = tl.dot(inverse, between, input_precision=FINE)
        inverse -= tl.dot(left.to(A.dtype), inverse, input_precision=FINE)
    return inverse


@triton.jit
def store_chunk(
    q_tile, k_tile, g, beta, real, inverse, weights, decay, strength, chunk, bh, NT,
    C: tl.constexpr, OUT: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Write M, P, c and beta of one chunk from its queries and keys [C, BK] and gates [C]."""
    i = tl.arange(0, C)
    log2 = tl.where(real, log2_decay(g, ACC), 0.0)
    beta = tl.where(real, beta.to(ACC), 0.0)
    place = bh.to(tl.int64) * NT + chunk
    pairs = place * C * C + i[:, None] * C + i[None, :]
    whole, rest = running_decays(log2)
    tl.store(decay + place * 2 * C + i, whole)
    tl.store(decay + place * 2 * C + C + i, rest)
    tl.store(strength + place * C + i, beta)
    keys = k_tile.to(DOT)
    if OUT:
        P = tl.dot(q_tile.to(DOT), tl.trans(keys), input_precision=MODE).to(ACC)
        P = P * decay_between(whole, rest, i[:, None] >= i[None, :])
        tl.store(weights + pairs, P.to(DOT))
    A = tl.dot(keys, tl.trans(keys), input_precision=MODE).to(ACC)
    A = A * decay_between(whole, rest, i[:, None] > i[None, :]) * beta[:, None]
    tl.store(inverse + pairs, unit_lower_inverse(A, C, FINE).to(DOT))


@kernel(
    [config(4), config(8)],
    key=("K", "C", "OUT"),
)
@triton.jit
def prepare(
    q, k, g, beta, mask, inverse, weights, decay, strength,
    T, NT, q_b, q_t, q_h, k_b, k_t, k_h,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    HAS_MASK: tl.constexpr, OUT: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: inverse and, with OUT, weights [B, H, NT, C, C], decay
    [B, H, NT, 2, C] (c as two sums) and strength [B, H, NT, C].

    q, k [B, T, H // R, K] by their strides, g and beta [B, T, H], mask [B, T] or None.
    """
    bh, chunk = program_of(NT)
    b, h = bh // H, bh % H
    start, i, kk = chunk * C, tl.arange(0, C), tl.arange(0, BK)
    real = real_tokens(mask, b, start, i, T, HAS_MASK)
    k_tile = load_rows(k, b, start, i, h // R, kk, k_b, k_t, k_h, real, K, BK)
    q_tile = k_tile
    if OUT:
        q_tile = load_rows(q, b, start, i, h // R, kk, q_b, q_t, q_h, real, K, BK)
    gates = (b.to(tl.int64) * T + start + i) * H + h
    g_C = tl.load(g + gates, mask=real, other=0.0)
    beta_C = tl.load(beta + gates, mask=real, other=0.0)
    store_chunk(
        q_tile, k_tile, g_C, beta_C, real, inverse, weights, decay, strength, chunk, bh, NT,
        C, OUT, DOT, ACC, MODE, FINE,
    )  # fmt: skip


@kernel(
    [
        config(4, 2, BV=16),
        # Fits into the shared memory of smaller chips.
        config(4, 1, BV=32),
        config(4, 2, BV=32),
        config(4, 2, BV=64),
        config(8, 2, BV=64),
    ],
    fp32=[config(4, 2, BV=32), config(8, 2, BV=64)],
    key=("K", "V", "C", "OUT", "KEEP", "AFFINE", "busy"),
    blocks={"BV": "V"},
    fits=lambda blocks, given: given["BK"] <= 128 or blocks["BV"] <= 32,
)
@triton.jit
def scan(
    q, k, v, mask, inverse, weights, decay, strength, initial,
    out, written, states, final, transition,
    T, NT, per_segment, segments, busy, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, HAS_MASK: tl.constexpr, HAS_INITIAL: tl.constexpr, OUT: tl.constexpr,
    KEEP: tl.constexpr, AFFINE: tl.constexpr, FINAL: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV columns of the state of one head, along the chunks of one segment.

    q, k [B, T, H // R, K], v [B, T, H, V]. initial, final [B, H, segments, K, V]. OUT writes
    out [B, T, H, V]; KEEP writes what the backward pass reads, the state before each chunk
    [B, H, NT, K, V] and U as `written` [B, T, H, V]. AFFINE starts from nothing, and its last
    blocks of columns find transition [B, H, segments, K, K] instead, from the identity.
    """
    # Heads go along the only axis of a grid that may exceed 65535, the blocks of one side by side.
    of_values = tl.cdiv(V, BV)
    of_head = of_values + tl.cdiv(K, BV) if AFFINE else of_values
    block, bh = tl.program_id(0) % of_head, tl.program_id(0) // of_head
    segment = tl.program_id(1)
    b, h = bh // H, bh % H
    i, kk = tl.arange(0, C), tl.arange(0, BK)
    is_transition = block >= of_values
    vv = (block - tl.where(is_transition, of_values, 0)) * BV + tl.arange(0, BV)
    values_end = tl.where(is_transition, 0, T)
    run = bh.to(tl.int64) * segments + segment
    inside = square_mask(kk, vv, K, V, BK, BV)
    S = tl.zeros((BK, BV), ACC)
    if HAS_INITIAL:
        S = tl.load(initial + run * K * V + kk[:, None] * V + vv[None, :], mask=inside, other=0.0)
        S = S.to(ACC)
    if AFFINE:
        S = tl.where(is_transition & (kk[:, None] == vv[None, :]), 1.0, 0.0).to(ACC)
    first = segment * per_segment
    for chunk in range(first, tl.minimum(first + per_segment, NT)):
        start = chunk * C
        real = real_tokens(mask, b, start, i, T, HAS_MASK)
        place = bh.to(tl.int64) * NT + chunk
        k_tile = load_rows(k, b, start, i, h // R, kk, k_b, k_t, k_h, real, K, BK).to(DOT)
        has_value = real & (i < values_end - start) if AFFINE else real
        v_tile = load_rows(v, b, start, i, h, vv, v_b, v_t, v_h, has_value, V, BV)
        M = tl.load(inverse + place * C * C + i[:, None] * C + i[None, :])
        beta = tl.load(strength + place * C + i)
        into, left, kept = decays_at_ends(decay, place, i, C)
        before = S.to(DOT)
        if KEEP:
            target = states + place * K * V + kk[:, None] * V + vv[None, :]
            tl.store(target, before, mask=inside)
        read = tl.dot(k_tile, before, input_precision=MODE)
        W = (v_tile.to(ACC) - into[:, None] * read) * beta[:, None]
        U = tl.dot(M, W.to(DOT), input_precision=MODE).to(ACC)
        if KEEP:
            store_rows(written, U.to(DOT), b, start, i, h, vv, T, H, V, BV)
        if OUT:
            q_tile = load_rows(q, b, start, i, h // R, kk, q_b, q_t, q_h, real, K, BK).to(DOT)
            P = tl.load(weights + place * C * C + i[:, None] * C + i[None, :])
            o = into[:, None] * tl.dot(q_tile, before, input_precision=MODE)
            o += tl.dot(P, U.to(DOT), input_precision=MODE)
            store_rows(out, (o * scale).to(out.dtype.element_ty), b, start, i, h, vv, T, H, V, BV)
        S = S * kept
        S += tl.dot(tl.trans(k_tile), (U * left[:, None]).to(DOT), input_precision=MODE)
    if AFFINE:
        if is_transition:
            square = square_mask(kk, vv, K, K, BK, BV)
            tl.store(transition + run * K * K + kk[:, None] * K + vv[None, :], S, mask=square)
        else:
            tl.store(final + run * K * V + kk[:, None] * V + vv[None, :], S, mask=inside)
    elif FINAL:
        tl.store(final + run * K * V + kk[:, None] * V + vv[None, :], S, mask=inside)


@kernel(
    [config(8, BV=16)],
    key=("K", "V", "busy"),
    blocks={"BV": "V"},
)
@triton.jit
def combine(
    initial, added, transition, starts, final, segments, busy,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, HAS_INITIAL: tl.constexpr,
    STARTS: tl.constexpr, ACC: tl.constexpr, FINE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Chain the segments of one head, BV columns: S <- Phi S + Z.

    initial, final [B, H, K, V]; added (Z) and starts [B, H, segments, K, V], transition
    (Phi) [B, H, segments, K, K]; starts, the state before each segment, only with STARTS.
    """
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kk, vv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    inside = square_mask(kk, vv, K, V, BK, BV)
    tile = kk[:, None] * V + vv[None, :]
    square = square_mask(kk, kk, K, K, BK, BK)
    S = tl.zeros((BK, BV), ACC)
    if HAS_INITIAL:
        S = tl.load(initial + bh * K * V + tile, mask=inside, other=0.0).to(ACC)
    for segment in range(0, segments):
        run = bh * segments + segment
        if STARTS:
            tl.store(starts + run * K * V + tile, S, mask=inside)
        rows = transition + run * K * K + kk[:, None] * K + kk[None, :]
        Phi = tl.load(rows, mask=square, other=0.0)
        Z = tl.load(added + run * K * V + tile, mask=inside, other=0.0)
        S = Z + tl.dot(Phi, S, input_precision=FINE).to(ACC)
    tl.store(final + bh * K * V + tile, S, mask=inside)
