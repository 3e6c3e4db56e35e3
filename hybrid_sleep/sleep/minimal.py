"""Sleep in one page: one row, one token, one head at a time, and nothing left out.

Read this first. It is Algorithm 1 of "Do Language Models Need Sleep?" (Lee, McLeish, Goldstein,
Fanti, arXiv 2605.26099) with what the paper leaves open settled, written for a reader rather than
for a machine: no batch, no chunks, no kernels, no pruning, no package around it. What is fast
elsewhere (`algorithm.py`, `forward.py`, the kernels) is tested against it, in float64.

    S <- 0
    split the tokens into windows of at most L
    for each window:
        h, S <- Blocks(Embed(window), S)            pass 1: it predicts, and is the first look
        when the next token arrives:                sleep
            repeat N - 1 times:  h, S <- Blocks(h, S)
            drop keys, values, hidden states

Letters: D hidden size, H heads, K key dim, V value dim, L window, N passes. Vectors are 1-D tensors
in the dtype of the weights; everything is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Window:
    """Tokens (ids, or embeddings `[D]`) of one window, and the depth N of the sleep after it.

    depth None: the window is still open. The end of a sequence does not sleep by itself: its last
    window stays readable until more text comes.
    """

    tokens: list[Any] = field(default_factory=list)
    depth: int | None = None


@dataclass
class Row:
    """What reading left: logits of every token in order, fast weights `[H, K, V]` of each
    state-space layer at the end, and the depths of the sleeps on the way."""

    logits: list[Tensor]
    S: dict[int, Tensor]
    depths: list[int]


@dataclass
class State:
    """What one layer carries from token to token.

    S: fast weights `[K, V]` of each head; they outlive the window.
    inputs: the last inputs of the short convolution. seen: position, keys and values of each token
    that attention can see. Both are short-term memory.
    """

    S: list[Tensor]
    inputs: list[Tensor] = field(default_factory=list)
    seen: list[tuple[int, list[Tensor], Sequence[Tensor]]] = field(default_factory=list)

    def copy(self) -> State:
        """A second state that goes its own way; tensors are never written in place."""
        return State(list(self.S), list(self.inputs), list(self.seen))


class MinimalModel:
    """A model that sleeps, from the fields of its config and the tensors of its checkpoint."""

    def __init__(self, config: Any, weights: Mapping[str, Tensor]):
        self.config, self.weights = config, weights
        self.count = config.num_hidden_layers
        self.loop = (0, self.count) if config.loop is None else config.loop
        self.sliding = config.eviction == "sliding"
        self.carry = config.sleep_carry

    def read(self, windows: Sequence[Window]) -> Row:
        """Algorithm 1 over the windows of one row."""
        start, end = self.loop
        states = self.blank()
        row = Row([], {}, [])
        position = 0
        for window in windows:
            # Positions count from the window's start: nothing older is attended to. Where older
            # keys stay (sliding eviction) they were rotated by theirs, so positions run on.
            first = position if self.sliding else 0
            places = list(range(first, first + len(window.tokens)))
            position += len(window.tokens)
            opening = [state.copy() for state in states]

            # Pass 1 is the ordinary forward pass. It gives the predictions that a user sees, and
            # the loss; a sleep does not repeat it but goes on from its h and S.
            h = [self.embed(token) for token in window.tokens]
            h = enters = self.run(0, start, states, h, places, sleeping=False)
            h = self.run(start, end, states, h, places, sleeping=False)
            out = self.run(end, self.count, states, h, places, sleeping=False)
            row.logits += [self.head(x) for x in out]
            if window.depth is None:
                continue

            # Passes 2..N over the same window. h is what the last pass made of it, S goes on from
            # where the last pass left it (one of them starts anew if `sleep_carry` says so); keys,
            # values and convolution inputs are this pass's own.
            row.depths.append(window.depth)
            for number in range(2, window.depth + 1):
                for i in range(start, end):
                    S, states[i] = states[i].S, opening[i].copy()
                    if self.carry != "hidden_states":
                        states[i].S = S
                h = enters if self.carry == "fast_weights" else h
                h = self.run(start, end, states, h, places, sleeping=True, number=number)

            # The coda (blocks behind the loop) had to run in pass 1, to predict. What it wrote then
            # is undone: it reads the window once more, from the last pass.
            if window.depth > 1:
                for i in range(end, self.count):
                    states[i] = opening[i].copy()
                self.run(end, self.count, states, h, places, sleeping=True)

            # Evict. Hard: fast weights alone cross the boundary, so gradients reach earlier windows
            # through S only. Sliding: the last L - 1 tokens stay visible as well.
            for state in states:
                keep = min(self.config.window - 1, len(state.seen)) if self.sliding else 0
                state.seen = state.seen[len(state.seen) - keep :]
                if not self.sliding:
                    state.inputs = []
        row.S = {
            i: torch.stack(state.S)
            for i, state in enumerate(states)
            if self.config.layer_types[i] == "linear_attention"
        }
        return row

    def blank(self) -> list[State]:
        """States of layers that have read nothing: every sequence starts with S = 0."""
        c, dtype = self.config, self.weights["model.embed_tokens.weight"].dtype
        zero = torch.zeros(c.linear_key_head_dim, c.linear_value_head_dim, dtype=dtype)
        return [State([zero] * c.linear_num_value_heads) for _ in range(self.count)]

    def run(
        self,
        start: int,
        end: int,
        states: list[State],
        h: list[Tensor],
        places: list[int],
        *,
        sleeping: bool,
        number: int = 1,
    ) -> list[Tensor]:
        """Blocks start..end - 1 over the tokens `h`, which stand at `places`; updates `states`."""
        c = self.config
        # Passes may have weights of their own (`distinct_passes`), as far as there are any.
        own = min(number, c.distinct_passes) - 1
        for i in range(start, end):
            later = (own - 1) * (end - start) + i - start
            block = f"model.later_layers.{later}" if own else f"model.layers.{i}"
            x = [self.norm(f"{block}.mixer_norm.weight", t) for t in h]
            if c.layer_types[i] == "full_attention":
                mixed = self.attend(block, states[i], x, places, sleeping)
            else:
                mixed = [self.update(block, states[i], t) for t in x]
            h = [a + b for a, b in zip(h, mixed, strict=True)]
            widths = c.intermediate_size
            if widths if isinstance(widths, int) else widths[i]:
                h = [t + self.mlp(block, t) for t in h]
        return h

    def update(self, block: str, state: State, x: Tensor) -> Tensor:
        """One token of a state-space layer: decay and write S, then read it with the query.

        Gated delta rule (arXiv 2412.06464, Eq. 10): `S <- a (I - b k k^T) S + b k v^T`. Mamba-2
        (arXiv 2405.21060): `S <- a S + k (dt v)^T`. Both: `o = S^T q`.
        """
        c, name = self.config, f"{block}.mixer"
        K, V, H = c.linear_key_head_dim, c.linear_value_head_dim, c.linear_num_value_heads
        G, width = c.linear_num_key_heads, c.linear_conv_kernel_dim
        raw = torch.cat([self.w(f"{name}.{p}_proj.weight") @ x for p in "qkv"])
        state.inputs = [*state.inputs, raw][-width:]
        taps = torch.cat([self.w(f"{name}.q_conv"), self.w(f"{name}.kv_conv")])
        # The last tap meets the newest input; inputs from before the start are zero.
        newest_first = enumerate(reversed(state.inputs))
        summed = torch.stack([taps[:, width - 1 - ago] * old for ago, old in newest_first]).sum(0)
        mixed = silu(summed)
        q, k, v = mixed.split([K * G, K * G, H * V])
        q, k, v = q.split(K), k.split(K), v.split(V)
        raw_step = self.w(f"{name}.a_proj.weight") @ x + self.w(f"{name}.dt_bias")
        # softplus, written so that it does not overflow.
        step = torch.log1p(torch.exp(-raw_step.abs())) + raw_step.clamp(min=0)
        decay = torch.exp(-torch.exp(self.w(f"{name}.A_log")) * step)
        gate = silu(self.w(f"{name}.g_proj.weight") @ x).split(V)
        heads = []
        for h in range(H):
            q_h, k_h, v_h, S = q[h * G // H], k[h * G // H], v[h], state.S[h]
            if c.state_space == "gated_deltanet":
                q_h, k_h = unit(q_h), unit(k_h)
                beta = 1 / (1 + torch.exp(-(self.w(f"{name}.b_proj.weight")[h] @ x)))
                # In (0, 2) the factor 1 - beta along k may be negative: what is stored there flips.
                beta = 2 * beta if c.linear_allow_neg_eigval else beta
                erase = torch.eye(K, dtype=x.dtype) - beta * torch.outer(k_h, k_h)
                S = decay[h] * (erase @ S) + beta * torch.outer(k_h, v_h)
                o = S.T @ q_h / math.sqrt(K)
            else:
                S = decay[h] * S + torch.outer(k_h, step[h] * v_h)
                o = S.T @ q_h + self.w(f"{name}.skip")[h] * v_h
            state.S = [*state.S[:h], S, *state.S[h + 1 :]]
            heads.append(self.norm(f"{name}.o_norm.weight", o) * gate[h])
        return self.w(f"{name}.o_proj.weight") @ torch.cat(heads)

    def attend(
        self, block: str, state: State, x: list[Tensor], places: list[int], sleeping: bool
    ) -> list[Tensor]:
        """Grouped-query attention within the window. Passes after the first predict nothing, so
        they may look both ways (`sleep_attention`)."""
        c, name = self.config, f"{block}.mixer"
        K, groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads
        own = set(places)
        for t, place in zip(x, places, strict=True):
            k = [
                self.rotate(self.norm(f"{name}.k_norm.weight", part), place)
                for part in (self.w(f"{name}.k_proj.weight") @ t).split(K)
            ]
            v = (self.w(f"{name}.v_proj.weight") @ t).split(K)
            state.seen.append((place, k, v))
        both_ways = sleeping and c.sleep_attention == "bidirectional"
        out = []
        for t, place in zip(x, places, strict=True):
            visible = [
                (k, v)
                for there, k, v in state.seen
                if (there <= place and (not self.sliding or there > place - c.window))
                or (both_ways and there in own)
            ]
            heads = []
            for j, part in enumerate((self.w(f"{name}.q_proj.weight") @ t).split(K)):
                q = self.rotate(self.norm(f"{name}.q_norm.weight", part), place)
                scores = torch.stack([q @ k[j // groups] for k, _ in visible]) / math.sqrt(K)
                odds = torch.exp(scores - scores.max())
                share = odds / odds.sum()
                values = [v[j // groups] for _, v in visible]
                heads.append(sum(s * v for s, v in zip(share, values, strict=True)))
            out.append(self.w(f"{name}.o_proj.weight") @ torch.cat(heads))
        return out

    def rotate(self, x: Tensor, place: int) -> Tensor:
        """Rotary embedding: dims i and i + K/2 are the parts of a complex number."""
        half = len(x) // 2
        theta = self.config.rope_parameters["rope_theta"]
        parts = []
        for i in range(half):
            angle = place * theta ** (-2 * i / len(x))
            re, im, cos, sin = x[i], x[half + i], math.cos(angle), math.sin(angle)
            parts.append((re * cos - im * sin, re * sin + im * cos))
        return torch.stack([p[0] for p in parts] + [p[1] for p in parts])

    def embed(self, token: Any) -> Tensor:
        """`[D]` of an id, or of an embedding as it is.

        With `token_fields` an id is a number of mixed radix, and has a vector for each digit.
        """
        if isinstance(token, Tensor):
            return token
        rows = self.w("model.embed_tokens.weight")
        if self.config.token_fields is None:
            return rows[token]
        digits: list[int] = []
        for size in reversed(self.config.token_fields):
            token, digit = divmod(token, size)
            digits.insert(0, digit)
        parts = rows.split(self.config.token_fields)
        return torch.stack([part[d] for part, d in zip(parts, digits, strict=True)]).sum(0)

    def head(self, h: Tensor) -> Tensor:
        """Logits over the vocabulary."""
        tied = self.config.tie_word_embeddings
        matrix = self.w("model.embed_tokens.weight" if tied else "lm_head.weight")
        return matrix @ self.norm("model.norm.weight", h)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Root-mean-square norm."""
        return x / torch.sqrt((x * x).mean() + self.config.rms_norm_eps) * self.w(name)

    def mlp(self, block: str, h: Tensor) -> Tensor:
        """SwiGLU, behind its own norm."""
        name = f"{block}.mlp"
        x = self.norm(f"{block}.mlp_norm.weight", h)
        return self.w(f"{name}.down_proj.weight") @ (
            silu(self.w(f"{name}.gate_proj.weight") @ x) * (self.w(f"{name}.up_proj.weight") @ x)
        )

    def w(self, name: str) -> Tensor:
        """A tensor of the checkpoint."""
        return self.weights[name]


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`."""
    return x / (1 + torch.exp(-x))


def unit(x: Tensor) -> Tensor:
    """`x` of length 1; zero stays zero."""
    return x / torch.sqrt((x * x).sum() + 1e-6)
