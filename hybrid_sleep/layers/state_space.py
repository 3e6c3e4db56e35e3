"""What Gated DeltaNet and Mamba-2 share: projections, short convolutions, gated norm.

In fast-weight terms both are `S <- decay(S) + write(k, v)`, read by `q`. Mamba-2 calls them C (q),
B (k) and x (v). A subclass supplies the gates and the update rule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.kernels.common.mixers import Mixed
from hybrid_sleep.kernels.gated_norm import gated_norm
from hybrid_sleep.layers.context import Context
from hybrid_sleep.sleep.state import LayerState

DECAY_RATE = (1.0, 16.0)


class GatedRMSNorm(nn.Module):
    """`rms_norm(o) * silu(gate)`, o, gate: `[B, T, H, V]`, with one weight of V for all heads.

    transformers fills the weight of what is called RMSNorm when a checkpoint lacks it.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gated_norm(o, gate, self.weight, self.eps)


class StateSpaceMixer(nn.Module, ABC):
    """Base of the state-space layers.

    forward(h: [B, T, D], state, context, write_only) returns `(out: [B, T, D] or None, state)`; the
    state's tails are the last inputs of q_conv and kv_conv.
    With `write_only` the fast weights are only updated: no queries, no output gate, no output
    projection. The state is bitwise the one that a full call leaves.

    The log decay is `g = -exp(A_log) softplus(a_proj(h) + dt_bias)`, always in fp32 or wider
    (Mamba-2, arXiv 2405.21060; Gated DeltaNet, arXiv 2412.06464, section 3.4). So are `A_log` and
    `dt_bias` themselves, whatever dtype the model is made in or converted to.
    """

    def __init__(self, config: HybridSleepConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.time_steps = (config.time_step_min, config.time_step_max)
        self.key_heads, self.value_heads = (
            config.linear_num_key_heads,
            config.linear_num_value_heads,
        )
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        q_width, v_width = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, v_width, bias=False)
        self.a_proj = nn.Linear(config.hidden_size, self.value_heads, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, v_width, bias=False)
        self.o_proj = nn.Linear(v_width, config.hidden_size, bias=False)
        self.q_conv = nn.Parameter(torch.empty(q_width, config.linear_conv_kernel_dim))
        self.kv_conv = nn.Parameter(torch.empty(q_width + v_width, config.linear_conv_kernel_dim))
        promoted = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.A_log = nn.Parameter(torch.empty(self.value_heads, dtype=promoted))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads, dtype=promoted))
        self.o_norm = GatedRMSNorm(self.value_dim, eps=config.rms_norm_eps)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> StateSpaceMixer:
        # Decays are powers over the length of a text: rounded to 8 bits they forget at another
        # rate. from_pretrained(dtype=) keeps them in fp32, so .to(), .half() and .bfloat16() must.
        kept = [x for p in (self.A_log, self.dt_bias) for x in (p, p.grad) if x is not None]

        def convert(x: torch.Tensor) -> torch.Tensor:
            new = fn(x)
            if new.dtype.itemsize >= 4 or not any(x is y for y in kept):
                return new
            source = new if x.dtype.itemsize < 4 else x
            return source.to(new.device, torch.promote_types(source.dtype, torch.float32))

        return super()._apply(convert, recurse)

    @torch.no_grad()
    def init_own_weights(self) -> None:
        """Decay rates uniform in 1..16, time steps log-uniform in the config's range, taps small.

        The rates, and the range by default, are those of Mamba-2 (arXiv 2405.21060) and of the
        Gated DeltaNet code. What a checkpoint has filled (transformers marks it) stays.
        """
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(*DECAY_RATE).log_())
        low, high = map(math.log, self.time_steps)
        step = torch.empty_like(self.dt_bias).uniform_(low, high).exp_()
        # softplus(dt_bias) is the time step while the projection is zero.
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))
        bound = self.q_conv.shape[1] ** -0.5
        init.uniform_(self.q_conv, -bound, bound)
        init.uniform_(self.kv_conv, -bound, bound)

    def forward(
        self,
        h: torch.Tensor,
        state: LayerState | None,
        context: Context,
        write_only: bool = False,
    ) -> tuple[torch.Tensor | None, LayerState]:
        S, tails, _ = LayerState() if state is None else state
        q_tail, kv_tail = tails or (None, None)
        # Gradients of h are summed in reverse order of use: another order, other last bits.
        kv = torch.cat((self.k_proj(h), self.v_proj(h)), dim=-1)
        q = self.q_proj(h) if not write_only or context.keep_tails else None
        o, S, q_tail, kv_tail = self.mix(
            h,
            q,
            kv,
            initial_state=S,
            q_tail=q_tail,
            kv_tail=kv_tail,
            mask=context.mask,
            output=not write_only,
            tails=context.keep_tails,
        )
        state = LayerState(S, (q_tail, kv_tail) if context.keep_tails else ())
        if write_only:
            return None, state
        gate = self.g_proj(h).view(*h.shape[:2], self.value_heads, self.value_dim)
        return self.o_proj(self.o_norm(o, gate).flatten(2)), state

    @abstractmethod
    def mix(
        self, h: torch.Tensor, q: torch.Tensor | None, kv: torch.Tensor, **carried: Any
    ) -> Mixed:
        """Everything between the projections: convolutions, gates, the update and the output.

        q: `[B, T, G * K]` or None, kv: `[B, T, G * K + H * V]`, both as projected; carried: the
        keywords of the mixers in `kernels` from `initial_state` to `tails`.
        """
