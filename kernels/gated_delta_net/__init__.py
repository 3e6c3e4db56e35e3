"""The Gated DeltaNet mixer: everything between the projections of the layer, as one op."""

from __future__ import annotations

from torch import Tensor

from hybrid_sleep.kernels.common import mixers, triton_paths
from hybrid_sleep.kernels.common.mixers import Mixed
from hybrid_sleep.kernels.gated_delta_net.compose import Raw, compose
from hybrid_sleep.validation import check_flag

__all__ = ["gated_delta_net"]

mixers.register_composed("gated_delta_net", compose, "short_conv and gated_delta_rule")
triton_paths.register("gated_delta_net", "hybrid_sleep.kernels.gated_delta_net.triton")


def gated_delta_net(
    q: Tensor | None,
    kv: Tensor,
    a: Tensor,
    b: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    key_heads: int,
    initial_state: Tensor | None = None,
    q_tail: Tensor | None = None,
    kv_tail: Tensor | None = None,
    mask: Tensor | None = None,
    output: bool = True,
    tails: bool = True,
    allow_neg_eigval: bool = False,
    impl: str = "auto",
) -> Mixed:
    """Convolve raw projections, gate, and apply the gated delta rule.

        q, k, v = silu(conv(raw))          q, k of length 1          beta = sigmoid(b)
        g = -exp(A_log) softplus(a + dt_bias)
        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = K^-1/2 S_t^T q_t

    (Gated Delta Networks, arXiv:2412.06464, Eq. 10 and section 3.4.)

    Args:
        q: [B, T, G * K], raw queries; None with output=False and tails=False.
        kv: [B, T, G * K + H * V], raw keys and values. Heads h of H share key head h // (H // G).
        a, b: [B, T, H], raw time steps and write strengths.
        q_weight, kv_weight: [channels, W], filters; [:, -1] multiplies the current token.
        A_log, dt_bias: [H].
        key_heads: G, divides H.
        initial_state: [B, H, K, V] or None for zeros.
        q_tail, kv_tail: [B, W - 1, channels], the inputs just before, or None for zeros.
        mask: bool [B, T], True = real token, or None. Pads, anywhere, change nothing and read 0.
        output: False computes the state only, bit for bit the same.
        tails: False keeps no convolution state and returns None for both tails.
        allow_neg_eigval: beta = 2 sigmoid(b), in (0, 2): the eigenvalue 1 - beta of a transition
            may be negative, so that a token can flip what is stored (Grazzi et al.,
            arXiv:2411.12537).
        impl: "auto"; "reference" or "chunked", which compose short_conv and gated_delta_rule of the
            same name; or "triton", which fuses all of it.

    Returns:
        `Mixed`: o, S and the tails.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, T = 0, or an `impl`
            that cannot run here.
    """
    raw = Raw(
        q, kv, a, b, q_weight, kv_weight, A_log, dt_bias,
        initial_state, q_tail, kv_tail,
    )  # fmt: skip
    return mixers.run(
        "gated_delta_net", raw, per_token=("b",), per_head=("A_log", "dt_bias"),
        key_heads=key_heads, mask=mask, output=output, tails=tails, impl=impl,
        allow_neg_eigval=check_flag("allow_neg_eigval", allow_neg_eigval),
    )  # fmt: skip
