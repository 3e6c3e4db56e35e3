"""The taps of the short convolution as a device function, for kernels that convolve what they read.

A kernel over x [B, T, channels] cut into chunks of C tokens calls, for BLOCK of the channels,

    real = real_tokens(mask, b, start, i, T, HAS_PADS)
    sums = conv_tile(
        x, weight, bias, tail, previous, b, start, i, first, d, T, channels, x_b, x_t, real,
        W, DIM, BLOCK, HAS_BIAS, HAS_TAIL, HAS_PADS, ACC,
    )
    y = silu(sums)

and its host passes `previous=previous_tokens(mask)` with a mask, found once for all layers and
convolutions that share it, and anything (None) without. With a mask a tap is found by following
`previous` from token to token, so that pads cost [C] loads a tap and no reordering of x.

Predicted for W = 4: the reads of a row meet in L1, so that DRAM sees one of them, and an element
takes some 12 instructions. For q, k and v of B=8 T=8192 H=16 K=V=128 on an H200 (30 T a second)
that is 0.16 ms, during which memory traffic goes on, where a convolution of its own takes 0.38 ms
and its result is loaded again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_sleep.kernels.common.triton_tiles import silu, tile_mask


def previous_tokens(mask: Tensor) -> Tensor:
    """int32 [B, T]: for each token of mask bool [B, T] the nearest real one before it, or -1."""
    found = torch.full_like(mask, -1, dtype=torch.int32)
    if mask.shape[1] > 1:
        tokens = torch.arange(mask.shape[1] - 1, dtype=torch.int32, device=mask.device)
        found[:, 1:] = tokens.where(mask[:, :-1], -1).cummax(1).values
    return found


def following_tokens(mask: Tensor) -> Tensor:
    """int32 [B, T + 1]: the first real token of each row, and for each token the nearest real one
    after it, or T."""
    B, T = mask.shape
    found = torch.full((B, T + 1), T, dtype=torch.int32, device=mask.device)
    tokens = torch.arange(T, dtype=torch.int32, device=mask.device)
    found[:, :T] = tokens.where(mask, T).flip(1).cummin(1).values.flip(1)
    return found


@triton.jit
def token_before(at, previous, b, T, needed, HAS_PADS: tl.constexpr):
    """The real tokens [C] before those at `at` in row b; from -1 on down they lie in the tail.

    Index -1 - j is j + 1 tokens before x. `previous` is read where `needed`.
    """
    before = at - 1
    if HAS_PADS:
        row = previous + b.to(tl.int64) * T
        found = tl.load(row + at, mask=needed & (at >= 0), other=0)
        before = tl.where(at >= 0, found, before)
    return before


@triton.jit
def token_after(at, following, b, T, needed, HAS_PADS: tl.constexpr):
    """The real tokens [C] after those at `at` in row b, negative while they lie in the tail, T or
    more behind the last. `following` of `following_tokens` is read where `needed`."""
    after = at + 1
    if HAS_PADS:
        row = following + b.to(tl.int64) * (T + 1)
        within = (at >= -1) & (at < T)
        found = tl.load(row + after, mask=needed & within, other=0)
        after = tl.where(within, found, after)
    return after


@triton.jit
def load_inputs(
    x, b, start, at, first, d, x_b, x_t, here,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_PADS: tl.constexpr,
):  # fmt: skip
    """Tile [C, BLOCK] of x [B, T, channels], tokens `at` [C] and channels first + d: 0 where not
    `here` and behind DIM. Without pads `at` lies near `start`, and offsets are 32 bits.
    """
    row = x + b.to(tl.int64) * x_b + first
    if HAS_PADS:
        rows = row + at.to(tl.int64) * x_t
        return tl.load(rows[:, None] + d[None, :], mask=tile_mask(here, d, DIM, BLOCK), other=0.0)
    base = row + start.to(tl.int64) * x_t
    offsets = (at - start)[:, None] * x_t + d[None, :]
    return tl.load(base + offsets, mask=tile_mask(here, d, DIM, BLOCK), other=0.0)


@triton.jit
def load_tail(
    tail, b, at, first, d, channels, here, W: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Tile [C, BLOCK] of tail [B, W - 1, channels], contiguous, for negative `at`: 0 where not
    `here` and behind DIM."""
    base = tail + b.to(tl.int64) * ((W - 1) * channels) + first
    offsets = (W - 1 + at)[:, None] * channels + d[None, :]
    return tl.load(base + offsets, mask=tile_mask(here, d, DIM, BLOCK), other=0.0)


