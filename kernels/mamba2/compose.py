"""The Mamba-2 mixer as a composition of the short convolution and SSD."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hybrid_sleep.kernels.common.mixers import Dims, Mixed, convolve, decay_rate, time_step
from hybrid_sleep.kernels.ssd import ssd


class Raw(NamedTuple):
    """What a call reads, as the public op names it; q is None where nothing is read with it."""

    q: Tensor | None
    kv: Tensor
    a: Tensor
    q_weight: Tensor
    kv_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    skip: Tensor
    initial_state: Tensor | None
    q_tail: Tensor | None
    kv_tail: Tensor | None


def compose(
    impl: str, raw: Raw, mask: Tensor | None, dims: Dims, output: bool, tails: bool
) -> Mixed:
    """q, k, v <- silu(conv(raw));  dt = softplus(a + dt_bias);  SSD with g = -exp(A_log) dt and
    dt v;  o <- o + skip v. `impl` is that of the parts.
    """
    q, k, v, q_tail, kv_tail = convolve(raw, mask, dims, output, tails, impl)
    step = time_step(raw.a, raw.dt_bias)
    o, S = ssd(
        k if q is None else q,
        k,
        v * step[..., None],
        decay_rate(raw.A_log, step.dtype) * step,
        initial_state=raw.initial_state,
        mask=mask,
        output=output,
        impl=impl,
    )
    if o is not None:
        o = (o + raw.skip[:, None] * v).to(v.dtype)
    return Mixed(o, S, q_tail, kv_tail)
