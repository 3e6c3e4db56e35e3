"""Mamba-2's state-space duality as fast weights: forget, then write."""

from __future__ import annotations

from torch import Tensor

from hybrid_sleep.kernels import peers
from hybrid_sleep.kernels.common import dispatch, triton_paths
from hybrid_sleep.kernels.common.checks import full_precision
from hybrid_sleep.kernels.common.rules import check_rule
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

    (Transformers are SSMs, arXiv:2405.21060, Eq. 1 with a scalar A; in its letters q is C, k is B,
    v is dt x and g is dt A. The skip D x is the caller's.)

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
    call = check_rule(q, k, v, {"g": g}, initial_state, mask, chunk_size, groups=True)
    run = dispatch.select("ssd", impl, call)
    with full_precision(q):
        return run(q, k, v, g, initial_state, mask, scale, chunk_size, output)
