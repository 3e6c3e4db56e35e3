"""Mamba-2's rule, forward: the gates of all chunks at once, then along the chunks of a segment.

Algebra as in `chunked` (arXiv:2405.21060, section 6): with c_i the sum of g up to token i of a
chunk that starts from S, Gamma_ij = exp(c_i - c_j) for i >= j, else 0, and W what is written (V, or
V times its time step),

    P = Q K^T * Gamma    O = scale (exp(c) Q S + P W)        S' = exp(c_C) S + K^T (exp(c_C - c) W)

`prepare` fills c, and from raw projections the time step too. `scan` holds S on chip; of its
products only K^T W adds to S, and nothing that it reads depends on S, so P is found beside it and
never leaves the chip. The gradient of S runs by the same rule, backwards, with Q^T (exp(c) dO)
added: one kernel does both. Where B * H is small, the chunks are cut into segments, whose
transition is one number: `scan` finds what each adds, `combine` chains them, elementwise, and a
second `scan` writes the outputs of all segments at once.

Predicted for K = V = 128, C = 64, bf16, per token and head: 1032 B for q, k, v and o, 16 B for the
gates; 98 kflop. At B=8 T=8192 H=16 on an H200 (4.3 TB/s, 790 TFLOP/s): 0.26 ms of memory traffic,
0.13 ms of products, and 128 steps along the chunks, which at 2 to 3 us each are 0.26 to 0.38 ms.
State only: 0.13 ms of traffic. At B=1 T=2048 H=8, 8 segments of 4 chunks: 20 us in 4 launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_sleep.kernels.common.triton_launch import config, kernel
from hybrid_sleep.kernels.common.triton_tiles import (
    LOG2_E,
    decay_between,
    decays_at_ends,
    load_decays,
    load_rows,
    log2_decay,
    program_of,
    real_tokens,
    running_decays,
    softplus,
    square_mask,
    store_rows,
)


@triton.jit
def decay_rate(A_log, h, inside, ACC: tl.constexpr):
    """exp(A_log[h]), 0 where not `inside`."""
    rate = tl.exp2(tl.load(A_log + h, mask=inside, other=0.0).to(ACC) * LOG2_E)
    return tl.where(inside, rate, 0.0)


@kernel([config(4, BH=16)], key=("C",))
@triton.jit
def prepare(
    g, A_log, dt_bias, mask, decay, strength,
    T, NT,
    H: tl.constexpr, C: tl.constexpr, HAS_MASK: tl.constexpr, RAW: tl.constexpr,
    ACC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Gates of one chunk of BH heads: decay (c, in units of log 2, as two sums)
    [B, H, NT, 2, C].

    g [B, T, H], mask [B, T] or None. RAW takes g for the projection a and writes the time step
    softplus(a + dt_bias) as strength [B, H, NT, C]; the decay is exp(A_log) times it. A_log,
    dt_bias [H].
    """
    b, chunk = program_of(NT)
    block = tl.program_id(1)
    start, i, hh = chunk * C, tl.arange(0, C), block * BH + tl.arange(0, BH)
    real = real_tokens(mask, b, start, i, T, HAS_MASK)
    heads = hh < H
    inside = real[:, None] & heads[None, :]
    row = g + (b.to(tl.int64) * T + start) * H
    gates = tl.load(row + i[:, None] * H + hh[None, :], mask=inside, other=0.0).to(ACC)
    place = (b.to(tl.int64) * H + hh) * NT + chunk
    if RAW:
        bias = tl.load(dt_bias + hh, mask=heads, other=0.0).to(ACC)
        step = tl.where(inside, softplus(gates + bias[None, :]), 0.0)
        target = strength + place[None, :] * C + i[:, None]
        tl.store(target, step, mask=heads[None, :])
        gates = -decay_rate(A_log, hh, heads, ACC)[None, :] * step
    whole, rest = running_decays(log2_decay(gates, ACC))
    target = decay + place[None, :] * 2 * C + i[:, None]
    tl.store(target, whole, mask=heads[None, :])
    tl.store(target + C, rest, mask=heads[None, :])


