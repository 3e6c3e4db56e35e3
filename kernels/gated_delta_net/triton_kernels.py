"""Kernels of the Gated DeltaNet mixer around those of the gated delta rule.

`prologue` is `gated_delta_rule.triton_forward.prepare` on raw projections: convolution, SiLU,
lengths of q and k, gates, and all of a chunk that does not depend on the state, in one read of what
the projections wrote. `step` is one token of generation: tails, gates, state and output.

Predicted for K = V = 128, W = 4, C = 64, bf16, per token and head: prologue reads 772 B and writes
1040 B (q, k, v, M, P, gates), 0.44 ms of traffic at B=8 T=8192 H=16 on an H200, where convolution,
lengths, gates and `prepare` apart take 3.9 kB and six launches. `step` reads and writes the state,
131 kB per head, 0.5 us at B=1 H=8: launch-bound, and one launch instead of about twenty.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_sleep.kernels.common.triton_launch import config, kernel
from hybrid_sleep.kernels.common.triton_tiles import (
    program_of,
    real_tokens,
    sigmoid,
    silu,
    softplus,
    square_mask,
    store_rows,
)
from hybrid_sleep.kernels.gated_delta_rule.triton_forward import store_chunk
from hybrid_sleep.kernels.short_conv.triton_taps import conv_one, conv_tile

# Added to the squared length, as in `compose.l2_normalize`.
EPS = tl.constexpr(1e-6)


@kernel(
    [config(4, BV=16), config(8, BV=64)],
    key=("K", "V", "C", "OUT"),
    blocks={"BV": "V"},
    fits=lambda blocks, given: given["BK"] <= 128 or blocks["BV"] > 16,
)
@triton.jit
def prologue(
    q, kv, a, b_raw, q_weight, kv_weight, A_log, dt_bias, q_tail, kv_tail, mask, previous,
    q_out, k_out, v_out, q_length, k_length, inverse, weights, decay, strength,
    T, NT, q_b, q_t, kv_b, kv_t,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr, HAS_Q_TAIL: tl.constexpr, HAS_KV_TAIL: tl.constexpr,
    HAS_MASK: tl.constexpr, OUT: tl.constexpr, KEEP: tl.constexpr, NEGATIVE: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr, FINE: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, from q [B, T, G * K] and kv [B, T, G * K + H * V] by their strides,
    a and b_raw [B, T, H], all raw.

    Writes q_out, k_out [B, T, G, K] and v_out [B, T, H, V], zeros at pads, with KEEP the inverse
    lengths q_length, k_length [B, T, G], and what `prepare` writes.
    """
    bh, chunk = program_of(NT)
    b, h = bh // H, bh % H
    G: tl.constexpr = H // R
    g = h // R
    start, i, kk = chunk * C, tl.arange(0, C), tl.arange(0, BK)
    real = real_tokens(mask, b, start, i, T, HAS_MASK)
    lengths = (b.to(tl.int64) * T + start + i) * G + g
    # Heads that share a key head compute it each, and the first of them writes it.
    of_group = tl.where(h % R == 0, T, 0)
    k_sums = conv_tile(
        kv, kv_weight, None, kv_tail, previous, b, start, i, g * K, kk, T, G * K + H * V,
        kv_b, kv_t, real, W, K, BK, False, HAS_KV_TAIL, HAS_MASK, ACC,
    )  # fmt: skip
    keys = tl.where(real[:, None], silu(k_sums), 0.0)
    k_inverse = tl.rsqrt(tl.sum(keys * keys, axis=1) + EPS)
    keys = (keys * k_inverse[:, None]).to(k_out.dtype.element_ty)
    store_rows(k_out, keys, b, start, i, g, kk, of_group, G, K, BK)
    if KEEP:
        tl.store(k_length + lengths, k_inverse, mask=i < of_group - start)
    queries = keys
    if OUT:
        q_sums = conv_tile(
            q, q_weight, None, q_tail, previous, b, start, i, g * K, kk, T, G * K,
            q_b, q_t, real, W, K, BK, False, HAS_Q_TAIL, HAS_MASK, ACC,
        )  # fmt: skip
        queries = tl.where(real[:, None], silu(q_sums), 0.0)
        q_inverse = tl.rsqrt(tl.sum(queries * queries, axis=1) + EPS)
        queries = (queries * q_inverse[:, None]).to(q_out.dtype.element_ty)
        store_rows(q_out, queries, b, start, i, g, kk, of_group, G, K, BK)
        if KEEP:
            tl.store(q_length + lengths, q_inverse, mask=i < of_group - start)
    for at in range(0, V, BV):
        vv = at + tl.arange(0, BV)
        v_sums = conv_tile(
            kv, kv_weight, None, kv_tail, previous, b, start, i, G * K + h * V, vv, T,
            G * K + H * V, kv_b, kv_t, real, W, V, BV, False, HAS_KV_TAIL, HAS_MASK, ACC,
        )  # fmt: skip
        values = tl.where(real[:, None], silu(v_sums), 0.0).to(v_out.dtype.element_ty)
        store_rows(v_out, values, b, start, i, h, vv, T, H, V, BV)
    gates = (b.to(tl.int64) * T + start + i) * H + h
    step = softplus(
        tl.load(a + gates, mask=real, other=0.0).to(ACC) + tl.load(dt_bias + h).to(ACC)
    )
    log_decay = -tl.exp(tl.load(A_log + h).to(ACC)) * step
    beta = sigmoid(tl.load(b_raw + gates, mask=real, other=0.0).to(ACC))
    if NEGATIVE:
        beta = 2 * beta
    store_chunk(
        queries, keys, log_decay, beta, real, inverse, weights, decay, strength, chunk, bh, NT,
        C, OUT, DOT, ACC, MODE, FINE,
    )  # fmt: skip


