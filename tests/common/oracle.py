"""The specification once more, as slowly as possible: one row, one token, one head at a time.

Nothing here is taken from the package; it is what the tests compare the package with. A row is a
list of windows, each closed by a sleep of some depth or still open. Everything is computed in the
dtype of the weights and is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class OracleWindow:
    """Tokens (ids, or embeddings `[D]`) read into one window, and the depth of the sleep after it.

    depth None: the window is still open.
    """

    tokens: list[Any] = field(default_factory=list)
    depth: int | None = None


@dataclass
class OracleRow:
    """What a row's reader may look at: one entry a token read."""

    logits: list[Tensor]
    S: dict[int, Tensor]
    depths: list[int]


@dataclass
class _Layer:
    """What a layer remembers: fast weights per head, past convolution inputs, visible keys."""

    S: list[Tensor]
    inputs: list[Tensor] = field(default_factory=list)
    seen: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def twin(self) -> _Layer:
        return _Layer(list(self.S), list(self.inputs), list(self.seen))


class Oracle:
    """A model by the specification, from a config and a state dict."""

    def __init__(self, config: Any, weights: Mapping[str, Tensor]):
        self.config, self.weights = config, weights
        self.count = config.num_hidden_layers
        self.loop = (0, self.count) if config.loop is None else config.loop
        self.sliding = config.eviction == "sliding"

    def read(self, windows: Sequence[OracleWindow]) -> OracleRow:
        """Logits of every token in order, the fast weights at the end, the sleeps on the way."""
        c = self.config
        layers = self.blank()
        row = OracleRow([], {}, [])
        position = 0
        for window in windows:
            first = position if self.sliding else 0
            places = list(range(first, first + len(window.tokens)))
            position += len(window.tokens)
            opening = [layer.twin() for layer in layers]
            start, end = self.loop
            h = [self.embed(token) for token in window.tokens]
            h = self.run(0, end, layers, h, places, sleeping=False)
            out = self.run(end, self.count, layers, h, places, sleeping=False)
            row.logits += [self.head(x) for x in out]
            if window.depth is None:
                continue
            row.depths.append(window.depth)
            for _ in range(window.depth - 1):
                for i in range(start, end):
                    S, layers[i] = layers[i].S, opening[i].twin()
                    layers[i].S = S
                h = self.run(start, end, layers, h, places, sleeping=True)
            if window.depth > 1:
                for i in range(end, self.count):
                    layers[i] = opening[i].twin()
                self.run(end, self.count, layers, h, places, sleeping=True)
            for layer in layers:
                keep = c.window - 1 if self.sliding else 0
                layer.seen = layer.seen[len(layer.seen) - min(keep, len(layer.seen)) :]
                if not self.sliding:
                    layer.inputs = []
        row.S = {
            i: torch.stack(layer.S)
            for i, layer in enumerate(layers)
            if c.layer_types[i] == "linear_attention"
        }
        return row

    def blank(self) -> list[_Layer]:
        """Layers that remember nothing yet."""
        c, dtype = self.config, self.weights["model.embed_tokens.weight"].dtype
        zero = torch.zeros(c.linear_key_head_dim, c.linear_value_head_dim, dtype=dtype)
        return [_Layer([zero] * c.linear_num_value_heads) for _ in range(self.count)]

    def run(
        self,
        start: int,
        end: int,
        layers: list[_Layer],
        h: list[Tensor],
        places: list[int],
        *,
        sleeping: bool,
    ) -> list[Tensor]:
        """Blocks start..end - 1 over the tokens `h`, which stand at `places`."""
        c = self.config
        for i in range(start, end):
            x = [self.norm(f"model.layers.{i}.mixer_norm.weight", t) for t in h]
            if c.layer_types[i] == "full_attention":
                mixed = self.attend(i, layers[i], x, places, sleeping)
            else:
                mixed = [self.state_space(i, layers[i], t) for t in x]
            h = [a + b for a, b in zip(h, mixed, strict=True)]
            widths = c.intermediate_size
            if widths if isinstance(widths, int) else widths[i]:
                h = [t + self.mlp(i, t) for t in h]
        return h

    def w(self, name: str) -> Tensor:
        return self.weights[name]

    def embed(self, token: Any) -> Tensor:
        return token if isinstance(token, Tensor) else self.w("model.embed_tokens.weight")[token]

    def head(self, h: Tensor) -> Tensor:
        tied = self.config.tie_word_embeddings
        matrix = self.w("model.embed_tokens.weight" if tied else "lm_head.weight")
        return matrix @ self.norm("model.norm.weight", h)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + self.config.rms_norm_eps) * self.w(name)

    def mlp(self, i: int, h: Tensor) -> Tensor:
        name = f"model.layers.{i}.mlp"
        x = self.norm(f"model.layers.{i}.mlp_norm.weight", h)
        return self.w(f"{name}.down_proj.weight") @ (
            silu(self.w(f"{name}.gate_proj.weight") @ x) * (self.w(f"{name}.up_proj.weight") @ x)
        )

    def turn(self, x: Tensor, place: int) -> Tensor:
        """Rotary embedding: dims i and i + K/2 are the parts of a complex number."""
        half = len(x) // 2
        theta = self.config.rope_parameters["rope_theta"]
        parts = []
        for i in range(half):
            angle = place * theta ** (-2 * i / len(x))
            re, im, c, s = x[i], x[half + i], math.cos(angle), math.sin(angle)
            parts.append((re * c - im * s, re * s + im * c))
        return torch.stack([p[0] for p in parts] + [p[1] for p in parts])

    def attend(
        self, i: int, layer: _Layer, x: list[Tensor], places: list[int], sleeping: bool
    ) -> list[Tensor]:
        c, name = self.config, f"model.layers.{i}.mixer"
        K, groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads
        own = set(places)
        for t, place in zip(x, places, strict=True):
            k = [
                self.turn(self.norm(f"{name}.k_norm.weight", part), place)
                for part in (self.w(f"{name}.k_proj.weight") @ t).split(K)
            ]
            v = (self.w(f"{name}.v_proj.weight") @ t).split(K)
            layer.seen.append((place, k, v))
        both_ways = sleeping and c.sleep_attention == "bidirectional"
        out = []
        for t, place in zip(x, places, strict=True):
            visible = [
                (k, v)
                for there, k, v in layer.seen
                if (there <= place and (not self.sliding or there > place - c.window))
                or (both_ways and there in own)
            ]
            heads = []
            for j, part in enumerate((self.w(f"{name}.q_proj.weight") @ t).split(K)):
                q = self.turn(self.norm(f"{name}.q_norm.weight", part), place)
                scores = torch.stack([q @ k[j // groups] for k, _ in visible]) / math.sqrt(K)
                odds = torch.exp(scores - scores.max())
                share = odds / odds.sum()
                values = [v[j // groups] for _, v in visible]
                heads.append(sum(s * v for s, v in zip(share, values, strict=True)))
            out.append(self.w(f"{name}.o_proj.weight") @ torch.cat(heads))
        return out

    def state_space(self, i: int, layer: _Layer, x: Tensor) -> Tensor:
        c, name = self.config, f"model.layers.{i}.mixer"
        K, V, H = c.linear_key_head_dim, c.linear_value_head_dim, c.linear_num_value_heads
        share = H // c.linear_num_key_heads
        width = c.linear_conv_kernel_dim
        raw = torch.cat([self.w(f"{name}.{p}_proj.weight") @ x for p in "qkv"])
        layer.inputs = [*layer.inputs, raw][-width:]
        taps = torch.cat([self.w(f"{name}.q_conv"), self.w(f"{name}.kv_conv")])
        # The last tap meets the newest input; inputs from before the start are zero.
        newest_first = enumerate(reversed(layer.inputs))
        mixed = silu(sum(taps[:, width - 1 - ago] * old for ago, old in newest_first))
        q, k, v = mixed.split([K * c.linear_num_key_heads, K * c.linear_num_key_heads, H * V])
        q, k, v = q.split(K), k.split(K), v.split(V)
        raw_step = self.w(f"{name}.a_proj.weight") @ x + self.w(f"{name}.dt_bias")
        step = torch.log1p(torch.exp(-raw_step.abs())) + raw_step.clamp(min=0)
        decay = torch.exp(-torch.exp(self.w(f"{name}.A_log")) * step)
        gate = silu(self.w(f"{name}.g_proj.weight") @ x).split(V)
        heads = []
        for h in range(H):
            q_h, k_h, v_h, S = q[h // share], k[h // share], v[h], layer.S[h]
            if c.state_space == "gated_deltanet":
                q_h, k_h = unit(q_h), unit(k_h)
                beta = 1 / (1 + torch.exp(-(self.w(f"{name}.b_proj.weight")[h] @ x)))
                erase = torch.eye(K, dtype=x.dtype) - beta * torch.outer(k_h, k_h)
                S = decay[h] * (erase @ S) + beta * torch.outer(k_h, v_h)
                o = S.T @ q_h / math.sqrt(K)
            else:
                S = decay[h] * S + torch.outer(k_h, step[h] * v_h)
                o = S.T @ q_h + self.w(f"{name}.skip")[h] * v_h
            layer.S = [*layer.S[:h], S, *layer.S[h + 1 :]]
            heads.append(self.norm(f"{name}.o_norm.weight", o) * gate[h])
        return self.w(f"{name}.o_proj.weight") @ torch.cat(heads)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum() + 1e-6)
