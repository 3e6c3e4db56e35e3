"""The short convolution over a whole sequence at once, in plain PyTorch, backward pass included."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid_sleep.kernels.common.checks import compute_dtype, hide_pads
from hybrid_sleep.kernels.short_conv.tail import tail_after


def short_conv(
    x_BTE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """y = act(bias + sum_w weight[:, w] * (x shifted by W - 1 - w)), real tokens moved together.

    Once differentiable; `reference` has every higher derivative.
    """
    dtype, out_dtype = compute_dtype(x_BTE, weight_EW), x_BTE.dtype
    B, T, E = x_BTE.shape
    W = weight_EW.shape[1]
    tail = tail_after(x_BTE, initial_state, mask, W)
    if mask is not None:
        # Real tokens first, in their order; the pads behind them reach none of them.
        (x_BTE,) = hide_pads(mask, x_BTE)
        order, place = _compaction(mask)
        x_BTE = _Reorder.apply(x_BTE, order, place)
    if initial_state is None:
        state = x_BTE.new_zeros(B, W - 1, E)
    else:
        state = initial_state.to(out_dtype)
    y = _ShortConv.apply(
        x_BTE.to(dtype),
        weight_EW.to(dtype),
        None if bias_E is None else bias_E.to(dtype),
        state.to(dtype),
        activation,
    ).to(out_dtype)
    if mask is not None:
        (y,) = hide_pads(mask, _Reorder.apply(y, place, order))
    return y, tail


def _compaction(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Permutations of all B * T tokens, within rows: which token goes to each place (real ones
    first, in their order), and the inverse."""
    B, T = mask_BT.shape
    real = mask_BT.cumsum(1)
    pads = (~mask_BT).cumsum(1)
    place_BT = torch.where(mask_BT, real, real[:, -1:] + pads) - 1
    token_T = torch.arange(T, device=mask_BT.device)
    order_BT = torch.empty_like(place_BT).scatter_(1, place_BT, token_T.expand(B, T))
    row_B1 = T * torch.arange(B, device=mask_BT.device)[:, None]
    return (order_BT + row_B1).flatten(), (place_BT + row_B1).flatten()


class _Reorder(torch.autograd.Function):
    """Tokens in another order. Its derivative is the inverse order, not a sum over an index."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.flatten(0, 1).index_select(0, order).view(x.shape)

    @staticmethod
    def backward(ctx, dx):
        order, inverse = ctx.saved_tensors
        return _Reorder.apply(dx, inverse, order), None, None


def _taps(T: int, W: int) -> Iterator[tuple[int, slice, slice, slice, slice]]:
    """For each w but the last: the outputs whose token W - 1 - w steps back lies in x, the tokens
    of x that they meet there, the outputs for which it lies in the state, and those it meets."""
    for w in range(W - 1):
        back = W - 1 - w
        early = min(back, T)
        yield w, slice(early, T), slice(0, T - early), slice(0, early), slice(w, w + early)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, activation):
        T, W = x.shape[1], weight.shape[1]
        weight = weight.T.contiguous()
        sums = x * weight[W - 1] if bias is None else torch.addcmul(bias, x, weight[W - 1])
        for w, late, met_in_x, early, met_in_state in _taps(T, W):
            sums[:, late].addcmul_(x[:, met_in_x], weight[w])
            sums[:, early].addcmul_(state[:, met_in_state], weight[w])
        ctx.save_for_backward(x, weight, state, sums if activation else None)
        ctx.has_bias = bias is not None
        return F.silu(sums) if activation else sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, state, sums = ctx.saved_tensors
        T, W = x.shape[1], len(weight)
        d = dy if sums is None else torch.ops.aten.silu_backward(dy, sums)
        dx = d * weight[W - 1]
        dstate = torch.zeros_like(state)
        dweight = torch.empty_like(weight)
        room = torch.empty_like(d, memory_format=torch.contiguous_format)
        dweight[W - 1] = torch.mul(d, x, out=room).sum((0, 1))
        room = room.flatten()
        for w, late, met_in_x, early, met_in_state in _taps(T, W):
            dx[:, met_in_x].addcmul_(d[:, late], weight[w])
            dstate[:, met_in_state].addcmul_(d[:, early], weight[w])
            d_late = d[:, late]
            product = room[: d_late.numel()].view(d_late.shape)
            torch.mul(d_late, x[:, met_in_x], out=product)
            dweight[w] = product.sum((0, 1))
            dweight[w] += (d[:, early] * state[:, met_in_state]).sum((0, 1))
        dbias = d.sum((0, 1)) if ctx.has_bias else None
        return dx, dweight.T, dbias, dstate, None
