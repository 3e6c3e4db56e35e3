"""FLOPs, parameters and bytes on paper against what real forwards and sleeps do."""

from __future__ import annotations

import itertools

import pytest
import torch
from marks import halved, slow
from small import small_config, small_ids, small_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybrid_sleep import HybridSleepForCausalLM, SleepCache
from hybrid_sleep.eval.measure import flops
from hybrid_sleep.kernels.gated_delta_rule.reference import gated_delta_rule
from hybrid_sleep.kernels.ssd.reference import ssd
from hybrid_sleep.layers.attention import Attention
from hybrid_sleep.layers.state_space import StateSpaceMixer

A, S = "full_attention", "linear_attention"
CONFIGS = {
    "alternating": {},
    "mamba2": {"state_space": "mamba2", "linear_num_value_heads": 4, "linear_num_key_heads": 2},
    "ends with attention": {"layer_types": [S, S, A, S, A, A]},
    "prelude and coda": {"layer_types": [A, S, A, S, A, S, A], "loop": (1, 4)},
    "coda writes nothing": {"layer_types": [A, S, S, A, A], "loop": (1, 3)},
    "loop writes nothing": {"layer_types": [S, A, A, S, A], "loop": (1, 3)},
    "nothing is written": {"layer_types": [S, A, A], "loop": (1, 2)},
    "attention alone": {"layer_types": [A, A]},
    "written once": {
        "layer_types": [S, A, S, A, S], "loop": (1, 4), "sleep_carry": "hidden_states"
    },
    "a second look": {"layer_types": [A, S, A, S], "loop": (1, 3), "sleep_carry": "fast_weights"},
    "two ways": {"sleep_attention": "bidirectional", "num_attention_heads": 4},
    "widths": {"intermediate_size": [7, 0, 0, 3], "tie_word_embeddings": True},
    "sliding": {"eviction": "sliding"},
    "sliding, attention last": {"eviction": "sliding", "layer_types": [S, A, S, A]},
    "sliding, two ways, coda": {
        "eviction": "sliding",
        "layer_types": [A, S, A, A, S],
        "loop": (1, 3),
        "sleep_attention": "bidirectional",
        "state_space": "mamba2",
    },
    "compound tokens": {"vocab_size": 12, "token_fields": [3, 2, 2]},
    "passes of their own": {"layer_types": [A, S, A, S], "loop": (1, 3), "distinct_passes": 3},
    "shared layers": {"layer_types": [A, S] * 3, "distinct_layers": 2},
}
every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())


class Counter:
    """FLOPs of all rows, counted where they happen: every nn.Linear, every pair that the mask shows
    an attention layer, every token that a state-space layer reads or only writes."""

    def __init__(self, model):
        self.flops, self.handles = 0, []
        for module in model.modules():
            if isinstance(module, nn.Linear):
                self.handles.append(module.register_forward_hook(self.linear))
            elif isinstance(module, Attention):
                self.handles.append(module.register_forward_pre_hook(self.attention))
            elif isinstance(module, StateSpaceMixer):
                self.handles.append(module.register_forward_pre_hook(self.recurrence))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def linear(self, module, inputs, output):
        self.flops += 2 * output.numel() * module.in_features

    def attention(self, module, inputs):
        h, state, context, write_only = inputs
        if write_only:
            return
        old = state.slots[0].shape[2] if state is not None and state.slots else 0
        new = h.shape[1]
        if context.attention.mask is not None:
            mask = context.attention.mask
            pairs = int(mask.expand(len(h), *mask.shape[1:]).sum()) // len(h)
        elif context.attention.causal:
            pairs = sum(1 for i in range(new) for j in range(new) if j <= i)
        else:
            pairs = new * (old + new)
        heads = module.config.num_attention_heads
        for _ in ("q k", "weights v"):
            self.flops += 2 * len(h) * pairs * heads * module.head_dim

    def recurrence(self, module, inputs):
        h, _, _, write_only = inputs
        reads_with_k = type(module).__name__ == "GatedDeltaNet"
        for _ in range(h.shape[1]):
            for happens in (reads_with_k, True, not write_only):
                if happens:
                    size = module.value_heads * module.key_dim * module.value_dim
                    self.flops += 2 * len(h) * size


@every_config
@pytest.mark.parametrize("passes", [1, slow(2), 4])
def test_reading_with_sleeps_as_it_happens(changes, passes):
    model = small_model(**changes)
    for tokens in (1, 5, 6, 13):
        with Counter(model) as counter, torch.no_grad():
            model(small_ids(1, tokens), sleep_passes=passes)
        assert counter.flops == flops.sequence_flops(model.config, tokens, passes)


