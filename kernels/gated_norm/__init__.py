"""The norm of a state-space layer's output and its gate, in one."""

from __future__ import annotations

from torch import Tensor

from hybrid_sleep.kernels.common import dispatch, triton_paths
from hybrid_sleep.kernels.common.checks import check_sequence, check_tensor
from hybrid_sleep.kernels.gated_norm import reference
from hybrid_sleep.validation import check_number

__all__ = ["gated_norm"]

dispatch.register(
    "gated_norm",
    "reference",
    reference.gated_norm,
    rank=0,
    wants=lambda call: "PyTorch's norm, any device",
)
triton_paths.register("gated_norm", "hybrid_sleep.kernels.gated_norm.triton")


def gated_norm(
    o: Tensor, gate: Tensor, weight: Tensor, eps: float, *, impl: str = "auto"
) -> Tensor:
    """Normalise the last dimension to a root mean square of 1, scale it, and gate it.

        y = o / sqrt(mean(o^2) + eps) * weight * silu(gate)

    The norm comes before the gate, as in Gated DeltaNet; Mamba-2's layer gates first by default.

    Args:
        o: [..., V].
        gate: [..., V], of o's shape; it may be a slice of a larger tensor.
        weight: [V].
        eps: what keeps the root from 0, > 0.
        impl: "auto", "reference" or "triton".

    Returns:
        y [..., V] in o's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape, eps <= 0, or an `impl`
            that cannot run here.
    """
    check_sequence("weight", weight, "[V]")
    width = len(weight)
    if not isinstance(o, Tensor):
        raise TypeError(f"o must be a Tensor [..., V], got {type(o).__name__}")
    check_tensor("o", o, (*o.shape[:-1], width), "[..., V]")
    if 0 in o.shape:
        raise ValueError(
            f"o must have the shape [..., V] with no dimension of 0, got {tuple(o.shape)}"
        )
    check_tensor("gate", gate, o.shape, "[..., V]")
    check_number("eps", eps, above=0)
    rows = o.numel() // width
    call = dispatch.call_of(o, (gate, weight), 1, rows, 1, (width,), None)
    return dispatch.select("gated_norm", impl, call)(o, gate, weight, eps)
