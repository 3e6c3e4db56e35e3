"""Mamba-2 (Dao and Gu, arXiv 2405.21060)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.kernels.mamba2 import mamba2
from hybrid_sleep.layers.state_space import StateSpaceMixer


class Mamba2(StateSpaceMixer):
    """State-space dual, `S <- exp(dt A) S + B (dt x)^T`, `y = S^T C + skip x` per head.

    q is C, k is B (shared by the heads of a group), v is x, `dt` the time step; `skip` is D of the
    paper, one number a head.
    """

    def __init__(self, config: HybridSleepConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.skip = nn.Parameter(torch.ones(self.value_heads))

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """As the base class; the skip connection starts at one."""
        super().init_own_weights()
        init.ones_(self.skip)

    def mix(self, h, q, kv, **carried):
        return mamba2(
            q,
            kv,
            self.a_proj(h),
            self.q_conv,
            self.kv_conv,
            self.A_log,
            self.dt_bias,
            self.skip,
            key_heads=self.key_heads,
            **carried,
        )