@every_config
def test_a_sleep_and_tokens_as_they_happen(changes):
    model = small_model(**changes)
    sliding = model.config.eviction == "sliding"
    with torch.no_grad():
        # Windows of 5: part of the first, all of the second, part of the third.
        for tokens, passes in itertools.product((3, 10, 12), (1, 2, 3)):
            cache = model(small_ids(1, tokens)).cache
            held, kept = int(cache.counts), int(cache.kept)
            assert kept == (min(tokens - held, 4) if sliding else 0)
            if held < 5:
                with Counter(model) as counter:
                    model(small_ids(1, 1, seed=1), cache=cache.copy())
                assert counter.flops == flops.token_flops(model.config, kept + held)
            with Counter(model) as counter:
                model.sleep(cache, passes)
            assert counter.flops == flops.sleep_flops(model.config, held, passes, past=kept)


@every_config
@pytest.mark.parametrize("passes", [slow(1), 3])
def test_a_past_that_was_slept_over_as_it_happens(changes, passes):
    model = small_model(**changes)
    for windows in (1, 3):
        with Counter(model) as counter, torch.no_grad():
            cache = SleepCache(model.config)
            ids = small_ids(1, 5 * windows)
            model(ids, cache=cache, sleep_passes=passes, logits_to_keep=1)
            model.sleep(cache, passes)
        assert counter.flops == flops.past_flops(model.config, 5 * windows, passes)


@every_config
@pytest.mark.parametrize("depths", [(4, 1), slow((2, 3)), slow((1, 2, 4))])
def test_groups_that_share_their_first_window_as_it_happens(changes, depths):
    model = small_model(**changes).train()
    ids = torch.cat([small_ids(1, 5)] * len(depths))
    ids = torch.cat([ids, small_ids(len(depths), 8, seed=1)], dim=1)
    labels = torch.where(torch.arange(13) >= 10, ids, -100)
    with Counter(model) as counter:
        model(ids, labels=labels, sleep_passes=depths)
    apart = sum(flops.sequence_flops(model.config, 13, passes, 2) for passes in depths)
    assert counter.flops == apart - flops.shared_flops(model.config, depths)
    with Counter(model) as counter:
        model(ids.flip(1), labels=labels, sleep_passes=depths)
    assert counter.flops == apart


def test_only_the_first_windows_sleep_where_labels_keep_others_awake():
    model = small_model()
    ids = small_ids(1, 18)
    for sleeps in range(5):
        labels = torch.where(torch.arange(18) >= 5 * sleeps, ids, -100)
        with Counter(model) as counter:
            model(ids, labels=labels, sleep_passes=3)
        assert counter.flops == flops.sequence_flops(model.config, 18, 3, sleeps)
    last = flops.sequence_flops(model.config, 18, 3, logits=1)
    assert flops.sequence_flops(model.config, 18, 3) - last == 2 * 17 * 12 * 11


def test_a_small_model_by_hand():
    """D = 12, vocabulary 11, MLP 10, 2 heads of 6, 1 of keys; state spaces: 1 key head of 4, 2
    value heads of 3."""
    config = small_config(layer_types=[A, S])
    # q 12x12, k and v 12x6 each, o 12x12; gate, up, down 12x10.
    attention = 144 + 72 + 72 + 144 + 360
    # q and k 12x4, v 12x6, a and b 12x2, g 12x6, o 6x12; three products with S, 2x4x3.
    state_space = 48 + 48 + 72 + 24 + 24 + 72 + 72 + 3 * 24 + 360
    # Three tokens see 1, 2 and 3 tokens; q k and weights v, 2 heads of 6.
    pairs = 6 * 2 * 2 * 6
    whole = 2 * (3 * (attention + state_space) + pairs)
    assert flops.pass_flops(config, 3) == whole == 9792
    # Neither reading with q, nor its projection, output gate and projection, nor the MLP.
    written = 2 * 3 * (state_space - 48 - 72 - 72 - 24 - 360)
    assert flops.pass_flops(config, 3, first=1, write_only_last=True) == written == 1296
    assert flops.sleep_flops(config, 3, 2) == whole - 6 * state_space + written == 6336
    assert flops.sleep_flops(config, 3, 4) == 2 * 9792 + 6336
    # A fourth token sees all four.
    one = 2 * (attention + state_space + 4 * 2 * 2 * 6) + 2 * 12 * 11
    assert flops.token_flops(config, 3) == one == 3624
    assert flops.sequence_flops(config, 4, 9) == 9792 + 3624 + 3 * 264
    assert flops.training_flops(config, 4, 9) == 3 * (9792 + 3624 + 3 * 264)
    assert flops.kv_bytes(config) == 2 * 6 * 4
    assert flops.kv_bytes(config, itemsize=2) == 2 * 6 * 2