@kernel(
    [config(4, 2, BV=16), config(4, 2, BV=32), config(8, 2, BV=64), config(8, 2, BV=128)],
    key=("K", "V", "C", "OUT", "KEEP", "BACK", "ADDS", "RAW", "busy"),
    blocks={"BV": "V"},
    fp32=[config(4, 2, BV=32), config(8, 2, BV=64)],
)
@triton.jit
def scan(
    q, x, y, skip, mask, decay, strength, initial, out, states, final, total,
    T, NT, per_segment, segments, busy, scale, q_b, x_b, y_b,
    q_t: tl.constexpr, q_h: tl.constexpr, x_t: tl.constexpr, x_h: tl.constexpr,
    y_t: tl.constexpr, y_h: tl.constexpr,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, HAS_MASK: tl.constexpr, HAS_INITIAL: tl.constexpr, RAW: tl.constexpr,
    OUT: tl.constexpr, KEEP: tl.constexpr, BACK: tl.constexpr, ADDS: tl.constexpr,
    FINAL: tl.constexpr, TOTAL: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV columns of the state of one head, along the chunks of one segment.

    Forward x, y are k [B, T, H // R, K] and v [B, T, H, V]; OUT reads q like x and writes
    out [B, T, H, V], with RAW skip [H] times v in it. BACK runs from the last chunk to the first
    with the gradient of the state, x, y are q and the gradient of out, and where that is missing
    not ADDS. initial, final [B, H, segments, K, V] fp32 lie where the run starts and ends. KEEP
    writes what the run holds before it takes in each chunk, states [B, H, NT, K, V]; TOTAL the
    decay of each segment, total [B, H, segments].

    Strides within a row are constants: they go into the addresses and take no registers.
    """
    # Heads go along the only axis of a grid that may exceed 65535, the blocks of one side by side.
    of_head = tl.cdiv(V, BV)
    block, bh = tl.program_id(0) % of_head, tl.program_id(0) // of_head
    segment = tl.program_id(1)
    b, h = bh // H, bh % H
    i, kk, vv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    run = bh.to(tl.int64) * segments + segment
    inside = square_mask(kk, vv, K, V, BK, BV)
    tile = kk[:, None] * V + vv[None, :]
    S = tl.zeros((BK, BV), ACC)
    if HAS_INITIAL:
        S = tl.load(initial + run * K * V + tile, mask=inside, other=0.0).to(ACC)
    if OUT and RAW:
        past = tl.load(skip + h).to(ACC)
    summed = tl.zeros((1,), ACC)
    begin = segment * per_segment
    end = tl.minimum(begin + per_segment, NT)
    for step in range(begin, end):
        chunk = begin + end - 1 - step if BACK else step
        start = chunk * C
        real = real_tokens(mask, b, start, i, T, HAS_MASK)
        place = bh.to(tl.int64) * NT + chunk
        into, left, kept = decays_at_ends(decay, place, i, C)
        if KEEP or OUT:
            before = S.to(DOT)
        if KEEP:
            tl.store(states + place * K * V + tile, before, mask=inside)
        S = S * kept
        if TOTAL:
            whole, rest = load_decays(decay, place, C - 1, C)
            summed += whole + rest
        if ADDS:
            x_tile = load_rows(x, b, start, i, h // R, kk, x_b, x_t, x_h, real, K, BK).to(DOT)
            y_tile = load_rows(y, b, start, i, h, vv, y_b, y_t, y_h, real, V, BV)
            weight = into * scale if BACK else left
            if RAW and not BACK:
                written = tl.load(strength + place * C + i)
                weight = weight * written
            weighted = (y_tile.to(ACC) * weight[:, None]).to(DOT)
            S += tl.dot(tl.trans(x_tile), weighted, input_precision=MODE)
            if OUT:
                q_tile = load_rows(q, b, start, i, h // R, kk, q_b, q_t, q_h, real, K, BK).to(DOT)
                P = tl.dot(q_tile, tl.trans(x_tile), input_precision=MODE).to(ACC)
                whole, rest = load_decays(decay, place, i, C)
                P = P * decay_between(whole, rest, i[:, None] >= i[None, :])
                if RAW:
                    P = P * written[None, :]
                inner = tl.dot(P.to(DOT), y_tile.to(DOT), input_precision=MODE)
                o = tl.dot(q_tile, before, input_precision=MODE)
                # Not added by the products: in a chain of them every warp group would do all rows.
                o = inner * scale + o * (into * scale)[:, None]
                if RAW:
                    o += past * y_tile.to(ACC)
                store_rows(out, o.to(out.dtype.element_ty), b, start, i, h, vv, T, H, V, BV)
    if FINAL:
        tl.store(final + run * K * V + tile, S, mask=inside)
    if TOTAL:
        if block == 0:
            tl.store(total + run, tl.sum(summed, axis=0))


@kernel(
    [config(2, BKV=256), config(4, BKV=1024)],
    key=("KV", "BACK"),
)
@triton.jit
def combine(
    initial, added, total, starts, final, segments,
    KV: tl.constexpr, HAS_INITIAL: tl.constexpr, STARTS: tl.constexpr, BACK: tl.constexpr,
    ACC: tl.constexpr, BKV: tl.constexpr,
):  # fmt: skip
    """Chain the segments of one head, BKV of the KV = K * V numbers: S <- exp(total) S + added.

    initial, final [B, H, KV]; added and starts [B, H, segments, KV], total [B, H, segments];
    starts, the state where the run enters each segment, only with STARTS. BACK runs from the last
    segment to the first.
    """
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv = block * BKV + tl.arange(0, BKV)
    inside = kv < KV
    S = tl.zeros((BKV,), ACC)
    if HAS_INITIAL:
        S = tl.load(initial + bh * KV + kv, mask=inside, other=0.0).to(ACC)
    # Nothing loaded depends on S: several segments are fetched ahead of it.
    for step in tl.range(0, segments, num_stages=4):
        run = bh * segments + (segments - 1 - step if BACK else step)
        if STARTS:
            tl.store(starts + run * KV + kv, S, mask=inside)
        Z = tl.load(added + run * KV + kv, mask=inside, other=0.0)
        S = S * tl.exp2(tl.load(total + run)) + Z
    tl.store(final + bh * KV + kv, S, mask=inside)
