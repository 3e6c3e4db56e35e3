"""The short convolution through the kernels of `triton_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sleep.kernels.common.checks import compute_dtype
from hybrid_sleep.kernels.common.triton_launch import Precision, empty, next_power, precision
from hybrid_sleep.kernels.common.triton_sizes import last_contiguous
from hybrid_sleep.kernels.short_conv import triton_kernels
from hybrid_sleep.kernels.short_conv.triton_taps import following_tokens, previous_tokens

# Tokens that a program of the backward pass walks over: a multiple of every block of them.
SPAN, SHORT_SPAN = 256, 64
# Blocks of 64 channels and SPAN tokens that fill a GPU: with fewer, spans are short.
PROGRAMS = 512


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """As `reference`. Once differentiable; x may be a slice of a larger tensor."""
    previous = None if mask is None else previous_tokens(mask)
    leaves = (x, weight, bias, initial_state)
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in leaves):
        return _ShortConv.apply(*leaves, mask, previous, activation)
    return forward(*leaves, mask, previous, activation)


def _shared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    previous: Tensor | None,
    activation: str | None,
    how: Precision,
) -> dict[str, object]:
    """Arguments that both kernels take."""
    T = x.shape[1]
    return dict(
        x=x, weight=weight.contiguous(), bias=None if bias is None else bias.contiguous(),
        tail=None if initial_state is None else initial_state.contiguous(),
        mask=None if mask is None else mask.contiguous(), previous=previous,
        T=T, length=min(1024, triton.next_power_of_2(T)), x_b=x.stride(0), x_t=x.stride(1),
        channels=x.shape[2], W=weight.shape[1], HAS_BIAS=bias is not None,
        HAS_TAIL=initial_state is not None, HAS_PADS=mask is not None,
        SILU=activation == "silu", ACC=how.ACC,
    )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    previous: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state, both new, in one launch; `previous` of `previous_tokens`."""
    B, T, E = x.shape
    x = last_contiguous(x)
    how = precision(x.dtype, compute_dtype(x, weight))
    y = empty(x, (B, T, E), x.dtype)
    final = empty(x, (B, weight.shape[1] - 1, E), x.dtype)
    given = _shared(x, weight, bias, initial_state, mask, previous, activation, how)
    triton_kernels.convolve.launch(
        lambda meta: (B * triton.cdiv(T, meta["BT"]), triton.cdiv(E, meta["BE"])),
        **given, y=y, final=final,
    )  # fmt: skip
    return y, final


def backward(
    dy: Tensor | None,
    d_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    previous: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and the initial state; of weight and bias from dy only."""
    B, T, E = x.shape
    W = weight.shape[1]
    x = last_contiguous(x)
    how = precision(x.dtype, compute_dtype(x, weight))
    span = span_length(B, T, E)
    spans = -(-T // span)
    has_out, has_tail = dy is not None, initial_state is not None
    dy = x if dy is None else last_contiguous(dy)
    dx = empty(x, (B, T, E), x.dtype)
    d_tail = empty(x, initial_state.shape, initial_state.dtype) if has_tail else None
    sums = empty(x, (B, spans, W + 1, E), how.state) if has_out else None
    given = _shared(x, weight, bias, initial_state, mask, previous, activation, how)
    triton_kernels.gradients.launch(
        lambda meta: (B * (spans + has_tail), triton.cdiv(E, meta["BE"])),
        **given, d_out=dy if has_out else None, dy_b=dy.stride(0), dy_t=dy.stride(1),
        d_final=None if d_final is None else d_final.contiguous(),
        following=None if mask is None else following_tokens(mask), dx=dx, d_tail=d_tail,
        sums=sums, span=span, spans=spans, BW=next_power(W + 1, 1), HAS_OUT=has_out,
        HAS_FINAL=d_final is not None,
    )  # fmt: skip
    if sums is None:
        return dx, None, None, d_tail
    total = sums.sum((0, 1))
    d_bias = None if bias is None else total[W].to(bias.dtype)
    return dx, total[:W].T.to(weight.dtype), d_bias, d_tail


def span_length(B: int, T: int, E: int) -> int:
    """How many tokens a program of the backward pass takes: fewer where few programs are left."""
    return SPAN if B * -(-T // SPAN) * -(-E // 64) >= PROGRAMS else SHORT_SPAN


class _ShortConv(torch.autograd.Function):
    """Keeps its inputs and nothing else."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, mask, previous, activation):
        ctx.save_for_backward(x, weight, bias, initial_state, mask, previous)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return forward(x, weight, bias, initial_state, mask, previous, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):
        x, weight, bias, initial_state, mask, previous = ctx.saved_tensors
        gradients = backward(
            dy, d_final, x, weight, bias, initial_state, mask, previous, ctx.activation
        )
        return *gradients, None, None, None
