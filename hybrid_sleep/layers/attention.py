"""Grouped-query attention with QK norm, over whatever slots its memory holds."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.layers.rotary import rotate
from hybrid_sleep.sleep.state import AttentionMemory, Context

logger = logging.get_logger(__name__)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
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
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Causal self-attention with rotary positions and RMS norm on queries and keys.

    forward(h: [B, T, D], memory, context, write_only) returns `(out: [B, T, D] or None, memory)`;
    with `write_only` keys and values are written and nothing is read.
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
        memory: AttentionMemory | None,
        context: Context,
        write_only: bool = False,
    ) -> tuple[torch.Tensor | None, AttentionMemory]:
        heads_shape = (*h.shape[:2], -1, self.head_dim)
        k = self.k_norm(self.k_proj(h).view(heads_shape)).transpose(1, 2)
        k = rotate(k, context.cos, context.sin)
        v = self.v_proj(h).view(heads_shape).transpose(1, 2)
        memory = _append(memory, AttentionMemory(k, v), context.sight.gather)
        if write_only:
            return None, memory
        q = self.q_norm(self.q_proj(h).view(heads_shape)).transpose(1, 2)
        q = rotate(q, context.cos, context.sin)
        out, _ = self._interface(context)(
            self,
            q,
            memory.k,
            memory.v,
            context.sight.mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.config.attention_scale,
            is_causal=context.sight.causal,
        )
        return self.o_proj(out.reshape(*h.shape[:2], -1)), memory

    def _interface(self, context: Context):
        name = self.config._attn_implementation
        if name.startswith("flash_attention") and context.sight.mask is not None:
            # Flash kernels take lengths, not a mask over slots that start anywhere.
            logger.warning_once(
                f"attention takes 'sdpa' instead of {name!r} where rows of a batch hold windows "
                "of different length, where a window is read in pieces, and under sliding eviction"
            )
            name = "sdpa"
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)


def _append(
    memory: AttentionMemory | None, new: AttentionMemory, gather: torch.Tensor | None
) -> AttentionMemory:
    if memory is not None:
        new = AttentionMemory(*(torch.cat(pair, dim=2) for pair in zip(memory, new, strict=True)))
    if gather is None:
        return new
    return AttentionMemory(*(take_slots(x, gather) for x in new))


def take_slots(x_BHCK: torch.Tensor, index_BC: torch.Tensor) -> torch.Tensor:
    """Pick slots row by row: `out[b, :, j] = x[b, :, index[b, j]]`, `x: [B, H, C, K]`."""
    index = index_BC[:, None, :, None].expand(-1, x_BHCK.shape[1], -1, x_BHCK.shape[3])
    return x_BHCK.gather(2, index)
