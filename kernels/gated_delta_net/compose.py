"""The Gated DeltaNet mixer as a composition of the short convolution and the gated delta rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_sleep.kernels.common.mixers import Dims, Mixed, convolve, decay_rate, time_step
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule


class Raw(NamedTuple):
    """What a call reads, as the public op names it; q is None where nothing is read with it."""

    q: Tensor | None
    kv: Tensor
    a: Tensor
    b: Tensor
    q_weight: Tensor
    kv_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    initial_state: Tensor | None
    q_tail: Tensor | None
    kv_tail: Tensor | None


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dim, computed in fp32 or fp64.

    With |k| <= 1 and beta <= 2 the factor I - beta k k^T of the rule never amplifies what a state
    holds, over however many tokens and passes.
    """
    promoted = x.to(torch.promote_types(x.dtype, torch.float32))
    return (promoted * torch.rsqrt(promoted.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def write_strength(b: Tensor, allow_neg_eigval: bool) -> Tensor:
    """beta, in (0, 1), or in (0, 2) where transitions may have a negative eigenvalue."""
    return b.sigmoid() * 2 if allow_neg_eigval else b.sigmoid()


def compose(
    impl: str,
    raw: Raw,
    mask: Tensor | None,
    dims: Dims,
    output: bool,
    tails: bool,
    allow_neg_eigval: bool,
) -> Mixed:
    """q, k, v <- silu(conv(raw));  g = -exp(A_log) softplus(a + dt_bias);  beta from
    `write_strength`; gated delta rule with q and k of length 1. `impl` is that of the parts.
    """
    q, k, v, q_tail, kv_tail = convolve(raw, mask, dims, output, tails, impl)
    repeats = dims.H // dims.G
    k = l2_normalize(k).repeat_interleave(repeats, dim=2)
    step = time_step(raw.a, raw.dt_bias)
    # The rule wants queries even where it reads nothing; the keys stand in, unread.
    q = l2_normalize(q).repeat_interleave(repeats, dim=2) if output else k
    o, S = gated_delta_rule(
        q,
        k,
        v,
        decay_rate(raw.A_log, step.dtype) * step,
        write_strength(raw.b.to(step.dtype), allow_neg_eigval),
        initial_state=raw.initial_state,
        mask=mask,
        output=output,
        impl=impl,
    )
    return Mixed(o, S, q_tail, kv_tail)
