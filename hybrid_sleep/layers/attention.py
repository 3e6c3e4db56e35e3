"""Grouped-query attention with QK norm, over whatever slots its state holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.layers.context import Context
from hybrid_sleep.layers.rotary import rotate
from hybrid_sleep.sleep.masks import AttentionMask
from hybrid_sleep.sleep.state import LayerState, take_slots

logger = logging.get_logger(__name__)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    is_causal: bool = False,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: `softmax(q k^T scaling) v`, in transformers' calling convention.

    query: `[B, H, T, K]`, key and value: `[B, H_kv, C, K]`, attention_mask: bool or None.
    Returns `[B, T, H, K]` and the weights `[B, H, T, C]`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if is_causal and attention_mask is None:
        attention_mask = torch.ones(
            scores.shape[-2:], dtype=torch.bool, device=scores.device
        ).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    promoted = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=promoted).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Causal self-attention with rotary positions and RMS norm on queries and keys.

    forward(h: [B, T, D], state, context, write_only) returns `(out: [B, T, D] or None, state)`; the
    state's slots are keys and values, `[B, H_kv, C, head_dim]` each. With `write_only` they are
    appended and nothing attends to them.
    """

    def __init__(self, config: HybridSleepConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        h: torch.Tensor,
        state: LayerState | None,
        context: Context,
        write_only: bool = False,
    ) -> tuple[torch.Tensor | None, LayerState]:
        heads_shape = (*h.shape[:2], -1, self.head_dim)
        k = self.k_norm(self.k_proj(h).view(heads_shape)).transpose(1, 2)
        k = rotate(k, context.cos, context.sin)
        v = self.v_proj(h).view(heads_shape).transpose(1, 2)
        k, v = _append(state, (k, v), context.attention)
        state = LayerState(slots=(k, v))
        if write_only:
            return None, state
        q = self.q_norm(self.q_proj(h).view(heads_shape)).transpose(1, 2)
        q = rotate(q, context.cos, context.sin)
        out, _ = self._interface(context)(
            self,
            q,
            k,
            v,
            context.attention.mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.config.attention_scale,
            is_causal=context.attention.causal,
        )
        return self.o_proj(out.reshape(*h.shape[:2], -1)), state

    @property
    def attention_dropout(self) -> float:
        """Probability in training; looked up, since a config may change after its model."""
        return self.config.attention_dropout

    def _interface(self, context: Context) -> Callable[..., tuple[torch.Tensor, Any]]:
        name = self.config._attn_implementation
        if name.startswith("flash_attention") and context.attention.mask is not None:
            # Flash kernels take lengths, not a mask over slots that start anywhere.
            logger.warning_once(
                f"attention takes 'sdpa' instead of {name!r} where rows of a batch hold windows "
                "of different length, where a window is prefilled in pieces, where tokens come one "
                "by one, and under sliding eviction"
            )
            name = "sdpa"
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)


def _append(
    state: LayerState | None, new: tuple[torch.Tensor, ...], attention: AttentionMask
) -> tuple[torch.Tensor, ...]:
    """Slots `[B, H, C, K]` with the new tokens' behind those that the state holds."""
    if attention.place is not None:
        assert state is not None
        for slots, x in zip(state.slots, new, strict=True):
            slots.scatter_(2, attention.place.view(-1, 1, 1, 1).expand_as(x), x)
        return state.slots
    if state is not None and state.slots:
        new = tuple(torch.cat(pair, dim=2) for pair in zip(state.slots, new, strict=True))
    return new if attention.gather is None else tuple(take_slots(x, attention.gather) for x in new)
