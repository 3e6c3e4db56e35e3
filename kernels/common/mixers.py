"""What the two mixers share: raw projections, short convolutions and their tails, checks.

A mixer is a state-space layer between its projections: convolve, gate, read and write fast weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.kernels.common.checks import check_mask, check_sequence, check_tensor
from hybrid_sleep.kernels.short_conv import short_conv


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


def check_mixer(
    q: Tensor | None,
    kv: Tensor,
    a: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    per_head: dict[str, Tensor],
    key_heads: int,
    initial_state: Tensor | None,
    q_tail: Tensor | None,
    kv_tail: Tensor | None,
    mask: Tensor | None,
    output: bool,
) -> Dims:
    """The sizes of a call; raises TypeError or ValueError naming the argument that does not fit."""
    check_sequence("kv", kv, "[B, T, channels]")
    check_sequence("a", a, "[B, T, H]")
    check_sequence("q_weight", q_weight, "[G * K, W]")
    batch, tokens, kv_width = kv.shape
    heads, (key_width, width) = a.shape[2], q_weight.shape
    if isinstance(key_heads, bool) or not isinstance(key_heads, int) or key_heads < 1:
        raise ValueError(f"key_heads={key_heads!r}: must be an integer of at least 1")
    if key_width % key_heads:
        raise ValueError(f"key_heads={key_heads}: must divide the {key_width} rows of q_weight")
    if heads % key_heads:
        raise ValueError(f"key_heads={key_heads}: must divide the {heads} heads of a")
    if kv_width <= key_width or (kv_width - key_width) % heads:
        raise ValueError(
            f"kv: {kv_width} channels must be {key_width} of keys and a multiple of {heads} of "
            "values"
        )
    check_tensor("a", a, (batch, tokens, heads), "[B, T, H]")
    check_tensor("kv_weight", kv_weight, (kv_width, width), "[G * K + H * V, W]")
    for name, x in per_head.items():
        check_tensor(name, x, (heads,), "[H]")
    if q is not None:
        check_tensor("q", q, (batch, tokens, key_width), "[B, T, G * K]")
    elif output:
        raise ValueError("q=None: outputs are read with queries; allowed with output=False")
    value_dim = (kv_width - key_width) // heads
    key_dim = key_width // key_heads
    if initial_state is not None:
        shape = (batch, heads, key_dim, value_dim)
        check_tensor("initial_state", initial_state, shape, "[B, H, K, V]")
    for name, tail, channels in (("q_tail", q_tail, key_width), ("kv_tail", kv_tail, kv_width)):
        if tail is not None:
            check_tensor(name, tail, (batch, width - 1, channels), "[B, W - 1, channels]")
    check_mask(mask, batch, tokens)
    return Dims(batch, tokens, key_heads, key_dim, heads, value_dim, width)


def select(
    op: str, impl: str, dims: Dims, raw: Any, mask: Tensor | None
) -> Callable[..., Mixed]:
    """The implementation of mixer `op` that runs this call; `raw` names all tensors, kv too."""
    call = dispatch.call_of(raw.kv, raw, dims.B, dims.T, dims.H, (dims.K, dims.V), mask)
    return dispatch.select(op, impl, call)


def convolve(
    raw: Any, mask: Tensor | None, dims: Dims, output: bool, tails: bool, impl: str
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q (None without output), k [B, T, G, K], v [B, T, H, V] after convolution and SiLU; tails."""
    common = {"mask": mask, "impl": impl}
    q, q_tail = raw.q, raw.q_tail
    kv, kv_tail = short_conv(raw.kv, raw.kv_weight, initial_state=raw.kv_tail, **common)
    k, v = kv.split((dims.key_width, kv.shape[2] - dims.key_width), dim=-1)
    k = k.reshape(dims.B, dims.T, dims.G, dims.K)
    v = v.reshape(dims.B, dims.T, dims.H, dims.V)
    if q is not None and (output or tails):
        q, q_tail = short_conv(q, raw.q_weight, initial_state=q_tail, **common)
        q = q.reshape(dims.B, dims.T, dims.G, dims.K)
    if not tails:
        q_tail = kv_tail = None
    return (q if output else None), k, v, q_tail, kv_tail


def time_step(a: Tensor, dt_bias: Tensor) -> Tensor:
    """`softplus(a + dt_bias)`: [B, T, H], fp32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return F.softplus(a.to(wide) + dt_bias.to(wide))


def decay_rate(A_log: Tensor, dtype: torch.dtype) -> Tensor:
    """`-exp(A_log)`: [H] in `dtype`."""
    return -A_log.to(dtype).exp()
