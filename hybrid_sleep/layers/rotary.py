"""Rotary position embeddings (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybrid_sleep.configuration import HybridSleepConfig


class Rotary(nn.Module):
    """Cosines and sines of the angles `position * theta ** (-2 i / head_dim)`.

    Angles are computed in fp64 (fp32 where a device has no fp64) and rounded once: positions run
    on without end under sliding eviction. Frequencies are derived from the config on first use and
    are no part of the checkpoint.
    """

    def __init__(self, config: HybridSleepConfig):
        super().__init__()
        self.config = config
        self._frequencies: torch.Tensor | None = None
        self._scale = 1.0

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """Inverse frequencies `[head_dim / 2]` on `device`."""
        if self._frequencies is None or self._frequencies.device != device:
            rope, dim = self.config.rope_parameters, self.config.head_dim
            precise = torch.float32 if device.type == "mps" else torch.float64
            if rope.get("rope_type", "default") == "default":
                powers = torch.arange(0, dim, 2, dtype=precise, device=device) / dim
                self._frequencies = float(rope["rope_theta"]) ** -powers
            else:
                initial, self._scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, device)
                self._frequencies = initial.to(precise)
        return self._frequencies

    @torch.no_grad()
    def forward(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`positions: [B, T]` to cosines and sines, each `[B, T, head_dim]` in `dtype`."""
        frequencies = self.frequencies(positions.device)
        angles = positions[..., None].to(frequencies.dtype) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._scale).to(dtype), (angles.sin() * self._scale).to(dtype)


def rotate(x_BHTK: torch.Tensor, cos_BTK: torch.Tensor, sin_BTK: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of the last dim of `x: [B, H, T, K]` by the given angles."""
    first, second = x_BHTK.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHTK * cos_BTK.unsqueeze(1) + turned * sin_BTK.unsqueeze(1)
