"""One token of generation with the Mamba-2 mixer, from raw projections to the output.

    q, k, v = silu(conv(raw))       dt = softplus(a + dt_bias)       (arXiv:2405.21060)
    S <- exp(-exp(A_log) dt) S + k (dt v)^T            o = S^T q + skip v

Predicted: it reads and writes the state, 131 kB per head for K = V = 128, 0.25 us at B=1 H=8 and
0.25 ms at B=64 H=128 on an H200 (4.3 TB/s). With few rows it is bound by its one launch, where
convolutions, gates, rule and skip apart take about twenty.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_sleep.kernels.common.triton_launch import config, kernel
from hybrid_sleep.kernels.common.triton_tiles import log2_decay, softplus, square_mask
from hybrid_sleep.kernels.short_conv.triton_taps import conv_one
from hybrid_sleep.kernels.ssd.triton_forward import decay_rate


@kernel(
    [config(2, BV=16), config(4, BV=32), config(4, BV=64)],
    key=("K", "V", "busy"),
    blocks={"BV": "V"},
)
@triton.jit
def step(
    q, kv, a, q_weight, kv_weight, A_log, dt_bias, skip, q_tail, kv_tail, mask, initial,
    out, final, new_q_tail, new_kv_tail,
    q_b, kv_b, busy,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BK: tl.constexpr, HAS_Q_TAIL: tl.constexpr, HAS_KV_TAIL: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_INITIAL: tl.constexpr, READS: tl.constexpr, OUT: tl.constexpr,
    TAILS: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one head, BV columns of its state.

    q [B, 1, G * K] and kv [B, 1, G * K + H * V] with a stride between rows, a [B, 1, H], all raw;
    q_weight, kv_weight [channels, W]; A_log, dt_bias, skip [H]; q_tail, kv_tail [B, W - 1,
    channels] and initial [B, H, K, V] or None for zeros; mask [B, 1] or None. Writes
    final [B, H, K, V], with OUT out [B, 1, H, V], with TAILS the new tails. READS: q is there, for
    its tail at least.
    """
    bh, block = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    G: tl.constexpr = H // R
    group = h // R
    kk, vv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    real = 1
    if HAS_MASK:
        real = tl.load(mask + b).to(tl.int32)
    # Heads that share a group convolve it each; the first of them writes its tail.
    writes = tl.where(block == 0, 1, 0) * tl.where(h % R == 0, 1, 0)
    keys = conv_one(
        kv, kv_weight, kv_tail, new_kv_tail, b, group * K, kk, real, writes, G * K + H * V, kv_b,
        W, K, HAS_KV_TAIL, TAILS, ACC,
    )  # fmt: skip
    values = conv_one(
        kv, kv_weight, kv_tail, new_kv_tail, b, G * K + h * V, vv, real, 1, G * K + H * V, kv_b,
        W, V, HAS_KV_TAIL, TAILS, ACC,
    )  # fmt: skip
    dt = softplus(tl.load(a + bh).to(ACC) + tl.load(dt_bias + h).to(ACC))
    decay = tl.exp2(log2_decay(-decay_rate(A_log, h, h < H, ACC) * dt, ACC))
    inside = square_mask(kk, vv, K, V, BK, BV)
    tile = bh.to(tl.int64) * K * V + kk[:, None] * V + vv[None, :]
    S = tl.zeros((BK, BV), ACC)
    if HAS_INITIAL:
        S = tl.load(initial + tile, mask=inside, other=0.0).to(ACC)
    written = decay * S + keys[:, None] * (dt * values)[None, :]
    # A pad may hold NaN: its row is chosen, not weighted.
    S = tl.where(real != 0, written, S)
    tl.store(final + tile, S, mask=inside)
    if READS:
        queries = conv_one(
            q, q_weight, q_tail, new_q_tail, b, group * K, kk, real, writes, G * K, q_b,
            W, K, HAS_Q_TAIL, TAILS, ACC,
        )  # fmt: skip
        if OUT:
            o = tl.sum(queries[:, None] * S, axis=0) + tl.load(skip + h).to(ACC) * values
            o = tl.where(vv < V * real, o, 0.0).to(out.dtype.element_ty)
            tl.store(out + bh.to(tl.int64) * V + vv, o, mask=vv < V)
