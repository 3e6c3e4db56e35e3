"""Mamba-2's state-space duality as fast weights: forget, then write."""

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
from hybrid_sleep.kernels.ssd import chunked, reference

__all__ = ["ssd"]

dispatch.register_pytorch("ssd", reference.ssd, chunked.ssd)
triton_paths.register("ssd", "hybrid_sleep.kernels.ssd.triton")
peers.register("ssd")


def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    chunk_size: int | None = None,
    output: bool = True,
    impl: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """Read and rewrite fast weights by Mamba-2's rule.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    (Transformers are SSMs, arXiv:2405.21060, Eq. 1 with a scalar A: q = C, k = B, v = dt x,
    g = dt A. The skip D x is the caller's.)

    Args:
        q, k: [B, T, G, K]; head h of H reads group h // (H // G), so G divides H.
        v: [B, T, H, V].
        g: [B, T, H], log decay, <= 0.
        initial_state: [B, H, K, V] or None for zeros.
        mask: bool [B, T], True = real token, or None. Where it is False, anywhere in a row, nothing
            is written, nothing decays, the output is 0 and no gradient flows.
        scale: factor of the output.
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
    check_sequence("q", q, "[B, T, G, K]")
    batch, tokens, groups, key_dim = q.shape
    check_tensor("k", k, q.shape, "[B, T, G, K]")
    check_sequence("v", v, "[B, T, H, V]")
    heads, value_dim = v.shape[2:]
    check_tensor("v", v, (batch, tokens, heads, value_dim), "[B, T, H, V]")
    if heads % groups:
        raise ValueError(f"q: {groups} groups must divide the {heads} heads of v")
    check_tensor("g", g, (batch, tokens, heads), "[B, T, H]")
    if initial_state is not None:
        state_shape = (batch, heads, key_dim, value_dim)
        check_tensor("initial_state", initial_state, state_shape, "[B, H, K, V]")
    check_mask(mask, batch, tokens)
    check_chunk_size(chunk_size)
    call = dispatch.call_of(
        v, (q, k, g, initial_state), batch, tokens, heads, (key_dim, value_dim), mask
    )
    run = dispatch.select("ssd", impl, call)
    with full_precision(q):
        return run(q, k, v, g, initial_state, mask, scale, chunk_size, output)
