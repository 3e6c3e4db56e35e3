"""The Gated DeltaNet mixer through fused kernels: one for the chunks, then along them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sleep.kernels.common.checks import compute_dtype, hide_pads
from hybrid_sleep.kernels.common.mixers import Dims, Mixed, decay_rate, time_step
from hybrid_sleep.kernels.common.triton_launch import Precision, empty, next_power, precision
from hybrid_sleep.kernels.common.triton_mixers import step
from hybrid_sleep.kernels.common.triton_sizes import Sizes, chunk_length, contiguous, for_inputs
from hybrid_sleep.kernels.gated_delta_net import triton_kernels
from hybrid_sleep.kernels.gated_delta_net.compose import Raw, write_strength
from hybrid_sleep.kernels.gated_delta_rule import triton as rule
from hybrid_sleep.kernels.short_conv import triton as conv
from hybrid_sleep.kernels.short_conv.tail import tail_after
from hybrid_sleep.kernels.short_conv.triton_taps import previous_tokens


class Heads(NamedTuple):
    """q (None without output), k [B, T, G, K] and v [B, T, H, V] as the rule takes them.

    q_length, k_length [B, T, G]: what q and k were multiplied by, where a gradient needs it.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    q_length: Tensor | None
    k_length: Tensor | None


def gated_delta_net(
    raw: Raw,
    mask: Tensor | None,
    dims: Dims,
    output: bool,
    tails: bool,
    allow_neg_eigval: bool,
) -> Mixed:
    """As `compose`."""
    q, kv = raw.q, raw.kv
    mask = contiguous(mask)
    how = precision(kv.dtype, compute_dtype(*(x for x in raw if x is not None)))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in raw):
        read = raw if output else raw._replace(q=None)
        o, S = _GatedDeltaNet.apply(*read, mask, dims, how, allow_neg_eigval)
    elif dims.T == 1:
        return step(
            triton_kernels.step, raw, mask, dims, how, output, tails,
            scale=dims.K**-0.5, NEGATIVE=allow_neg_eigval,
        )  # fmt: skip
    else:
        read = _dense(raw if output else raw._replace(q=None))
        sizes = _sizes(dims, how)
        heads, chunks = _prologue(
            read, mask, _previous(mask), sizes, dims, how, allow_neg_eigval, keep=False
        )
        o, S = rule.scan(
            heads.q, heads.k, heads.v, raw.initial_state, None, chunks, dims.K**-0.5, sizes, how
        )
    if not tails:
        return Mixed(o, S, None, None)
    after = raw.q_tail if q is None else tail_after(q, raw.q_tail, mask, dims.W)
    return Mixed(o, S, after, tail_after(kv, raw.kv_tail, mask, dims.W))


def _previous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else previous_tokens(mask)


