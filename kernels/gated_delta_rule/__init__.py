"""The gated delta rule (Gated DeltaNet): forget, erase what the key holds, write the new value."""

from __future__ import annotations

from torch import Tensor

from hybrid_sleep.kernels import peers
from hybrid_sleep.kernels.common import dispatch, triton_paths
from hybrid_sleep.kernels.common.checks import (
    check_chunk_size,
    check_mask,
    check_sequence,
    check_tensor,
    full_precision,
)
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
    check_sequence("q", q, "[B, T, H, K]")
    batch, tokens, heads, key_dim = q.shape
    check_tensor("k", k, q.shape, "[B, T, H, K]")
    check_sequence("v", v, "[B, T, H, V]")
    value_dim = v.shape[-1]
    check_tensor("v", v, (batch, tokens, heads, value_dim), "[B, T, H, V]")
    check_tensor("g", g, (batch, tokens, heads), "[B, T, H]")
    check_tensor("beta", beta, (batch, tokens, heads), "[B, T, H]")
    if initial_state is not None:
        state_shape = (batch, heads, key_dim, value_dim)
        check_tensor("initial_state", initial_state, state_shape, "[B, H, K, V]")
    check_mask(mask, batch, tokens)
    check_chunk_size(chunk_size)
    call = dispatch.call_of(
        v, (q, k, g, beta, initial_state), batch, tokens, heads, (key_dim, value_dim), mask
    )
    run = dispatch.select("gated_delta_rule", impl, call)
    scale = key_dim**-0.5 if scale is None else scale
    with full_precision(q):
        return run(q, k, v, g, beta, initial_state, mask, scale, chunk_size, output)
