"""What Gated DeltaNet and Mamba-2 share: projections, short convolutions, gated norm.

In fast-weight terms both are `S <- decay(S) + write(k, v)`, read by `q`. Mamba-2 calls them C (q),
B (k) and x (v). A subclass supplies the gates and the update rule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import nn

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.kernels.short_conv import short_conv
from hybrid_sleep.layers.context import Context, FastWeights

DECAY_RATE = (1.0, 16.0)
TIME_STEP = (1e-3, 1e-1)


class StateSpaceMixer(nn.Module, ABC):
    """Base of the state-space layers.

    forward(h: [B, T, D], memory, context, write_only) returns `(out: [B, T, D] or None, memory)`.
    With `write_only` the fast weights are written and nothing is read: no queries, no output gate,
    no output projection. The state is bitwise the one that a full call leaves.

    The log decay is `g = -exp(A_log) softplus(a_proj(h) + dt_bias)`, always in fp32 or wider
    (Mamba-2, arXiv 2405.21060; Gated DeltaNet, arXiv 2412.06464, section 3.4).
    """

    def __init__(self, config: HybridSleepConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
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
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.o_norm = nn.RMSNorm(self.value_dim, eps=config.rms_norm_eps)

    @torch.no_grad()
    def reset_gates(self) -> None:
        """Draw decay rates uniformly in 1..16, time steps log-uniformly in 1e-3..1e-1, taps small.

        The ranges are those of Mamba-2 (arXiv 2405.21060) and of the Gated DeltaNet code.
        """
        self.A_log.uniform_(*DECAY_RATE).log_()
        low, high = map(math.log, TIME_STEP)
        step = self.dt_bias.uniform_(low, high).exp_()
        # softplus(dt_bias) is the time step while the projection is zero.
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        bound = self.q_conv.shape[1] ** -0.5
        self.q_conv.uniform_(-bound, bound)
        self.kv_conv.uniform_(-bound, bound)

    def time_step(self, h: torch.Tensor) -> torch.Tensor:
        """`softplus(a_proj(h) + dt_bias)`: `[B, T, H]`, fp32 or wider."""
        raw = self.a_proj(h)
        wide = torch.promote_types(raw.dtype, torch.float32)
        return nn.functional.softplus(raw.to(wide) + self.dt_bias.to(wide))

    def decay_rate(self, dtype: torch.dtype) -> torch.Tensor:
        """`-exp(A_log): [H]` in `dtype`."""
        return -self.A_log.to(dtype).exp()

    def forward(
        self,
        h: torch.Tensor,
        memory: FastWeights | None,
        context: Context,
        write_only: bool = False,
    ) -> tuple[torch.Tensor | None, FastWeights]:
        S, q_tail, kv_tail = memory if memory is not None else FastWeights(None)
        batch, tokens = h.shape[:2]
        kv, kv_tail = short_conv(
            torch.cat((self.k_proj(h), self.v_proj(h)), dim=-1),
            self.kv_conv,
            initial_state=kv_tail,
            mask=context.mask,
        )
        k, v = kv.split((self.k_proj.out_features, self.v_proj.out_features), dim=-1)
        k = k.reshape(batch, tokens, self.key_heads, self.key_dim)
        v = v.reshape(batch, tokens, self.value_heads, self.value_dim)
        q = None
        if not write_only or context.keep_tails:
            q, q_tail = short_conv(
                self.q_proj(h), self.q_conv, initial_state=q_tail, mask=context.mask
            )
            q = q.reshape(batch, tokens, self.key_heads, self.key_dim)
        o, S = self.update(h, None if write_only else q, k, v, S, context.mask)
        memory = FastWeights(S, q_tail, kv_tail)
        if write_only:
            return None, memory
        gate = self.g_proj(h).view(batch, tokens, self.value_heads, self.value_dim)
        out = self.o_norm(o) * nn.functional.silu(gate)
        return self.o_proj(out.reshape(batch, tokens, -1)), memory

    @abstractmethod
    def update(
        self,
        h: torch.Tensor,
        q: torch.Tensor | None,
        k: torch.Tensor,
        v: torch.Tensor,
        S: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Read with `q` (None: do not) and write `k`, `v`; returns `(o: [B, T, H, V] or None, S)`.

        q, k: `[B, T, H_k, K]`, v: `[B, T, H, V]`, S: `[B, H, K, V]` or None for zeros.
        """
