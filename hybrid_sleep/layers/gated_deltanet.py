"""Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv 2412.06464)."""

from __future__ import annotations

import torch
from torch import nn

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.layers.state_space import StateSpaceMixer


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dim, computed in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class GatedDeltaNet(StateSpaceMixer):
    """Gated delta rule, Eq. 10: `S <- exp(g) (I - beta k k^T) S + beta k v^T`, `o = S^T q`.

    q and k are L2-normalised; `beta = sigmoid(b_proj(h))` in fp32 or wider.
    """

    def __init__(self, config: HybridSleepConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.b_proj = nn.Linear(config.hidden_size, self.value_heads, bias=False)

    def update(self, h, q, k, v, S, mask):
        repeats = self.value_heads // self.key_heads
        k = l2_normalize(k).repeat_interleave(repeats, dim=2)
        step = self.time_step(h)
        # The rule wants queries even where it reads nothing; the keys stand in, unread.
        q = k if q is None else l2_normalize(q).repeat_interleave(repeats, dim=2)
        return gated_delta_rule(
            q,
            k,
            v,
            self.decay_rate(step.dtype) * step,
            self.b_proj(h).to(step.dtype).sigmoid(),
            initial_state=S,
            mask=mask,
            output=q is not k,
        )
