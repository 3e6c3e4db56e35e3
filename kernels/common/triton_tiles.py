"""Device functions that several Triton kernels share. Shapes: a chunk of C tokens."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# 2^-192 is zero in float32: no gate, even of -inf, is taken to be less.
LEAST_LOG2 = tl.constexpr(-192.0)


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
    log2 = g.to(ACC) * LOG2_E
    return tl.where(log2 < LEAST_LOG2, LEAST_LOG2, log2)


@triton.jit
def running_decays(log2):
    """The running sums c over the tokens, the first dimension, of log2 decays: integers, the rest.

    The sums of integers are exact, so that after strong decays a difference c_i - c_j is as good as
    the small decays in between.
    """
    whole = tl.floor(log2 + 0.5)
    return tl.cumsum(whole, 0), tl.cumsum(log2 - whole, 0)


@triton.jit
def load_decays(decay, place, i, C: tl.constexpr):
    """What `running_decays` found of one chunk, from decay [..., 2, C]."""
    return tl.load(decay + place * 2 * C + i), tl.load(decay + place * 2 * C + C + i)


@triton.jit
def decays_at_ends(decay, place, i, C: tl.constexpr):
    """exp2(c): what is left of the chunk's starting state at token i; exp2(c_C - c): of token i at
    its end; exp2(c_C): of the state at its end."""
    whole, rest = load_decays(decay, place, i, C)
    whole_last, rest_last = load_decays(decay, place, C - 1, C)
    left = tl.exp2((whole_last - whole) + (rest_last - rest))
    return tl.exp2(whole + rest), left, tl.exp2(whole_last + rest_last)


@triton.jit
def decay_between(whole, rest, later):
    """exp2(c_i - c_j) where `later` [C, C] (i after j), else 0: no positive power is taken."""
    between = (whole[:, None] - whole[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp2(tl.where(later, between, float("-inf")))


@triton.jit
def crossing(terms, i, TRANSPOSED: tl.constexpr, DOT: tl.constexpr, MODE: tl.constexpr):
    """For each token t the sum of terms [C, C] over rows i >= t and columns j < t, or over rows
    j < t and columns i >= t if TRANSPOSED. Other entries do not matter.

    The gradient of t's log decay is made of what the decay is a factor of: these pairs, what t and
    later tokens read from the chunk's starting state and what earlier ones leave at its end. The
    difference of running sums that has the same value is all rounding where the decay is strong.
    """
    before = i[:, None] < i[None, :]
    not_before = i[:, None] >= i[None, :]
    rows = before if TRANSPOSED else not_before
    columns = not_before if TRANSPOSED else before
    sums = tl.dot(terms.to(DOT), columns.to(DOT), input_precision=MODE)
    return tl.sum(tl.where(rows, sums, 0.0), axis=0)


@triton.jit
def read_or_left(read, left, i):
    """For each token t the sum of read[i] over i >= t and of left[j] over j < t."""
    not_before = i[:, None] >= i[None, :]
    return tl.sum(tl.where(not_before, read[:, None], left[:, None]), axis=0)


@triton.jit
def program_of(parts):
    """What (a row or a head of one) and which of its `parts` this program is for, from the only
    axis of a grid that may exceed 65535. Programs next to each other have the same part.
    """
    whats = tl.num_programs(0) // parts
    return tl.program_id(0) % whats, tl.program_id(0) // whats


@triton.jit
def real_tokens(mask, b, start, i, T, HAS_MASK: tl.constexpr):
    """Which of the tokens `start + i` of row b are there and no pads."""
    real = i < T - start
    if HAS_MASK:
        row = mask + b.to(tl.int64) * T + start
        real = real & (tl.load(row + i, mask=real, other=0) != 0)
    return real


@triton.jit
def tile_mask(real, d, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Which entries of a tile [C, BLOCK] are tokens and lie before DIM."""
    mask = real[:, None]
    if DIM % BLOCK != 0:
        mask = mask & (d < DIM)[None, :]
    return mask


@triton.jit
def load_rows(
    x, b, start, i, h, d, stride_b, stride_t, stride_h, real, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Tile [C, BLOCK] of x [B, T, H, DIM], tokens start + i: 0 where not `real` and behind DIM.

    Within a chunk offsets are 32 bits, which keeps them out of the way of the tiles.
    """
    base = x + b.to(tl.int64) * stride_b + start.to(tl.int64) * stride_t
    base += h.to(tl.int64) * stride_h
    offsets = i[:, None] * stride_t + d[None, :]
    return tl.load(base + offsets, mask=tile_mask(real, d, DIM, BLOCK), other=0.0)


@triton.jit
def load_own(
    x, b, start, i, h, d, T, H: tl.constexpr, real, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """As `load_rows`, from a contiguous x."""
    base = x + ((b.to(tl.int64) * T + start) * H + h) * DIM
    offsets = i[:, None] * (H * DIM) + d[None, :]
    return tl.load(base + offsets, mask=tile_mask(real, d, DIM, BLOCK), other=0.0)


@triton.jit
def store_rows(
    x, tile, b, start, i, h, d, T, H: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Write tile [C, BLOCK] into contiguous x [B, T, H, DIM], no further than its edges."""
    base = x + ((b.to(tl.int64) * T + start) * H + h) * DIM
    offsets = i[:, None] * (H * DIM) + d[None, :]
    tl.store(base + offsets, tile, mask=tile_mask(i < T - start, d, DIM, BLOCK))


@triton.jit
def square_mask(k, v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Which entries of a tile [BK, BV] lie inside [K, V]."""
    mask = tl.full((BK, BV), True, tl.int1)
    if K % BK != 0:
        mask = mask & (k < K)[:, None]
    if V % BV != 0:
        mask = mask & (v < V)[None, :]
    return mask
