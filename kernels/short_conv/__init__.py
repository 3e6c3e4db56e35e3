"""Short causal depthwise convolution, with its tail as a state."""

from __future__ import annotations

from torch import Tensor

from hybrid_sleep.kernels import peers
from hybrid_sleep.kernels.common import dispatch, triton_paths
from hybrid_sleep.kernels.common.checks import check_mask, check_sequence, check_tensor
from hybrid_sleep.kernels.short_conv import chunked, reference

__all__ = ["short_conv"]

ACTIVATIONS = ("silu", None)

dispatch.register_pytorch("short_conv", reference.short_conv, chunked.short_conv)
triton_paths.register("short_conv", "hybrid_sleep.kernels.short_conv.triton")
peers.register("short_conv")


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = "silu",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve each of E channels with a causal filter of its own over the last W real tokens.

        y_t = act(bias + sum_w weight[:, w] * x_{t - (W - 1) + w})

    Args:
        x: [B, T, E].
        weight: [E, W]; weight[:, -1] multiplies the current token.
        bias: [E] or None.
        initial_state: [B, W - 1, E], the inputs just before x, oldest first, or None for zeros.
        mask: bool [B, T], True = real token, or None. Every row gives what it would give with its
            pads removed, wherever they are; y is 0 at pads.
        activation: "silu" or None.
        impl: "auto", "reference", "chunked", "triton", or a peer that is installed (see `peers`).

    Returns:
        y [B, T, E] and final_state [B, W - 1, E], the last W - 1 real inputs (of initial_state
        where x has fewer), both in x's dtype. Half-precision inputs are summed in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, T = 0, or an `impl`
            that cannot run here.
    """
    check_sequence("x", x, "[B, T, E]")
    batch, tokens, channels = x.shape
    check_sequence("weight", weight, "[E, W]")
    width = weight.shape[1]
    check_tensor("weight", weight, (channels, width), "[E, W]")
    if bias is not None:
        check_tensor("bias", bias, (channels,), "[E]")
    if initial_state is not None:
        check_tensor("initial_state", initial_state, (batch, width - 1, channels), "[B, W - 1, E]")
    check_mask(mask, batch, tokens)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    call = dispatch.call_of(
        x, (weight, bias, initial_state), batch, tokens, channels, (width,), mask
    )
    run = dispatch.select("short_conv", impl, call)
    return run(x, weight, bias, initial_state, mask, activation)