@triton.jit
def load_tap(weight, first, d, m, W: tl.constexpr, DIM: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK] of weight [channels, W], contiguous: what multiplies the token m steps back."""
    return tl.load(weight + (first + d) * W + (W - 1 - m), mask=d < DIM, other=0.0).to(ACC)


@triton.jit
def conv_at(
    x, weight, bias, tail, previous, b, start, at, first, d, T, channels, x_b, x_t, real,
    W: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_PADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As `conv_tile`, of the tokens `at` [C] of row b where `real`; without pads near `start`."""
    sums = load_inputs(x, b, start, at, first, d, x_b, x_t, real, DIM, BLOCK, HAS_PADS).to(ACC)
    sums = sums * load_tap(weight, first, d, 0, W, DIM, ACC)[None, :]
    past = at
    for m in tl.static_range(1, W):
        past = token_before(past, previous, b, T, real, HAS_PADS)
        tap = load_tap(weight, first, d, m, W, DIM, ACC)[None, :]
        in_x = real & (past >= 0)
        met = load_inputs(x, b, start, past, first, d, x_b, x_t, in_x, DIM, BLOCK, HAS_PADS)
        sums += met.to(ACC) * tap
    if HAS_TAIL:
        # Only a row's first tokens reach it; a branch apart keeps its tiles out of registers.
        if tl.min(tl.where(real, past, 0), axis=0) < 0:
            past = at
            for back in tl.range(1, W, num_stages=1):
                past = token_before(past, previous, b, T, real, HAS_PADS)
                factor = load_tap(weight, first, d, back, W, DIM, ACC)[None, :]
                in_tail = real & (past < 0)
                known = load_tail(tail, b, past, first, d, channels, in_tail, W, DIM, BLOCK)
                sums += known.to(x.dtype.element_ty).to(ACC) * factor
    if HAS_BIAS:
        shift = tl.load(bias + first + d, mask=d < DIM, other=0.0).to(ACC)
        sums += tl.where(real[:, None], shift[None, :], 0.0)
    return sums


@triton.jit
def conv_tile(
    x, weight, bias, tail, previous, b, start, i, first, d, T, channels, x_b, x_t, real,
    W: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_PADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """bias + sum_m weight[:, W - 1 - m] * (the real token m before), [C, BLOCK] in ACC, before any
    activation: tokens start + i of row b, channels first + d. 0 where not `real` and behind DIM.

    x [B, T, channels] by its strides x_b and x_t, channels next to each other: a view whose channel
        0 is that of `weight`, however many more the projection has that it is cut from.
    weight [channels, W], bias [channels] or None, tail [B, W - 1, channels] or None for zeros (the
        inputs just before x, oldest first; rounded to x's dtype), all contiguous.
    previous int32 [B, T] of `previous_tokens`, or None without pads.
    b, start scalars; i = tl.arange(0, C); first the first channel (of a head, say); d = the BLOCK
        channels counted from there, of which those below DIM count; real bool [C] of `real_tokens`.
    """
    return conv_at(
        x, weight, bias, tail, previous, b, start, start + i, first, d, T, channels, x_b, x_t, real,
        W, DIM, BLOCK, HAS_BIAS, HAS_TAIL, HAS_PADS, ACC,
    )  # fmt: skip


@triton.jit
def conv_one(
    x, weight, tail, new_tail, b, first, d, real, writes, channels, x_b,
    W: tl.constexpr, DIM: tl.constexpr, HAS_TAIL: tl.constexpr, TAILS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """silu(conv) [BLOCK] of the only token of x [B, 1, channels], and with TAILS the new tail.

    real and writes are 1 or 0: a pad leaves the tail as it was, and one program writes it.
    """
    there, here = d < DIM, d < DIM * real
    moves, stays = d < DIM * real * writes, d < DIM * (1 - real) * writes
    c = first + d
    now = tl.load(x + b.to(tl.int64) * x_b + c, mask=here, other=0.0)
    sums = now.to(ACC) * tl.load(weight + c * W + W - 1, mask=there, other=0.0).to(ACC)
    base = b.to(tl.int64) * (W - 1) * channels
    for w in tl.static_range(0, W - 1):
        slot = base + w * channels + c
        old = tl.zeros_like(now)
        if HAS_TAIL:
            old = tl.load(tail + slot, mask=there, other=0.0).to(now.dtype)
        sums += old.to(ACC) * tl.load(weight + c * W + w, mask=there, other=0.0).to(ACC)
        if TAILS:
            if w > 0:
                tl.store(new_tail + slot - channels, old, mask=moves)
            tl.store(new_tail + slot, old, mask=stays)
    if TAILS and W > 1:
        tl.store(new_tail + base + (W - 2) * channels + c, now, mask=moves)
    return silu(sums)
