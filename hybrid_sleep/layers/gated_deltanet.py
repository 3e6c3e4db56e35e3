"""Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv 2412.06464)."""

from __future__ import annotations

from torch import nn

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.kernels.gated_delta_net import gated_delta_net
from hybrid_sleep.layers.state_space import StateSpaceMixer


class GatedDeltaNet(StateSpaceMixer):
    """Gated delta rule, Eq. 10: `S <- exp(g) (I - beta k k^T) S + beta k v^T`, `o = S^T q`.

    q and k are L2-normalised; `beta = sigmoid(b_proj(h))` in fp32 or wider, twice that with
    `linear_allow_neg_eigval`.
    """

    def __init__(self, config: HybridSleepConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.allow_neg_eigval = config.linear_allow_neg_eigval
        self.b_proj = nn.Linear(config.hidden_size, self.value_heads, bias=False)

    def mix(self, h, q, kv, **carried):
        return gated_delta_net(
            q,
            kv,
            self.a_proj(h),
            self.b_proj(h),
            self.q_conv,
            self.kv_conv,
            self.A_log,
            self.dt_bias,
            key_heads=self.key_heads,
            allow_neg_eigval=self.allow_neg_eigval,
            **carried,
        )
