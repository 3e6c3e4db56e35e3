"""Mamba-2's rule through the kernels of `triton_forward` and `triton_backward`.

`ssd` is the op; `forward` and `backward` also serve the mixer of `kernels.mamba2`, whose gates the
kernels compute from raw projections.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sleep.kernels.common.checks import compute_dtype
from hybrid_sleep.kernels.common.triton_launch import Precision, empty, precision
from hybrid_sleep.kernels.common.triton_sizes import (
    Sizes,
    chunk_length,
    contiguous,
    for_inputs,
    last_contiguous,
    strides,
)
from hybrid_sleep.kernels.ssd import triton_backward, triton_forward

# Programs that fill a GPU: below this many, the chunks are cut into segments.
PROGRAMS = 128
# Columns of the state that a program of a segment holds, for counting them.
COLUMNS = 64
# A segment reads its keys and values twice; it should be worth the launches.
LEAST_CHUNKS = 2


class Inputs(NamedTuple):
    """What one call reads.

    q (None: no output), k [B, T, G, K], v [B, T, H, V]. g [B, T, H] is the log decay; where A_log,
    dt_bias and skip [H] are given, it is the raw projection that the gates are computed from.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    g: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    skip: Tensor | None
    initial_state: Tensor | None
    mask: Tensor | None

    @property
    def raw(self) -> bool:
        """Whether the kernels compute the gates."""
        return self.A_log is not None


class Gates(NamedTuple):
    """Of each chunk: the running log decay as two sums [B, H, NT, 2, C] and, of raw gates, the time
    step [B, H, NT, C].
    """

    decay: Tensor
    strength: Tensor | None


class Gradients(NamedTuple):
    """Those of q (None without one of o) and k per head of values [B, T, H, K], of v, of g as it
    was given and of the initial state; `shared` [H, 3] of A_log, dt_bias and skip.
    """

    q: Tensor | None
    k: Tensor
    v: Tensor
    g: Tensor
    initial_state: Tensor
    shared: Tensor | None


