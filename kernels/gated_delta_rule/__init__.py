"""The gated delta rule (Gated DeltaNet): forget, erase what the key holds, write the new value."""

from __future__ import annotations

from torch import Tensor

from hybrid_sleep.kernels import peers
from hybrid_sleep.kernels.common import dispatch, triton_paths
from hybrid_sleep.kernels.common.checks import full_precision
from hybrid_sleep.kernels.common.rules import check_rule
from hybrid_sleep.kernels.gated_delta_rule import chunked, reference

__all__ = ["gated_delta_rule"]

dispatch.register_pytorch("gated_delta_rule", reference.gated_delta_rule, chunked.gated_delta_rule)
triton_paths.register("gated_delta_rule", "hybrid_sleep.kernels.gated_delta_rule.triton")
peers.register("gated_delta_rule")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    output: bool = True,
    impl: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """Read and rewrite fast weights by the gated delta rule.

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = scale * S_t^T q_t

    (Gated Delta Networks, arXiv:2412.06464, Eq. 10, with the state transposed to [K, V].)

    Args:
        q, k: [B, T, H, K], as used: the caller normalises them (|k| <= 1).
        v: [B, T, H, V].
        g: [B, T, H], log decay, <= 0.
        beta: [B, T, H], write strength, 0 to 1 (up to 2 for negative eigenvalues).
        initial_state: [B, H, K, V] or None for zeros.
        mask: bool [B, T], True = real token, or None. Where it is False, anywhere in a row, nothing
            is written, nothing decays, the output is 0 and no gradient flows.
        scale: factor of the output; None means K ** -0.5.
        chunk_size: most tokens handled in parallel; None lets the implementation choose what is
            fast for these dimensions. The result does not depend on it beyond rounding.
        output: False computes the state only, bit for bit the same, and returns None for o.
        impl: "auto", "reference", "chunked", "triton", or a peer that is installed (see `peers`).

    Returns:
        o [B, T, H, V] in v's dtype (or None), and S [B, H, K, V] in float32 (float64 if any of
        q, k, v is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, T = 0, or an `impl`
            that cannot run here.
    """
    gates = {"g": g, "beta": beta}
    call = check_rule(q, k, v, gates, initial_state, mask, chunk_size, groups=False)
    run = dispatch.select("gated_delta_rule", impl, call)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q):
        return run(q, k, v, g, beta, initial_state, mask, scale, chunk_size, output)