def _sizes(dims: Dims, how: Precision) -> Sizes:
    C = chunk_length(dims.T, None, how)
    sizes = Sizes(dims.B, dims.T, dims.H, dims.H // dims.G, dims.K, dims.V, C, 1)
    return sizes._replace(segments=rule.segment_count(sizes))


def _dense(raw: Raw) -> Raw:
    """Everything contiguous; q and kv, slices of a projection, in their channels alone."""
    changed = {
        name: x.contiguous()
        for name, x in raw._asdict().items()
        if x is not None and (name not in ("q", "kv") or x.stride(-1) != 1)
    }
    return raw._replace(**changed)


def _prologue(
    raw: Raw,
    mask: Tensor | None,
    previous: Tensor | None,
    sizes: Sizes,
    dims: Dims,
    how: Precision,
    allow_neg_eigval: bool,
    keep: bool,
) -> tuple[Heads, rule.Chunks]:
    """q, k, v and the chunks of a call in one launch."""
    B, T, G, K, H, V, W = dims
    out = raw.q is not None
    kv, pairs = raw.kv, (B, H, sizes.chunks, sizes.C)

    def room(shape: tuple[int, ...], dtype: torch.dtype, needed: bool = True) -> Tensor | None:
        return empty(kv, shape, dtype) if needed else None

    heads = Heads(
        room((B, T, G, K), kv.dtype, out), room((B, T, G, K), kv.dtype),
        room((B, T, H, V), kv.dtype),
        room((B, T, G), how.state, keep and out), room((B, T, G), how.state, keep),
    )  # fmt: skip
    chunks = rule.Chunks(
        room((*pairs, sizes.C), how.between), room((*pairs, sizes.C), how.between, out),
        room((*pairs[:-1], 2, sizes.C), how.state), room(pairs, how.state),
    )  # fmt: skip
    strides = raw.kv if raw.q is None else raw.q
    triton_kernels.prologue.launch(
        (B * H * sizes.chunks,),
        q=raw.q, kv=kv, a=raw.a, b_raw=raw.b, q_weight=raw.q_weight, kv_weight=raw.kv_weight,
        A_log=raw.A_log, dt_bias=raw.dt_bias, q_tail=raw.q_tail, kv_tail=raw.kv_tail,
        mask=mask, previous=previous,
        q_out=heads.q, k_out=heads.k, v_out=heads.v,
        q_length=heads.q_length, k_length=heads.k_length, **chunks._asdict(),
        q_b=strides.stride(0), q_t=strides.stride(1), kv_b=kv.stride(0), kv_t=kv.stride(1),
        **sizes.shared(), V=V, W=W, HAS_Q_TAIL=raw.q_tail is not None,
        HAS_KV_TAIL=raw.kv_tail is not None, HAS_MASK=mask is not None, OUT=out, KEEP=keep,
        NEGATIVE=allow_neg_eigval, **how._asdict(),
    )  # fmt: skip
    return heads, chunks


def _length_back(
    d_unit: Tensor, unit: Tensor, length: Tensor, dims: Dims, how: Precision
) -> Tensor:
    """Gradient of what `unit` [B, T, G, K] was before its length was taken away, as channels."""
    B, T, G, K, H, _, _ = dims
    found = empty(unit, (B, T, G * K), unit.dtype)
    triton_kernels.length_back.launch(
        lambda meta: (triton.cdiv(B * T * G, meta["ROWS"]),),
        d_unit=d_unit, unit=unit, length=length, d_value=found, tokens=B * T,
        G=G, R=H // G, K=K, BK=next_power(K), ACC=how.ACC, H=H,
    )  # fmt: skip
    return found


class _GatedDeltaNet(torch.autograd.Function):
    """Keeps its inputs and nothing else; the backward pass finds the rest again."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, mask, dims, how, allow_neg_eigval = arguments
        raw, sizes = _dense(Raw(*tensors)), _sizes(dims, how)
        heads, chunks = _prologue(
            raw, mask, _previous(mask), sizes, dims, how, allow_neg_eigval, keep=False
        )
        o, S = rule.scan(
            heads.q, heads.k, heads.v, raw.initial_state, None, chunks, dims.K**-0.5, sizes, how
        )
        ctx.save_for_backward(*tensors, mask)
        ctx.given = dims, how, allow_neg_eigval
        ctx.set_materialize_grads(False)
        return o, S

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dS):
        *tensors, mask = ctx.saved_tensors
        dims, how, allow_neg_eigval = ctx.given
        given = Raw(*tensors)
        raw, sizes = _dense(given if do is not None else given._replace(q=None)), _sizes(dims, how)
        previous = _previous(mask)
        heads, chunks = _prologue(
            raw, mask, previous, sizes, dims, how, allow_neg_eigval, keep=True
        )
        dq, dk, dv, dg, dbeta, d_initial = rule.backward(
            do, dS, heads.q, heads.k, heads.v, raw.initial_state, mask, chunks, dims.K**-0.5,
            sizes, how,
        )  # fmt: skip
        d_kv = torch.cat(
            (_length_back(dk, heads.k, heads.k_length, dims, how), dv.flatten(2)), dim=-1
        )
        kv, kv_weight, _, kv_tail = conv.backward(
            d_kv, None, raw.kv, raw.kv_weight, None, raw.kv_tail, mask, previous, "silu"
        )
        q = q_weight = q_tail = None
        if do is not None:
            dq = _length_back(dq, heads.q, heads.q_length, dims, how)
            q, q_weight, _, q_tail = conv.backward(
                dq, None, raw.q, raw.q_weight, None, raw.q_tail, mask, previous, "silu"
            )
        with torch.enable_grad():
            a, b = hide_pads(mask, raw.a, raw.b)
            leaves = [x.detach().requires_grad_() for x in (a, b, raw.A_log, raw.dt_bias)]
            a, b, A_log, dt_bias = leaves
            dt = time_step(a, dt_bias)
            strength = write_strength(b.to(dt.dtype), allow_neg_eigval)
            gates = (decay_rate(A_log, dt.dtype) * dt, strength)
        a, b, A_log, dt_bias = torch.autograd.grad(gates, leaves, (dg, dbeta))
        if raw.initial_state is None:
            d_initial = None
        found = Raw(
            q, kv, a, b, q_weight, kv_weight, A_log, dt_bias, d_initial, q_tail, kv_tail
        )
        return *for_inputs(given, found), None, None, None, None
