"""The Mamba-2 mixer: everything between the projections of the layer, as one op."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hybrid_sleep.kernels.common import dispatch, triton_paths
from hybrid_sleep.kernels.common.mixers import Mixed, check_mixer, select
from hybrid_sleep.kernels.mamba2 import reference

__all__ = ["mamba2"]

dispatch.register_pytorch(
    "mamba2", partial(reference.compose, "reference"), partial(reference.compose, "chunked")
)
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

    (Transformers are SSMs, arXiv:2405.21060; q is C, k is B, v is x, skip is D.)

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
        impl: "auto", "reference", "chunked" or "triton".

    Returns:
        `Mixed`: o, S and the tails.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, T = 0, or an `impl`
            that cannot run here.
    """
    dims = check_mixer(
        q, kv, a, q_weight, kv_weight, {"A_log": A_log, "dt_bias": dt_bias, "skip": skip},
        key_heads, initial_state, q_tail, kv_tail, mask, output,
    )  # fmt: skip
    raw = reference.Raw(
        q, kv, a, q_weight, kv_weight, A_log, dt_bias, skip,
        initial_state, q_tail, kv_tail,
    )  # fmt: skip
    run = select("mamba2", impl, dims, raw, mask)
    return run(raw, mask, dims, output, tails)