@pytest.mark.parametrize("both_ways", [False, True])
def test_pairs_that_see_each_other(both_ways):
    for new, old, reach in itertools.product(range(1, 8), range(8), (None, 1, 3, 5, 20)):
        seen = 0
        for query in range(old, old + new):
            for key in range(old + new):
                seen += (both_ways or key <= query) and (reach is None or key > query - reach)
        assert flops.visible_pairs(new, old, reach=reach, bidirectional=both_ways) == seen


def test_a_token_behind_a_whole_cache_as_torch_counts_it():
    model = small_model(layer_types=[A, A, A], window=100, num_attention_heads=4)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        cache = model(small_ids(1, 30)).cache
        with FlopCounterMode(display=False) as counter:
            model(small_ids(1, 1), cache=cache)
    assert counter.get_total_flops() == flops.token_flops(model.config, 30)


def test_training_as_torch_counts_it():
    """In windows of one token no pair is masked, and attention alone leaves no loss unused."""
    model = small_model(layer_types=[A, A], window=1, sleep_schedule="every_window")
    model.set_attn_implementation("eager")
    ids = small_ids(1, 6)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == flops.training_flops(model.config, 6, 1)


def test_recurrences_as_torch_counts_them():
    """torch counts what is read with k and q; an outer product is one multiply-add an element."""
    q, k, v = torch.randn(1, 7, 2, 4), torch.randn(1, 7, 2, 4), torch.randn(1, 7, 2, 3)
    g, beta = -torch.rand(1, 7, 2), torch.rand(1, 7, 2)
    written = 2 * 7 * 2 * 4 * 3
    for mixer, rule in (
        ("gated_deltanet", lambda output: gated_delta_rule(
            q, k, v, g, beta, None, None, 1.0, None, output)),
        ("mamba2", lambda output: ssd(q, k, v, g, None, None, 1.0, None, output)),
    ):  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            rule(True)
        assert counter.get_total_flops() + written == flops.RECURRENCE[mixer] * written
        with FlopCounterMode(display=False) as counter:
            rule(False)
        assert counter.get_total_flops() + written == (flops.RECURRENCE[mixer] - 1) * written


@every_config
def test_parameters_are_those_of_the_model(changes):
    config = small_config(**changes)
    model = HybridSleepForCausalLM(config)
    assert flops.parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("config", "dtype"), halved(CONFIGS, [torch.float32, torch.bfloat16]))
def test_bytes_are_those_of_the_cache(config, dtype):
    model = small_model(dtype=dtype, **CONFIGS[config])
    cache = SleepCache(model.config)
    with torch.no_grad():
        for token in small_ids(1, 13)[0]:
            model(token[None, None], cache=cache, sleep_passes=2)
            held = {"past": int(cache.kept), "slept": bool(cache.sleeps)}
            counted = flops.cache_bytes(
                model.config, int(cache.counts), itemsize=dtype.itemsize, **held
            )
            assert cache.nbytes() == counted
        model.sleep(cache, 2)
    counted = flops.cache_bytes(
        model.config, 0, past=int(cache.kept), slept=True, itemsize=dtype.itemsize
    )
    assert cache.nbytes() == counted
    if model.config.eviction == "hard" and model.config.loop is None:
        assert counted == model.config.fast_weight_bytes


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda c: flops.pass_flops(c, 0), "tokens must be an integer of at least 1, got 0"),
        (lambda c: flops.pass_flops(c, 3, past=-1), "past must be .* at least 0, got -1"),
        (lambda c: flops.pass_flops(c, 3, first=4), "0 <= first < last <= 4, got 4, 4"),
        (lambda c: flops.pass_flops(c, 3, last=5), "0 <= first < last <= 4, got 0, 5"),
        (lambda c: flops.sleep_flops(c, 3, 0), "passes must be .* at least 1, got 0"),
        (lambda c: flops.sleep_flops(c, 3, "auto"), "passes must be .* got 'auto'"),
        (lambda c: flops.sequence_flops(c, 3, 1, -1), "sleeps must be .* at least 0, got -1"),
        (lambda c: flops.past_flops(c, 7, 1), "multiple of the window, 5, got 7"),
        (lambda c: flops.training_flops(c, 2.5, 1), "tokens must be .* got 2.5"),
        (lambda c: flops.cache_bytes(c, -1), "tokens must be .* at least 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call(small_config())
