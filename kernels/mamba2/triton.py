"""The Mamba-2 mixer: two convolutions, then the kernels of `ssd` on raw time steps.

Their `prepare` finds time steps and decays, and their scan weights what is written and adds the
skip, so that nothing but convolved q and kv passes through memory between projections and output.

Predicted for K = V = 128, bf16, per token and head: 1 kB of v and o, and per group 1.5 kB of q and
k. At B=8 T=8192 H=16 on an H200 (4.3 TB/s): 0.27 ms of traffic with one group and 0.63 ms with a
group a head, in 4 launches (6 where segments are cut).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sleep.kernels.common.checks import compute_dtype
from hybrid_sleep.kernels.common.mixers import Dims, Mixed
from hybrid_sleep.kernels.common.triton_launch import empty, precision
from hybrid_sleep.kernels.common.triton_mixers import step
from hybrid_sleep.kernels.common.triton_sizes import contiguous, for_inputs
from hybrid_sleep.kernels.mamba2 import triton_kernels
from hybrid_sleep.kernels.mamba2.compose import Raw
from hybrid_sleep.kernels.short_conv import triton as conv
from hybrid_sleep.kernels.short_conv.tail import tail_after
from hybrid_sleep.kernels.short_conv.triton_taps import previous_tokens
from hybrid_sleep.kernels.ssd import triton as rule

SCALE = 1.0


class Tails(NamedTuple):
    """What the convolutions of q (None without) and kv leave behind."""

    q: Tensor | None
    kv: Tensor


def mamba2(raw: Raw, mask: Tensor | None, dims: Dims, output: bool, tails: bool) -> Mixed:
    """As `compose`."""
    q, kv = raw.q, raw.kv
    how = precision(kv.dtype, compute_dtype(*(x for x in raw if x is not None)))
    read = raw if output else raw._replace(q=None)
    mask = contiguous(mask)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in raw):
        o, S = _Mamba2.apply(*read, mask, dims, how)
        after = None
    elif dims.T == 1:
        return step(triton_kernels.step, raw, mask, dims, how, output, tails)
    else:
        given, after = _convolve(read, _pads(mask), dims)
        o, S = rule.forward(given, SCALE, rule.sizes_of(given.k, given.v, how), how)
    if not tails:
        return Mixed(o, S, None, None)
    new_q = after.q if after else None
    if new_q is None:
        new_q = raw.q_tail if q is None else tail_after(q, raw.q_tail, mask, dims.W)
    new_kv = after.kv if after else tail_after(kv, raw.kv_tail, mask, dims.W)
    return Mixed(o, S, new_q, new_kv)


def _pads(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, str]:
    """The last arguments of a convolution."""
    return mask, None if mask is None else previous_tokens(mask), "silu"


def _convolve(
    raw: Raw, pads: tuple[Tensor | None, Tensor | None, str], dims: Dims
) -> tuple[rule.Inputs, Tails]:
    """What the rule reads; k and v are views of one tensor."""
    kv, kv_tail = conv.forward(raw.kv, raw.kv_weight, None, raw.kv_tail, *pads)
    k, v = _heads(kv, dims)
    q = q_tail = None
    if raw.q is not None:
        q, q_tail = conv.forward(raw.q, raw.q_weight, None, raw.q_tail, *pads)
        q = q.unflatten(-1, (dims.G, dims.K))
    a, A_log, dt_bias, skip = (x.contiguous() for x in (raw.a, raw.A_log, raw.dt_bias, raw.skip))
    inputs = rule.Inputs(q, k, v, a, A_log, dt_bias, skip, raw.initial_state, pads[0])
    return inputs, Tails(q_tail, kv_tail)


def _heads(kv: Tensor, dims: Dims) -> tuple[Tensor, Tensor]:
    """Views [B, T, G, K] and [B, T, H, V] of kv [B, T, channels]."""
    k, v = kv.tensor_split((dims.key_width,), dim=-1)
    return k.unflatten(-1, (dims.G, dims.K)), v.unflatten(-1, (dims.H, dims.V))


class _Mamba2(torch.autograd.Function):
    """Keeps its inputs and nothing else: the backward pass convolves again."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, mask, dims, how = arguments
        given, _ = _convolve(Raw(*tensors), _pads(mask), dims)
        ctx.save_for_backward(*tensors, mask)
        ctx.given = dims, how
        ctx.set_materialize_grads(False)
        return rule.forward(given, SCALE, rule.sizes_of(given.k, given.v, how), how)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dS):
        *tensors, mask = ctx.saved_tensors
        dims, how = ctx.given
        raw = Raw(*tensors)
        pads = _pads(mask)
        given, _ = _convolve(raw if do is not None else raw._replace(q=None), pads, dims)
        sizes = rule.sizes_of(given.k, given.v, how)
        d_kv = empty(raw.kv, raw.kv.shape, raw.kv.dtype)
        keys, dv = _heads(d_kv, dims)
        dk = keys if sizes.R == 1 else rule.per_head(given.k, sizes, how)
        d = rule.backward(do, dS, given, SCALE, sizes, how, dk, dv)
        if sizes.R > 1:
            keys.copy_(rule.of_groups(dk, sizes))
        kv, kv_weight, _, kv_tail = conv.backward(
            d_kv, None, raw.kv, raw.kv_weight, None, raw.kv_tail, *pads
        )
        q = q_weight = q_tail = None
        if do is not None:
            dq = rule.of_groups(d.q, sizes).flatten(2).to(raw.q.dtype)
            q, q_weight, _, q_tail = conv.backward(
                dq, None, raw.q, raw.q_weight, None, raw.q_tail, *pads
            )
        A_log, dt_bias, skip = d.shared.unbind(1)
        d_initial = None if raw.initial_state is None else d.initial_state
        found = Raw(
            q, kv, d.g, q_weight, kv_weight, A_log, dt_bias, skip if do is not None else None,
            d_initial, q_tail, kv_tail,
        )  # fmt: skip
        return *for_inputs(raw, found), None, None, None
