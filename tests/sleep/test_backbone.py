"""The protocol is enough: one of transformers' own hybrids sleeps, by an adapter of one page."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from small import gap
from transformers import DynamicCache, Qwen3NextConfig, Qwen3NextForCausalLM

from hybrid_sleep import SleepCache
from hybrid_sleep.sleep.algorithm import consolidate
from hybrid_sleep.sleep.checkpointing import Checkpointing, Truncation
from hybrid_sleep.sleep.execution import SleepEngine
from hybrid_sleep.sleep.forward import forward
from hybrid_sleep.sleep.masks import AttentionMask, build_mask
from hybrid_sleep.sleep.options import SleepOptions
from hybrid_sleep.sleep.state import LayerState

L = 6
EXACT = 1e-10
# Their delta rule computes in float32 whatever the model is in: other cuts round elsewhere.
SINGLE = 1e-6


class LayerCache:
    """What a layer of transformers asks of a cache, answered out of place from a `LayerState`."""

    def __init__(self, state: LayerState):
        self.state = state

    def update(self, k, v, layer, **kwargs):
        if self.state.slots:
            k, v = (torch.cat(p, 2) for p in zip(self.state.slots, (k, v), strict=True))
        self.state = self.state._replace(slots=(k, v))
        return k, v

    def get_conv_state(self, layer, state_idx=0):
        # None: their update of one token writes in place, and ours asks for the whole window.
        return None

    def get_recurrent_state(self, layer, state_idx=0):
        return self.state.S

    def update_conv_state(self, x, layer, conv_kernel_size, **kwargs):
        tail = self.state.tails[0] if self.state.tails else None
        x = x if tail is None else torch.cat((tail, x), dim=2)
        x = torch.nn.functional.pad(x, (max(0, conv_kernel_size - x.shape[2]), 0))
        self.state = self.state._replace(tails=(x[..., -conv_kernel_size:],))
        return x

    def update_recurrent_state(self, S, layer, **kwargs):
        self.state = self.state._replace(S=S)


class Context(NamedTuple):
    """Positions and mask of one pass."""

    cos: torch.Tensor
    sin: torch.Tensor
    attention: AttentionMask
    keep_tails: bool


class Qwen3NextBackbone:
    """`Backbone` over a `Qwen3NextModel`, for rows of equal length."""

    checkpointing, truncation, training = Checkpointing(), Truncation(), False
    engine: SleepEngine | None = None

    def __init__(self, model: Qwen3NextForCausalLM, options: SleepOptions):
        self.model, self.options, self.blocks = model.model, options, model.model.layers
        kinds = model.config.layer_types
        self.fast_weight_layers = [i for i, t in enumerate(kinds) if t == "linear_attention"]

    def embed(self, tokens):
        return self.model.embed_tokens(tokens)

    def context(self, past, new, width, first_position, like, *, sleeping):
        places = first_position[:, None] + torch.arange(int(new.max()))
        both_ways = sleeping and self.options.attention == "bidirectional"
        attention = build_mask(past, new, width, bidirectional=both_ways)
        return Context(*self.model.rotary_emb(like, places), attention, not sleeping)

    def run_blocks(self, layers, h, states, context, *, last_writer=None):
        after = {}
        for i in layers:
            cache = LayerCache(states.get(i, LayerState()))
            mask = None if i in self.fast_weight_layers else context.attention.mask
            where = (context.cos, context.sin)
            h = self.blocks[i](h, position_embeddings=where, attention_mask=mask, cache=cache)
            tails = cache.state.tails if context.keep_tails else ()
            after[i] = cache.state._replace(tails=tails)
            if i == last_writer:
                return None, after
        return h, after


@pytest.fixture
def model() -> Qwen3NextForCausalLM:
    config = Qwen3NextConfig(
        vocab_size=13, hidden_size=16, intermediate_size=12, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=6, linear_value_head_dim=5,
        linear_conv_kernel_dim=3, num_experts=0, full_attention_interval=2, dtype="float64",
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def backbone_of(model, **options) -> Qwen3NextBackbone:
    return Qwen3NextBackbone(model, SleepOptions(L, **{"loop": (0, 4), **options}))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 13, shape, generator=torch.Generator().manual_seed(1))


def logits(model, h: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(h))


def written_out(model, tokens: torch.Tensor, depth: int) -> tuple[list[torch.Tensor], list]:
    """Logits of each window and S at the end: the stock forward over its own cache, `depth` times
    a window, with everything but the recurrent states emptied in between."""
    S, found = {}, []
    for window in tokens.split(L, dim=1):
        h = model.model.embed_tokens(window)
        for j in range(depth if len(found) < tokens.shape[1] // L else 1):
            cache = DynamicCache(config=model.config)
            for i, state in S.items():
                layer = cache.layers[i]
                mixer = model.model.layers[i].linear_attn
                conv = h.new_zeros(len(h), mixer.conv_dim, mixer.conv_kernel_size)
                layer.lazy_initialization(conv_states=conv, recurrent_states=state)
                layer.recurrent_states[0], layer.has_previous_state[0] = state.clone(), True
            kept = []
            hook = model.model.layers[-1].register_forward_hook(lambda *a, k=kept: k.append(a[2]))
            # Positions of their own: their cache counts none where its keys were dropped.
            places = torch.arange(window.shape[1])[None]
            model.model(inputs_embeds=h, cache=cache, position_ids=places)
            hook.remove()
            h = kept[0]
            if j == 0:
                found.append(logits(model, h))
            layers = enumerate(cache.layers)
            S = {i: x.recurrent_states[0] for i, x in layers if hasattr(x, "recurrent_states")}
    return found, [S[i] for i in sorted(S)]


@torch.no_grad()
def test_one_pass_within_a_window_is_the_stock_model(model):
    tokens = ids(2, L)
    want = model(tokens, use_cache=False).logits
    for cut in ([L], [2, 4], [3, 1, 2]):
        backbone, cache, found = backbone_of(model), SleepCache(SleepOptions(L, (0, 4))), []
        cache.open(2)
        for part in tokens.split(cut, dim=1):
            found.append(forward(backbone, part, None, cache, passes=1))
        assert gap(logits(model, torch.cat(found, 1)), want) <= (EXACT if cut == [L] else SINGLE)


@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.no_grad()
def test_passes_are_those_of_a_loop_written_out_over_the_stock_model(model, depth):
    tokens = ids(2, 2 * L + 3)
    want, S = written_out(model, tokens, depth)
    backbone = backbone_of(model)
    cache = SleepCache(backbone.options)
    cache.open(2)
    h = forward(backbone, tokens, None, cache, passes=depth)
    assert gap(logits(model, h), torch.cat(want, 1)) <= EXACT
    assert [report.passes for report in cache.reports] == [depth, depth]
    for mine, theirs in zip(cache.fast_weights.values(), S, strict=True):
        assert gap(mine, theirs) <= EXACT
    if depth > 1:
        assert gap(torch.cat(written_out(model, tokens, 1)[0], 1), torch.cat(want, 1)) > 1e-6


@torch.no_grad()
def test_a_coda_and_rows_of_their_own_depth(model):
    backbone = backbone_of(model, loop=(0, 2))
    tokens = ids(3, L)
    together = SleepCache(backbone.options)
    together.open(3)
    forward(backbone, tokens, None, together, passes=1)
    whole = copy.deepcopy(together)
    consolidate(backbone, together, torch.arange(3), "auto", tol=0.05, max_passes=5)
    for row, depth in enumerate(together.reports[-1].passes_by_row):
        alone = whole.copy()
        alone.batch_select_indices(torch.tensor([row]))
        consolidate(backbone, alone, torch.arange(1), depth)
        for i, S in alone.fast_weights.items():
            assert gap(together.fast_weights[i][row], S[0]) <= SINGLE


def test_gradients_flow_through_passes_and_windows(model):
    """Their own cache copies in place, which breaks the graph; states out of place do not."""
    tokens, backbone = ids(1, 2 * L), backbone_of(model)
    weight = model.model.layers[0].linear_attn.dt_bias

    def loss() -> torch.Tensor:
        cache = SleepCache(backbone.options)
        cache.open(1)
        h = forward(backbone, tokens, None, cache, passes=3)
        return logits(model, h[:, L:]).square().mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 0.02
    with torch.no_grad():
        weight[0] += step
        above = loss()
        weight[0] -= 2 * step
        below = loss()
        weight[0] += step
    difference = (above - below) / (2 * step)
    assert abs(gradient[0] - difference) <= 0.01 * abs(difference)


@torch.no_grad()
def test_a_depth_that_cannot_be_is_refused_before_anything_changes(model):
    backbone = backbone_of(model)
    cache = SleepCache(backbone.options)
    cache.open(1)
    forward(backbone, ids(1, 3), None, cache, passes=1)
    for passes in (0, -1, True, 1.5, "deep"):
        with pytest.raises(ValueError, match="passes must be an integer of at least 1 or 'auto'"):
            consolidate(backbone, cache, torch.arange(1), passes)
    # Layer 3 of 0..3 is attention: no fast weights to watch.
    backbone.options = SleepOptions(L, (3, 4))
    with pytest.raises(ValueError, match="passes='auto' watches looped fast weights"):
        consolidate(backbone, cache, torch.arange(1), "auto")
    assert cache.counts.tolist() == [3] and cache.sleeps.tolist() == [0]
