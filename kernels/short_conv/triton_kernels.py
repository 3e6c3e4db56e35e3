"""The short convolution, forward and backward: tiles of tokens and channels, all independent.

With p_t the sum before the activation, d_t = dy_t act'(p_t) its gradient, and next^m the m-th real
token after one:

    dx_t = sum_m weight[:, W - 1 - m] d_{next^m(t)}
    dweight[:, W - 1 - m] = sum_t d_t x_{previous^m(t)}

plus the gradient of the final state for the last W - 1 real inputs. Tokens of the tail are tokens
like any other, at negative indices. `gradients` finds p again where it needs it, at t and at the
W - 1 tokens after: that costs W^2 taps, most of them from L1, and saves writing d and reading it.

Predicted for bf16 and W = 4, per element of x: forward reads 2 B and writes 2 B in 1 launch, where
PyTorch's path moves some 64 B in 12; backward reads 4 B and writes 2 B in 2 launches (the second
sums 20 B for every 256 tokens of a channel), where PyTorch's moves some 130 B in 35. Nothing is
kept but the inputs. At B=8 T=8192 E=6144 on an H200 (4.3 TB/s): forward 0.38 ms; backward 0.57 ms
of traffic, but 1.0 ms of arithmetic (4 sigmoids, of 2 special functions each at 16 a clock and SM,
and 16 taps). At B=1 T=2048 E=6144, in L2: 12 and 35 us. For one token: a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hybrid_sleep.kernels.common.triton_launch import kernel
from hybrid_sleep.kernels.common.triton_tiles import (
    program_of,
    real_tokens,
    sigmoid,
    silu,
    tile_mask,
)
from hybrid_sleep.kernels.short_conv.triton_taps import (
    conv_at,
    conv_tile,
    load_inputs,
    load_tail,
    load_tap,
    token_after,
    token_before,
)


@kernel(
    [
        triton.Config({"BT": BT, "BE": BE}, num_warps=w, num_stages=1)
        for BT, BE, w in ((16, 16, 1), (16, 128, 4), (32, 64, 4), (32, 128, 4))
    ],
    key=("channels", "W", "length", "HAS_PADS"),
    blocks={"BT": "length", "BE": "channels"},
)
@triton.jit
def convolve(
    x, weight, bias, tail, mask, previous, y, final, T, length, x_b, x_t,
    channels: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr,
    HAS_PADS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """BT tokens of BE channels: y [B, T, channels], and the last tokens' programs final
    [B, W - 1, channels].

    x [B, T, channels] by its strides; weight, bias, tail, previous as in `conv_tile`; mask [B, T]
    or None.
    """
    b, block = program_of(tl.cdiv(T, BT))
    start = block * BT
    i, d = tl.arange(0, BT), tl.program_id(1) * BE + tl.arange(0, BE)
    real = real_tokens(mask, b, start, i, T, HAS_PADS)
    sums = conv_tile(
        x, weight, bias, tail, previous, b, start, i, 0, d, T, channels, x_b, x_t, real,
        W, channels, BE, HAS_BIAS, HAS_TAIL, HAS_PADS, ACC,
    )  # fmt: skip
    if SILU:
        sums = silu(sums)
    rows = y + (b.to(tl.int64) * T + start) * channels
    there = tile_mask(i < T - start, d, channels, BE)
    tl.store(rows + i[:, None] * channels + d[None, :], sums.to(y.dtype.element_ty), mask=there)
    if start + BT >= T:
        at = tl.minimum(start + BT, T) - 1
        if HAS_PADS:
            last = b.to(tl.int64) * T + at
            at = tl.where(tl.load(mask + last) != 0, at, tl.load(previous + last))
        kept = b.to(tl.int64) * ((W - 1) * channels)
        for back in range(0, W - 1):
            token = x + b.to(tl.int64) * x_b + at.to(tl.int64) * x_t
            value = tl.load(token + d, mask=d < tl.where(at >= 0, channels, 0), other=0.0)
            if HAS_TAIL:
                old = tail + kept + (W - 1 + at) * channels
                known = tl.load(old + d, mask=d < tl.where(at < 0, channels, 0), other=0.0)
                value = tl.where(at >= 0, value, known.to(x.dtype.element_ty))
            tl.store(final + kept + (W - 2 - back) * channels + d, value, mask=d < channels)
            at = token_before(at, previous, b, T, at >= 0, HAS_PADS)


@triton.jit
def sum_gradients(
    x, weight, bias, tail, d_out, previous, b, start, at, d, T, x_b, x_t, dy_b, dy_t, needed,
    channels: tl.constexpr, W: tl.constexpr, BE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_PADS: tl.constexpr, SILU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of the sums [C, BE] of the tokens `at` [C]: 0 where not `needed`."""
    d_sums = load_inputs(d_out, b, start, at, 0, d, dy_b, dy_t, needed, channels, BE, HAS_PADS)
    d_sums = d_sums.to(ACC)
    if SILU:
        sums = conv_at(
            x, weight, bias, tail, previous, b, start, at, 0, d, T, channels, x_b, x_t, needed,
            W, channels, BE, HAS_BIAS, HAS_TAIL, HAS_PADS, ACC,
        )  # fmt: skip
        part = sigmoid(sums)
        d_sums = d_sums * part * (1.0 + sums * (1.0 - part))
    return d_sums