@kernel([config(4, ROWS=16), config(4, ROWS=64)], key=("K", "H"))
@triton.jit
def length_back(
    d_unit, unit, length, d_value, tokens,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    H: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Back through u = y / sqrt(|y|^2 + eps): dy = (du - u (u . du)) / sqrt(|y|^2 + eps).

    d_unit [tokens, H, K] is summed over the R heads that share u [tokens, G, K]; length
    [tokens, G] is 1 / sqrt(|y|^2 + eps); d_value [tokens, G, K].
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kk = tl.arange(0, BK)
    inside = (row < tokens * G)[:, None] & (kk < K)[None, :]
    token, group = row // G, row % G
    d = tl.zeros((ROWS, BK), ACC)
    for r in range(0, R):
        head = (token * H + group * R + r)[:, None] * K + kk[None, :]
        d += tl.load(d_unit + head, mask=inside, other=0.0).to(ACC)
    u = tl.load(unit + row[:, None] * K + kk[None, :], mask=inside, other=0.0).to(ACC)
    inverse = tl.load(length + row, mask=row < tokens * G, other=0.0)
    dy = inverse[:, None] * (d - u * tl.sum(u * d, axis=1)[:, None])
    tl.store(
        d_value + row[:, None] * K + kk[None, :], dy.to(d_value.dtype.element_ty), mask=inside
    )


@kernel([config(2, BV=16), config(4, BV=32)], key=("K", "V", "busy"), blocks={"BV": "V"})
@triton.jit
def step(
    q, kv, a, b, q_weight, kv_weight, A_log, dt_bias, q_tail, kv_tail, mask, initial,
    out, final, new_q_tail, new_kv_tail,
    q_b, kv_b, scale, busy,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BK: tl.constexpr, HAS_Q_TAIL: tl.constexpr, HAS_KV_TAIL: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_INITIAL: tl.constexpr, OUT: tl.constexpr, READS: tl.constexpr,
    TAILS: tl.constexpr, NEGATIVE: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one head, BV columns of its state: everything from raw projections to out.

    q [B, 1, G * K], kv [B, 1, G * K + H * V], a, b [B, 1, H]; initial, final [B, H, K, V];
    out [B, 1, H, V]; tails [B, W - 1, channels]. READS: q is there for its tail at least.
    """
    bh, block = tl.program_id(0), tl.program_id(1)
    row, h = bh // H, bh % H
    G: tl.constexpr = H // R
    g = h // R
    kk, vv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    real = 1
    if HAS_MASK:
        real = tl.load(mask + row).to(tl.int32)
    writes = tl.where(block == 0, 1, 0) * tl.where(h % R == 0, 1, 0)
    keys = conv_one(
        kv, kv_weight, kv_tail, new_kv_tail, row, g * K, kk, real, writes, G * K + H * V, kv_b,
        W, K, HAS_KV_TAIL, TAILS, ACC,
    )  # fmt: skip
    values = conv_one(
        kv, kv_weight, kv_tail, new_kv_tail, row, G * K + h * V, vv, real, 1,
        G * K + H * V, kv_b, W, V, HAS_KV_TAIL, TAILS, ACC,
    )  # fmt: skip
    keys = keys * tl.rsqrt(tl.sum(keys * keys, axis=0) + EPS)
    raw = tl.load(a + bh).to(ACC) + tl.load(dt_bias + h).to(ACC)
    decay = tl.exp(-tl.exp(tl.load(A_log + h).to(ACC)) * softplus(raw))
    beta = sigmoid(tl.load(b + bh).to(ACC))
    if NEGATIVE:
        beta = 2 * beta
    inside = square_mask(kk, vv, K, V, BK, BV)
    tile = bh.to(tl.int64) * K * V + kk[:, None] * V + vv[None, :]
    S = tl.zeros((BK, BV), ACC)
    if HAS_INITIAL:
        S = tl.load(initial + tile, mask=inside, other=0.0).to(ACC)
    decayed = decay * S
    wrong = values - tl.sum(keys[:, None] * decayed, axis=0)
    written = decayed + keys[:, None] * (beta * wrong)[None, :]
    if real != 0:
        S = written
    tl.store(final + tile, S, mask=inside)
    if READS:
        queries = conv_one(
            q, q_weight, q_tail, new_q_tail, row, g * K, kk, real, writes, G * K, q_b,
            W, K, HAS_Q_TAIL, TAILS, ACC,
        )  # fmt: skip
        if OUT:
            queries = queries * tl.rsqrt(tl.sum(queries * queries, axis=0) + EPS)
            o = scale * tl.sum(queries[:, None] * S, axis=0)
            o = tl.where(vv < V * real, o, 0.0).to(out.dtype.element_ty)
            tl.store(out + bh.to(tl.int64) * V + vv, o, mask=vv < V)
