"""The gated norm by PyTorch's functions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gated_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = rms_norm(o; weight, eps) * silu(gate)."""
    return (F.rms_norm(o, weight.shape, weight, eps) * F.silu(gate)).to(o.dtype)
