"""What the public functions of the two state-space rules check."""

from __future__ import annotations

from torch import Tensor

from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.kernels.common.checks import check_mask, check_sequence, check_tensor
from hybrid_sleep.validation import check_count


def check_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    initial_state: Tensor | None,
    mask: Tensor | None,
    chunk_size: int | None,
    *,
    groups: bool,
) -> dispatch.Call:
    """The call to choose an implementation for; TypeError or ValueError naming what is wrong.

    q, k: [B, T, H, K], or with `groups` [B, T, G, K], G a divisor of H. v: [B, T, H, V]. gates, by
    name: [B, T, H]. initial_state: [B, H, K, V] or None. mask: bool [B, T] or None.
    """
    shape_of_keys = "[B, T, G, K]" if groups else "[B, T, H, K]"
    check_sequence("q", q, shape_of_keys)
    B, T, heads_of_keys, K = q.shape
    check_tensor("k", k, q.shape, shape_of_keys)
    check_sequence("v", v, "[B, T, H, V]")
    H, V = v.shape[2] if groups else heads_of_keys, v.shape[3]
    check_tensor("v", v, (B, T, H, V), "[B, T, H, V]")
    if H % heads_of_keys:
        raise ValueError(f"the groups of q must divide the {H} heads of v, got {heads_of_keys}")
    for name, gate in gates.items():
        check_tensor(name, gate, (B, T, H), "[B, T, H]")
    if initial_state is not None:
        check_tensor("initial_state", initial_state, (B, H, K, V), "[B, H, K, V]")
    check_mask(mask, B, T)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    return dispatch.call_of(v, (q, k, *gates.values(), initial_state), B, T, H, (K, V), mask)
