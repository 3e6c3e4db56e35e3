"""What the ops check of tensors, and the little they do to them before a kernel runs.

A check costs next to nothing: no element is read, so that no device waits.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise unless `tensor` is floating point and of `shape`; `meaning` names the dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor {meaning}, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have the shape {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    _check_float(name, tensor)


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        allowed = ", ".join(map(str, FLOATS))
        raise TypeError(f"{name} must have a dtype out of {allowed}, got {tensor.dtype}")


def check_sequence(name: str, tensor: Tensor, meaning: str) -> None:
    """Raise unless `tensor` is floating point, of as many dimensions as `meaning`, none empty."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor {meaning}, got {type(tensor).__name__}")
    if tensor.dim() != meaning.count(",") + 1 or 0 in tensor.shape:
        raise ValueError(
            f"{name} must have the shape {meaning} with no dimension of 0, "
            f"got {tuple(tensor.shape)}"
        )
    _check_float(name, tensor)


def check_mask(mask: Tensor | None, batch: int, tokens: int) -> None:
    """Raise unless `mask` is None or a bool tensor [B, T]."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            "mask must be a bool Tensor [B, T] (True = real token), "
            f"got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    if mask.shape != (batch, tokens):
        raise ValueError(
            f"mask must have the shape [B, T] = {(batch, tokens)}, got {tuple(mask.shape)}"
        )


class _Hide(torch.autograd.Function):
    """x with zero bits where `real` is False: NaN goes too, and far faster than by torch.where."""

    @staticmethod
    def forward(ctx, x, real):
        ctx.save_for_backward(real)
        return _hide(x, real)

    @staticmethod
    def backward(ctx, dx):
        return _Hide.apply(dx, *ctx.saved_tensors), None


def _hide(x: Tensor, real_BT: Tensor) -> Tensor:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    all_or_none = -real_BT.to(bits)
    return (x.view(bits) & all_or_none[(...,) + (None,) * (x.dim() - 2)]).view(x.dtype)


def hide_pads(mask: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each [B, T, ...] tensor with zeros where `mask` is False, whatever stood there (even NaN)."""
    if mask is None:
        return tensors
    return tuple(None if x is None else _without_pads(x, mask) for x in tensors)


def _without_pads(x: Tensor, real_BT: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Hide.apply(x, real_BT)
    return _hide(x, real_BT)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: what states are kept and updated in.

    Never bf16 or fp16: a state sums over the tokens of all windows and passes. In 8 bits a small
    write to a large entry would be lost, and rounding errors add up with every token.
    """
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Suspends autocast, which would run matrix products, and so the state, in half precision."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
