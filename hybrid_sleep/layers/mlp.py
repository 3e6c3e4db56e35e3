"""SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import nn


class SwiGLU(nn.Module):
    """`down(silu(gate(h)) * up(h))`, `h: [B, T, D]`."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))