def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
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
    how = precision(v.dtype, compute_dtype(q, k, v))
    sizes = sizes_of(k, v, how, chunk_size, segments)
    mask = contiguous(mask)
    q = q if output else None
    leaves = (q, k, v, g, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return _SSD.apply(*leaves, mask, scale, sizes, how)
    return forward(Inputs(q, k, v, g, None, None, None, initial_state, mask), scale, sizes, how)


def sizes_of(
    k: Tensor,
    v: Tensor,
    how: Precision,
    chunk_size: int | None = None,
    segments: int | None = None,
) -> Sizes:
    """The sizes of a call; what is None is chosen by them, and by nothing else: with or without
    output, S takes the same path.
    """
    (B, T, H, V), (*_, G, K) = v.shape, k.shape
    sizes = Sizes(B, T, H, H // G, K, V, chunk_length(T, chunk_size, how), 1)
    if segments is None:
        programs = B * H * -(-V // COLUMNS)
        segments = max(1, min(PROGRAMS // programs, sizes.chunks // LEAST_CHUNKS))
    return sizes._replace(segments=segments)


def prepare(given: Inputs, sizes: Sizes, how: Precision) -> Gates:
    """The gates of each chunk."""
    B, H, C, NT = sizes.B, sizes.H, sizes.C, sizes.chunks
    gates = Gates(
        empty(given.v, (B, H, NT, 2, C), how.state),
        empty(given.v, (B, H, NT, C), how.state) if given.raw else None,
    )
    triton_forward.prepare.launch(
        lambda meta: (B * NT, triton.cdiv(H, meta["BH"])),
        g=given.g.contiguous(), A_log=given.A_log, dt_bias=given.dt_bias, mask=given.mask,
        **gates._asdict(), T=sizes.T, NT=NT, H=H, C=C, HAS_MASK=given.mask is not None,
        RAW=given.raw, ACC=how.ACC,
    )  # fmt: skip
    return gates


def scan(
    given: Inputs,
    gates: Gates,
    scale: float,
    sizes: Sizes,
    how: Precision,
    x: Tensor | None,
    y: Tensor | None,
    first: Tensor | None,
    *,
    q: Tensor | None = None,
    back: bool = False,
    keep: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Along the chunks, from the state `first`: outputs (only with q), what the run holds before
    each chunk (only with `keep`), and what it ends with. See the kernel for x, y and `back`.
    """
    B, T, H, R, K, V, C, segments = sizes
    like = given.v
    out = None if q is None else empty(like, (B, T, H, V), like.dtype)
    states = empty(like, (B, H, sizes.chunks, K, V), how.between) if keep else None
    final = empty(like, (B, H, K, V), how.state)
    first = contiguous(first)
    # Segments of equal length; the last one may be shorter, and none is empty.
    per_segment = -(-sizes.chunks // segments)
    segments = -(-sizes.chunks // per_segment)
    common = dict(
        q=q, x=x, y=y, skip=given.skip, mask=given.mask, **gates._asdict(),
        **strides("q", q), **strides("x", x), **strides("y", y),
        **sizes.shared(), V=V, per_segment=per_segment, segments=segments, busy=sizes.busy,
        scale=scale,
        HAS_MASK=given.mask is not None, RAW=given.raw, BACK=back, ADDS=x is not None,
        DOT=how.DOT, ACC=how.ACC, MODE=how.MODE,
    )  # fmt: skip

    def grid(meta):
        return triton.cdiv(V, meta["BV"]) * B * H, segments

    results = dict(out=out, states=states, OUT=q is not None, KEEP=keep, total=None, TOTAL=False)
    if segments == 1:
        triton_forward.scan.launch(
            grid, **common, **results,
            initial=first, final=final, HAS_INITIAL=first is not None, FINAL=True,
        )  # fmt: skip
        return out, states, final
    added = empty(like, (B, H, segments, K, V), how.state)
    total = empty(like, (B, H, segments), how.state)
    triton_forward.scan.launch(
        grid, **common, out=None, states=None, OUT=False, KEEP=False, total=total, TOTAL=True,
        initial=None, final=added, HAS_INITIAL=False, FINAL=True,
    )  # fmt: skip
    again = q is not None or keep
    starts = empty(like, (B, H, segments, K, V), how.state) if again else None
    triton_forward.combine.launch(
        lambda meta: (B * H, triton.cdiv(K * V, meta["BKV"])),
        initial=first, added=added, total=total, starts=starts, final=final, segments=segments,
        KV=K * V, HAS_INITIAL=first is not None, STARTS=again, BACK=back, ACC=how.ACC,
    )  # fmt: skip
    if again:
        triton_forward.scan.launch(
            grid, **common, **results,
            initial=starts, final=None, HAS_INITIAL=True, FINAL=False,
        )  # fmt: skip
    return out, states, final


def forward(
    given: Inputs, scale: float, sizes: Sizes, how: Precision
) -> tuple[Tensor | None, Tensor]:
    """o (None without q) and S."""
    q, k, v = last_contiguous(given.q), last_contiguous(given.k), last_contiguous(given.v)
    gates = prepare(given, sizes, how)
    o, _, S = scan(given, gates, scale, sizes, how, k, v, given.initial_state, q=q)
    return o, S


def backward(
    do: Tensor | None,
    dS: Tensor | None,
    given: Inputs,
    scale: float,
    sizes: Sizes,
    how: Precision,
    dk: Tensor,
    dv: Tensor,
) -> Gradients:
    """Gradients from those of o and of S; dk [B, T, H, K] and dv [B, T, H, V], of any strides but
    a last one of 1, are filled.
    """
    B, T, H, R, K, V, _, _ = sizes
    has_out = do is not None
    q = last_contiguous(given.q) if has_out else None
    k, v = last_contiguous(given.k), last_contiguous(given.v)
    do = contiguous(do)
    gates = prepare(given, sizes, how)
    _, states, _ = scan(given, gates, scale, sizes, how, k, v, given.initial_state, keep=True)
    _, d_states, d_initial = scan(given, gates, scale, sizes, how, q, do, dS, back=True, keep=True)
    dq = empty(v, (B, T, H, K), given.q.dtype if R == 1 else how.state) if has_out else None
    dg = empty(v, (B, T, H), how.state)
    parts = empty(v, (B, sizes.chunks, H, 3), how.state) if given.raw else None
    triton_backward.gradients.launch(
        (B * H * sizes.chunks,),
        q=q, k=k, v=v, d_out=do, g=given.g.contiguous(), A_log=given.A_log, dt_bias=given.dt_bias,
        skip=given.skip, mask=given.mask, **gates._asdict(), states=states, d_states=d_states,
        dq=dq, dk=dk, dv=dv, dg=dg, parts=parts, scale=scale,
        **strides("q", q), **strides("k", k), **strides("v", v),
        **strides("dq", dq), **strides("dk", dk), **strides("dv", dv), **sizes.shared(), V=V,
        HAS_MASK=given.mask is not None, HAS_OUT=has_out, RAW=given.raw,
        DOT=how.DOT, ACC=how.ACC, MODE=how.MODE,
    )  # fmt: skip
    return Gradients(dq, dk, dv, dg, d_initial, None if parts is None else parts.sum((0, 1)))


def per_head(x: Tensor, sizes: Sizes, how: Precision) -> Tensor:
    """Room for the gradient of keys [B, T, H, K], in the state's dtype if heads will be summed."""
    dtype = x.dtype if sizes.R == 1 else how.state
    return empty(x, (sizes.B, sizes.T, sizes.H, sizes.K), dtype)


def of_groups(d: Tensor | None, sizes: Sizes) -> Tensor | None:
    """The sum [B, T, G, K] of a gradient [B, T, H, K] over the heads that share a group."""
    return d if d is None or sizes.R == 1 else d.unflatten(2, (-1, sizes.R)).sum(3)


class _SSD(torch.autograd.Function):
    """Keeps its inputs and nothing else."""

    @staticmethod
    def forward(ctx, q, k, v, g, initial_state, mask, scale, sizes, how):
        given = Inputs(q, k, v, g, None, None, None, initial_state, mask)
        ctx.save_for_backward(*given)
        ctx.sizes = scale, sizes, how
        ctx.set_materialize_grads(False)
        return forward(given, scale, sizes, how)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dS):
        given = Inputs(*ctx.saved_tensors)
        scale, sizes, how = ctx.sizes
        k, v = given.k, given.v
        dk, dv = per_head(k, sizes, how), empty(v, v.shape, v.dtype)
        d = backward(do, dS, given, scale, sizes, how, dk, dv)
        grads = (of_groups(d.q, sizes), of_groups(d.k, sizes), d.v, d.g, d.initial_state)
        inputs = (given.q, k, v, given.g, given.initial_state)
        return *for_inputs(inputs, grads), None, None, None, None
