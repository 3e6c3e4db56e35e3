"""What the two mixers share: checks, composition of other ops, short convolutions and their tails.

A mixer is a state-space layer between its projections: convolve, gate, read and write fast weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.kernels.common.checks import check_mask, check_sequence, check_tensor
from hybrid_sleep.kernels.short_conv import short_conv
from hybrid_sleep.validation import check_count


class Dims(NamedTuple):
    """Sizes of one call: G key heads of K, H value heads of V, filters of width W."""

    B: int
    T: int
    G: int
    K: int
    H: int
    V: int
    W: int

    @property
    def key_width(self) -> int:
        """Channels of q, and of the keys in kv."""
        return self.G * self.K


class Mixed(NamedTuple):
    """What a mixer returns.

    o [B, T, H, V] in kv's dtype (None without output), S [B, H, K, V] in float32 (float64 for
    float64 inputs), q_tail and kv_tail [B, W - 1, channels] (None where they are not kept).
    """

    o: Tensor | None
    S: Tensor
    q_tail: Tensor | None
    kv_tail: Tensor | None


def register_composed(op: str, compose: Callable[..., Mixed], parts: str) -> None:
    """Add to mixer `op` its composition of other ops, the `parts`, as two implementations.

    "reference" calls the references of the parts, token by token, "chunked" their chunked paths,
    which is what a CPU runs for several tokens.
    """
    dispatch.register(
        op,
        "reference",
        functools.partial(compose, "reference"),
        rank=100,
        wants=lambda call: f"one token is one step of {parts}" if call.tokens == 1 else None,
    )
    dispatch.register(
        op,
        "chunked",
        functools.partial(compose, "chunked"),
        rank=0,
        wants=lambda call: f"composed of {parts}, any device",
    )


def run(
    op: str,
    raw: Any,
    *,
    per_token: Sequence[str] = (),
    per_head: Sequence[str],
    key_heads: int,
    mask: Tensor | None,
    output: bool,
    tails: bool,
    impl: str,
    **options: Any,
) -> Mixed:
    """Check the arguments of mixer `op`, then run the implementation that takes the call.

    raw names all tensors as the op does; per_token and per_head name those, beside a, that are
    [B, T, H] and [H]; options: what else the implementations of this op take. Raises TypeError or
    ValueError naming the argument that does not fit.
    """
    dims = _check(raw, per_token, per_head, key_heads, mask, output)
    call = dispatch.call_of(raw.kv, raw, dims.B, dims.T, dims.H, (dims.K, dims.V), mask)
    return dispatch.select(op, impl, call)(raw, mask, dims, output, tails, **options)


def _check(
    raw: Any,
    per_token: Sequence[str],
    per_head: Sequence[str],
    key_heads: int,
    mask: Tensor | None,
    output: bool,
) -> Dims:
    check_sequence("kv", raw.kv, "[B, T, channels]")
    check_sequence("a", raw.a, "[B, T, H]")
    check_sequence("q_weight", raw.q_weight, "[G * K, W]")
    B, T, kv_width = raw.kv.shape
    H, (key_width, W) = raw.a.shape[2], raw.q_weight.shape
    G = check_count("key_heads", key_heads)
    if key_width % G:
        raise ValueError(f"key_heads must divide the {key_width} rows of q_weight, got {G}")
    if H % G:
        raise ValueError(f"key_heads must divide the {H} heads of a, got {G}")
    if kv_width <= key_width or (kv_width - key_width) % H:
        raise ValueError(
            f"kv must have {key_width} channels of keys and a multiple of {H} of values, "
            f"got {kv_width} channels"
        )
    for name in ("a", *per_token):
        check_tensor(name, getattr(raw, name), (B, T, H), "[B, T, H]")
    check_tensor("kv_weight", raw.kv_weight, (kv_width, W), "[G * K + H * V, W]")
    for name in per_head:
        check_tensor(name, getattr(raw, name), (H,), "[H]")
    if raw.q is not None:
        check_tensor("q", raw.q, (B, T, key_width), "[B, T, G * K]")
    elif output:
        raise ValueError("q must be a Tensor [B, T, G * K] unless output=False, got None")
    K, V = key_width // G, (kv_width - key_width) // H
    if raw.initial_state is not None:
        check_tensor("initial_state", raw.initial_state, (B, H, K, V), "[B, H, K, V]")
    for name, channels in (("q_tail", key_width), ("kv_tail", kv_width)):
        tail = getattr(raw, name)
        if tail is not None:
            check_tensor(name, tail, (B, W - 1, channels), "[B, W - 1, channels]")
    check_mask(mask, B, T)
    return Dims(B, T, G, K, H, V, W)


def convolve(
    raw: Any, mask: Tensor | None, dims: Dims, output: bool, tails: bool, impl: str
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q (None without output), k [B, T, G, K], v [B, T, H, V] after convolution and SiLU; tails."""
    q, q_tail = raw.q, raw.q_tail
    kv, kv_tail = short_conv(
        raw.kv, raw.kv_weight, initial_state=raw.kv_tail, mask=mask, impl=impl
    )
    k, v = kv.split((dims.key_width, kv.shape[2] - dims.key_width), dim=-1)
    k = k.reshape(dims.B, dims.T, dims.G, dims.K)
    v = v.reshape(dims.B, dims.T, dims.H, dims.V)
    if q is not None and (output or tails):
        q, q_tail = short_conv(q, raw.q_weight, initial_state=q_tail, mask=mask, impl=impl)
        q = q.reshape(dims.B, dims.T, dims.G, dims.K)
    if not tails:
        q_tail = kv_tail = None
    return (q if output else None), k, v, q_tail, kv_tail


def time_step(a: Tensor, dt_bias: Tensor) -> Tensor:
    """`softplus(a + dt_bias)`: [B, T, H], fp32 or wider."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return F.softplus(a.to(dtype) + dt_bias.to(dtype))


def decay_rate(A_log: Tensor, dtype: torch.dtype) -> Tensor:
    """`-exp(A_log)`: [H] in `dtype`."""
    return -A_log.to(dtype).exp()
