"""SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import nn

from hybrid_sleep.configuration import HybridSleepConfig


class SwiGLU(nn.Module):
    """`down(silu(gate(h)) * up(h))`, `h: [B, T, D]`."""

    def __init__(self, config: HybridSleepConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))
