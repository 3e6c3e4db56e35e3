"""The Mamba-2 mixer: everything between the projections of the layer, as one op."""

from __future__ import annotations

from torch import Tensor

from hybrid_sleep.kernels.common import mixers, triton_paths
from hybrid_sleep.kernels.common.mixers import Mixed
from hybrid_sleep.kernels.mamba2.compose import Raw, compose

__all__ = ["mamba2"]

mixers.register_composed("mamba2", compose, "short_conv and ssd")
triton_paths.register("mamba2", "hybrid_sleep.kernels.mamba2.triton")


def mamba2(
    q: Tensor | None,
    kv: Tensor,
    a: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    *,
    key_heads: int,
    initial_state: Tensor | None = None,
    q_tail: Tensor | None = None,
    kv_tail: Tensor | None = None,
    mask: Tensor | None = None,
    output: bool = True,
    tails: bool = True,
    impl: str = "auto",
) -> Mixed:
    """Convolve raw projections, gate, and apply Mamba-2's rule.

        q, k, v = silu(conv(raw))          dt = softplus(a + dt_bias)
        S_t = exp(-exp(A_log) dt_t) S_{t-1} + dt_t k_t v_t^T,  o_t = S_t^T q_t + skip v_t

    (Transformers are SSMs, arXiv:2405.21060; in its letters q is C, k is B, v is x and skip is D.)

    Args:
        q: [B, T, G * K], raw queries; None with output=False and tails=False.
        kv: [B, T, G * K + H * V], raw keys and values. Heads h of H share key head h // (H // G).
        a: [B, T, H], raw time steps.
        q_weight, kv_weight: [channels, W], filters; [:, -1] multiplies the current token.
        A_log, dt_bias, skip: [H].
        key_heads: G, divides H.
        initial_state: [B, H, K, V] or None for zeros.
        q_tail, kv_tail: [B, W - 1, channels], the inputs just before, or None for zeros.
        mask: bool [B, T], True = real token, or None. Pads, anywhere, change nothing and read 0.
        output: False computes the state only, bit for bit the same.
        tails: False keeps no convolution state and returns None for both tails.
        impl: "auto"; "reference" or "chunked", which compose short_conv and ssd of the same name;
            or "triton", whose kernels take raw projections.

    Returns:
        `Mixed`: o, S and the tails.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, T = 0, or an `impl`
            that cannot run here.
    """
    raw = Raw(
        q, kv, a, q_weight, kv_weight, A_log, dt_bias, skip,
        initial_state, q_tail, kv_tail,
    )  # fmt: skip
    return mixers.run(
        "mamba2", raw, per_head=("A_log", "dt_bias", "skip"), key_heads=key_heads, mask=mask,
        output=output, tails=tails, impl=impl,
    )  # fmt: skip