@kernel(
    [
        triton.Config({"BT": BT, "BE": BE}, num_warps=w, num_stages=1)
        for BT, BE, w in ((16, 16, 1), (16, 64, 4), (32, 64, 4), (32, 64, 8))
    ],
    key=("channels", "W", "length", "HAS_PADS", "SILU"),
    blocks={"BT": "length", "BE": "channels"},
)
@triton.jit
def gradients(
    x, weight, bias, tail, d_out, d_final, mask, previous, following, dx, d_tail, sums,
    T, span, spans, length, x_b, x_t, dy_b, dy_t,
    channels: tl.constexpr, W: tl.constexpr, BW: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr, HAS_PADS: tl.constexpr, HAS_OUT: tl.constexpr,
    HAS_FINAL: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """`span` tokens of BE channels; the program behind a row's last span takes its tail's tokens.

    d_out [B, T, channels] by its strides or None, d_final [B, W - 1, channels] or None. Writes
    dx [B, T, channels], with HAS_TAIL d_tail [B, W - 1, channels], and with HAS_OUT what each span
    adds to the gradients of weight and bias as sums [B, spans, W + 1, channels], the bias last.
    """
    b, at_span = program_of(spans + 1 if HAS_TAIL else spans)
    i, d = tl.arange(0, BT), tl.program_id(1) * BE + tl.arange(0, BE)
    rows = tl.arange(0, BW)
    in_tail = at_span >= spans
    begin = tl.where(in_tail, 0, at_span * span)
    tokens = tl.where(in_tail, W - 1, tl.minimum(span, T - begin))
    d_weight = tl.zeros((BW, BE), ACC)
    for offset in range(0, tokens, BT):
        start = begin + offset
        at = start + i
        here = real_tokens(mask, b, start, i, T, HAS_PADS)
        if HAS_TAIL:
            here = tl.where(in_tail, at < W - 1, here)
            at = tl.where(in_tail, at - (W - 1), at)
        total = tl.zeros((BT, BE), ACC)
        if HAS_OUT:
            d_sums = sum_gradients(
                x, weight, bias, tail, d_out, previous, b, start, at, d, T, x_b, x_t, dy_b, dy_t,
                here & (at >= 0), channels, W, BE, HAS_BIAS, HAS_TAIL, HAS_PADS, SILU, ACC,
            )  # fmt: skip
            total += d_sums * load_tap(weight, 0, d, 0, W, channels, ACC)[None, :]
            past = at
            in_x = here & (at >= 0)
            for m in tl.range(0, W, num_stages=1):
                new = in_x & (past >= 0)
                met = load_inputs(x, b, start, past, 0, d, x_b, x_t, new, channels, BE, HAS_PADS)
                met = met.to(ACC)
                if HAS_TAIL:
                    old = in_x & (past < 0)
                    kept = load_tail(tail, b, past, 0, d, channels, old, W, channels, BE)
                    met += kept.to(x.dtype.element_ty).to(ACC)
                added = tl.sum(d_sums * met, axis=0)
                d_weight += tl.where(rows[:, None] == W - 1 - m, added[None, :], 0.0)
                past = token_before(past, previous, b, T, in_x, HAS_PADS)
            d_weight += tl.where(rows[:, None] == W, tl.sum(d_sums, axis=0)[None, :], 0.0)
        ahead = at
        for m in tl.range(1, W, num_stages=1):
            before = ahead
            ahead = token_after(ahead, following, b, T, here, HAS_PADS)
            if HAS_OUT:
                later = sum_gradients(
                    x, weight, bias, tail, d_out, previous, b, start, ahead, d, T, x_b, x_t,
                    dy_b, dy_t, here & (ahead >= 0) & (ahead < T),
                    channels, W, BE, HAS_BIAS, HAS_TAIL, HAS_PADS, SILU, ACC,
                )  # fmt: skip
                total += later * load_tap(weight, 0, d, m, W, channels, ACC)[None, :]
            if HAS_FINAL:
                # With m - 1 real tokens after it, a token is in row W - 1 - m of the final state.
                last = d_final + (b.to(tl.int64) * (W - 1) + (W - 1 - m)) * channels
                d_last = tl.load(last + d, mask=d < channels, other=0.0).to(ACC)
                is_last = here & (before < T) & (ahead >= T)
                total += tl.where(is_last[:, None], d_last[None, :], 0.0)
        there = tile_mask(i < tl.where(in_tail, 0, T - start), d, channels, BE)
        place = dx + (b.to(tl.int64) * T + start) * channels
        tl.store(
            place + i[:, None] * channels + d[None, :], total.to(dx.dtype.element_ty), mask=there
        )
        if HAS_TAIL:
            there = tile_mask(here & (at < 0), d, channels, BE)
            place = d_tail + b.to(tl.int64) * ((W - 1) * channels)
            target = place + (start + i)[:, None] * channels + d[None, :]
            tl.store(target, total.to(d_tail.dtype.element_ty), mask=there)
    if HAS_OUT:
        inside = (rows <= tl.where(in_tail, -1, W))[:, None] & (d < channels)[None, :]
        place = sums + (b.to(tl.int64) * spans + at_span) * ((W + 1) * channels)
        tl.store(place + rows[:, None] * channels + d[None, :], d_weight, mask=inside)
