"""One block: norm, mixer, norm, MLP, with residuals."""

from __future__ import annotations

import torch
from torch import nn

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.layers.attention import Attention
from hybrid_sleep.layers.context import Context
from hybrid_sleep.layers.gated_deltanet import GatedDeltaNet
from hybrid_sleep.layers.mamba2 import Mamba2
from hybrid_sleep.layers.mlp import SwiGLU
from hybrid_sleep.sleep.state import LayerState

STATE_SPACE_MIXERS = {"gated_deltanet": GatedDeltaNet, "mamba2": Mamba2}


class Block(nn.Module):
    """Pre-norm residual block around a mixer and, unless its width is 0, an MLP.

    forward(h: [B, T, D], state, context, write_only) returns `(h or None, state)`; `write_only`
    stops once the mixer has updated its state.
    """

    def __init__(self, config: HybridSleepConfig, layer_idx: int):
        super().__init__()
        self.is_state_space = config.layer_types[layer_idx] == "linear_attention"
        mixer = STATE_SPACE_MIXERS[config.state_space] if self.is_state_space else Attention
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = mixer(config, layer_idx)
        self.mlp = None
        width = config.mlp_widths[layer_idx]
        if width:
            self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = SwiGLU(config.hidden_size, width)

    def forward(
        self,
        h: torch.Tensor,
        state: LayerState | None,
        context: Context,
        write_only: bool = False,
    ) -> tuple[torch.Tensor | None, LayerState]:
        mixed, state = self.mixer(self.mixer_norm(h), state, context, write_only)
        if write_only:
            return None, state
        h = h + mixed
        if self.mlp is not None:
            h = h + self.mlp(self.mlp_norm(h))
        return h, state
