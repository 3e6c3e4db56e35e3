"""The gated delta rule through the kernels of `triton_forward` and `triton_backward`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sleep.kernels.common.checks import compute_dtype
from hybrid_sleep.kernels.common.triton_launch import Precision, empty, next_power, precision
from hybrid_sleep.kernels.common.triton_sizes import (
    Sizes,
    chunk_length,
    contiguous,
    for_inputs,
    last_contiguous,
    strides,
)
from hybrid_sleep.kernels.gated_delta_rule import triton_backward, triton_forward

# Programs that fill a GPU: below this many, the chunks are cut into segments.
PROGRAMS = 128
# Columns of the state that a program holds where few rows sleep.
NARROW = 16
# A segment pays for its transition (K more columns) with at least this many chunks.
LEAST_CHUNKS = 4


class Chunks(NamedTuple):
    """What `prepare` finds of each chunk: M and P (None without queries) [B, H, NT, C, C], c as two
    sums [B, H, NT, 2, C] and beta [B, H, NT, C].
    """

    inverse: Tensor
    weights: Tensor | None
    decay: Tensor
    strength: Tensor


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    scale: float,
    chunk_size: int | None,
    output: bool,
    segments: int | None = None,
) -> tuple[Tensor | None, Tensor]:
    """As `reference`; `segments` is how many parts of each row are scanned at once (None: by how
    many heads there are). The result depends on it no further than by rounding.
    """
    B, T, H, V = v.shape
    K = k.shape[-1]
    how = precision(v.dtype, compute_dtype(q, k, v))
    C = chunk_length(T, chunk_size, how)
    sizes = Sizes(B, T, H, H // k.shape[2], K, V, C, 1)
    sizes = sizes._replace(segments=segment_count(sizes) if segments is None else segments)
    mask = contiguous(mask)
    leaves = (q if output else None, k, v, g, beta, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return _GatedDelta.apply(*leaves, mask, scale, sizes, how)
    o, S, _ = forward(*leaves, mask, scale, sizes, how)
    return o, S


def segment_count(sizes: Sizes) -> int:
    """As many segments as fill a GPU, of at least LEAST_CHUNKS chunks; 1 where the heads do.

    It depends on nothing but the sizes: with or without output, S takes the same path. A transition
    of K above 128 does not fit into shared memory.
    """
    if sizes.K > 128:
        return 1
    programs = sizes.B * sizes.H * -(-sizes.V // NARROW)
    return max(1, min(PROGRAMS // programs, sizes.chunks // LEAST_CHUNKS))


def prepare(
    q: Tensor | None,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    sizes: Sizes,
    how: Precision,
) -> Chunks:
    """What of each chunk does not depend on the state."""
    B, H, C, NT = sizes.B, sizes.H, sizes.C, sizes.chunks
    found = Chunks(
        empty(k, (B, H, NT, C, C), how.between),
        None if q is None else empty(k, (B, H, NT, C, C), how.between),
        empty(k, (B, H, NT, 2, C), how.state),
        empty(k, (B, H, NT, C), how.state),
    )
    triton_forward.prepare.launch(
        (B * H * NT,),
        q=q, k=k, g=g.contiguous(), beta=beta.contiguous(), mask=mask, **found._asdict(),
        **strides("q", k if q is None else q), **strides("k", k), **sizes.shared(),
        HAS_MASK=mask is not None, OUT=q is not None, **how._asdict(),
    )  # fmt: skip
    return found


def scan(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    chunks: Chunks,
    scale: float,
    sizes: Sizes,
    how: Precision,
    *,
    states: Tensor | None = None,
    written: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Along the chunks: o (None without q) and the final state, both new.

    states, written: filled where they are given, and then in one segment.
    """
    B, T, H, R, K, V, C, segments = sizes
    o = None if q is None else empty(v, (B, T, H, V), v.dtype)
    S = empty(v, (B, H, K, V), how.state)
    initial = contiguous(initial_state)
    given = dict(
        q=q, k=k, v=v, mask=mask, **chunks._asdict(),
        **strides("q", k if q is None else q), **strides("k", k), **strides("v", v),
        scale=scale, busy=sizes.busy, V=V, HAS_MASK=mask is not None, **sizes.shared(),
        DOT=how.DOT, ACC=how.ACC, MODE=how.MODE,
    )  # fmt: skip
    if segments == 1 or states is not None:
        triton_forward.scan.launch(
            lambda meta: (triton.cdiv(V, meta["BV"]) * B * H, 1),
            **given, initial=initial, out=o, written=written, states=states, final=S,
            transition=None, per_segment=sizes.chunks, segments=1,
            HAS_INITIAL=initial is not None, OUT=q is not None, KEEP=states is not None,
            AFFINE=False, FINAL=True,
        )  # fmt: skip
        return o, S
    # Segments of equal length; the last one may be shorter, and none is empty.
    per_segment = -(-sizes.chunks // segments)
    segments = -(-sizes.chunks // per_segment)
    added = empty(v, (B, H, segments, K, V), how.state)
    transition = empty(v, (B, H, segments, K, K), how.state)
    given |= dict(written=None, states=None, per_segment=per_segment, segments=segments, KEEP=False)
    triton_forward.scan.launch(
        lambda meta: (
            (triton.cdiv(V, meta["BV"]) + triton.cdiv(K, meta["BV"])) * B * H,
            segments,
        ),
        **given, initial=None, out=None, final=added, transition=transition,
        HAS_INITIAL=False, OUT=False, AFFINE=True, FINAL=True,
    )  # fmt: skip
    starts = None if q is None else empty(v, (B, H, segments, K, V), how.state)
    triton_forward.combine.launch(
        lambda meta: (B * H, triton.cdiv(V, meta["BV"])),
        initial=initial, added=added, transition=transition, starts=starts, final=S,
        segments=segments, busy=sizes.busy, K=K, V=V, BK=next_power(K),
        HAS_INITIAL=initial is not None, STARTS=starts is not None, ACC=how.ACC, FINE=how.FINE,
    )  # fmt: skip
    if q is not None:
        triton_forward.scan.launch(
            lambda meta: (triton.cdiv(V, meta["BV"]) * B * H, segments),
            **given, initial=starts, out=o, final=None, transition=None,
            HAS_INITIAL=True, OUT=True, AFFINE=False, FINAL=False,
        )  # fmt: skip
    return o, S


def forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    scale: float,
    sizes: Sizes,
    how: Precision,
) -> tuple[Tensor | None, Tensor, Chunks]:
    """o (None without q), S and what was found of each chunk."""
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    chunks = prepare(q, k, g, beta, mask, sizes, how)
    return *scan(q, k, v, initial_state, mask, chunks, scale, sizes, how), chunks


def backward(
    do: Tensor | None,
    dS: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    chunks: Chunks,
    scale: float,
    sizes: Sizes,
    how: Precision,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and of the initial state; those of shared q and k per head of
    values, [B, T, H, K].
    """
    B, T, H, R, K, V, C, _ = sizes
    NT = sizes.chunks
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    states, d_states = (empty(v, (B, H, NT, K, V), how.between) for _ in range(2))
    written, passed = (empty(v, (B, T, H, V), how.between) for _ in range(2))
    scan(
        None, k, v, initial_state, mask, chunks, scale, sizes, how, states=states, written=written
    )
    has_out = do is not None
    queries = q if has_out else None
    common = dict(
        q=queries, k=k, mask=mask, d_out=contiguous(do),
        **strides("q", q if has_out else k), **strides("k", k), scale=scale, V=V,
        HAS_MASK=mask is not None, HAS_OUT=has_out, **sizes.shared(),
        DOT=how.DOT, ACC=how.ACC, MODE=how.MODE,
    )  # fmt: skip
    d_initial = empty(v, (B, H, K, V), how.state)
    triton_backward.scan_back.launch(
        lambda meta: (triton.cdiv(V, meta["BV"]) * B * H,),
        **common, **chunks._asdict(), d_final=contiguous(dS),
        passed=passed, d_states=d_states, d_initial=d_initial, HAS_FINAL=dS is not None,
        busy=sizes._replace(segments=1).busy,
    )  # fmt: skip
    dq = empty(v, (B, T, H, K), q.dtype) if has_out else None
    dk, dv = empty(v, (B, T, H, K), k.dtype), empty(v, (B, T, H, V), v.dtype)
    dg, dbeta = (empty(v, (B, T, H), how.state) for _ in range(2))
    d_mixed = empty(v, (B, H, NT, C, C), how.between)
    given = common | dict(
        decay=chunks.decay, strength=chunks.strength, written=written, passed=passed,
        d_mixed=d_mixed, d_weights=empty(v, d_mixed.shape, how.between) if has_out else None,
        d_decay=empty(v, chunks.strength.shape, how.state),
        d_strength=empty(v, chunks.strength.shape, how.state),
    )  # fmt: skip
    triton_backward.pairs.launch((B * H * NT,), **given, v=v, **strides("v", v), dv=dv)
    triton_backward.gradients.launch(
        (B * H * NT,), **given, states=states, d_states=d_states, dq=dq, dk=dk, dg=dg, dbeta=dbeta
    )
    return dq, dk, dv, dg, dbeta, d_initial


class _GatedDelta(torch.autograd.Function):
    """Keeps its inputs and nothing else; the backward pass computes the chunks again.

    Training goes N times through each window, so that what one pass keeps counts N times.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial_state, mask, scale, sizes, how):
        o, S, _ = forward(q, k, v, g, beta, initial_state, mask, scale, sizes, how)
        ctx.save_for_backward(q, k, v, g, beta, initial_state, mask)
        ctx.given = scale, sizes, how
        ctx.set_materialize_grads(False)
        return o, S

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dS):
        q, k, v, g, beta, initial_state, mask = ctx.saved_tensors
        scale, sizes, how = ctx.given
        queries = None if do is None else last_contiguous(q)
        chunks = prepare(queries, last_contiguous(k), g, beta, mask, sizes, how)
        *grads, d_initial = backward(
            do, dS, q, k, v, initial_state, mask, chunks, scale, sizes, how
        )
        inputs = (q, k, v, g, beta, initial_state)
        return *for_inputs(inputs, (*grads, d_initial)), None, None, None, None
