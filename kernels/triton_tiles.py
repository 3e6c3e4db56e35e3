"""Pieces that several Triton kernels share. Shapes: a chunk of C tokens."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# What 2^-64 leaves of a state is nothing to float32, while a sum of decays that goes on from there
# still resolves the small ones that follow.
LEAST_LOG2 = tl.constexpr(-64.0)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact where exp(x) is small or overflows."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    # log1p by the correction of what rounding 1 + e loses.
    rounded = 1.0 + e
    lost = e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    log1p = tl.where(rounded == 1.0, e, tl.log(rounded) * lost)
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def log2_decay(g, ACC: tl.constexpr):
    """Log decays in units of log 2, bounded below."""
    return tl.maximum(g.to(ACC) * LOG2_E, LEAST_LOG2)


@triton.jit
def decay_between(c, later):
    """exp2(c_i - c_j) where `later` [C, C] (i after j), else 0: no positive power is taken."""
    return tl.where(later, tl.exp2(tl.minimum(c[:, None] - c[None, :], 0.0)), 0.0)


@triton.jit
def real_tokens(mask, b, start, i, T, HAS_MASK: tl.constexpr):
    """Which of the tokens `start + i` of row b are there and no pads."""
    real = i < T - start
    if HAS_MASK:
        row = mask + b.to(tl.int64) * T + start
        real = real & (tl.load(row + i, mask=real, other=0) != 0)
    return real


@triton.jit
def tile_mask(real, d, D: tl.constexpr, BD: tl.constexpr):
    """Which entries of a tile [C, BD] are tokens and lie before D."""
    mask = real[:, None]
    if D % BD != 0:
        mask = mask & (d < D)[None, :]
    return mask


@triton.jit
def load_rows(
    x, b, start, i, h, d, stride_b, stride_t, stride_h, real, D: tl.constexpr, BD: tl.constexpr
):
    """Tile [C, BD] of x [B, T, H, D], tokens start + i: 0 where not `real` and behind D.

    Within a chunk offsets are 32 bits, which keeps them out of the way of the tiles.
    """
    base = x + b.to(tl.int64) * stride_b + start.to(tl.int64) * stride_t + h * stride_h
    offsets = i[:, None] * stride_t + d[None, :]
    return tl.load(base + offsets, mask=tile_mask(real, d, D, BD), other=0.0)


@triton.jit
def load_own(
    x, b, start, i, h, d, T, H: tl.constexpr, real, D: tl.constexpr, BD: tl.constexpr
):
    """As `load_rows`, from a contiguous x."""
    base = x + ((b.to(tl.int64) * T + start) * H + h) * D
    offsets = i[:, None] * (H * D) + d[None, :]
    return tl.load(base + offsets, mask=tile_mask(real, d, D, BD), other=0.0)


@triton.jit
def store_rows(
    x, tile, b, start, i, h, d, T, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """Write tile [C, BD] into contiguous x [B, T, H, D], no further than its edges."""
    base = x + ((b.to(tl.int64) * T + start) * H + h) * D
    offsets = i[:, None] * (H * D) + d[None, :]
    tl.store(base + offsets, tile, mask=tile_mask(i < T - start, d, D, BD))


@triton.jit
def square_mask(k, v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Which entries of a tile [BK, BV] lie inside [K, V]."""
    mask = tl.full((BK, BV), True, tl.int1)
    if K % BK != 0:
        mask = mask & (k < K)[:, None]
    if V % BV != 0:
        mask = mask & (v < V)[None, :]
    return mask
