"""Activation checkpointing: the same gradients, computed again, from less that is kept."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import halved
from small import assert_same, fields_of, small_config, small_ids, small_model, snapshot
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid_sleep import SleepCache
from hybrid_sleep.configuration import STATE_SPACES
from hybrid_sleep.sleep import forward
from hybrid_sleep.sleep.checkpointing import Checkpointing
from hybrid_sleep.sleep.options import EVICTIONS, SCHEDULES

SINGLE = ("block", 1, 2, 3, "pass", "window")
NESTED = (("window", "block"), ["window", 2], ("window", "pass"))
LOOPS = (None, (1, 3), (0, 2), (2, 4))


def gradients(model, granularity, *args, **kwargs) -> list[torch.Tensor]:
    """Loss, logits and every gradient."""
    model.zero_grad()
    model.set_activation_checkpointing(granularity)
    with torch.random.fork_rng(devices=[]):
        out = model(*args, **kwargs)
        out.loss.backward()
    return [out.loss, out.logits, *(p.grad.clone() for p in model.parameters())]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    """Recomputing does the same arithmetic in the same order: equal bits."""
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@st.composite
def cases(draw):
    """A small model, arguments of a call, and a way to checkpoint it."""
    model = small_model(
        layer_types=draw(
            st.lists(
                st.sampled_from(["full_attention", "linear_attention"]), min_size=4, max_size=4
            )
        ),
        loop=draw(st.sampled_from(LOOPS)),
        eviction=draw(st.sampled_from(EVICTIONS)),
        state_space=draw(st.sampled_from(STATE_SPACES)),
        sleep_schedule=draw(st.sampled_from(SCHEDULES)),
        attention_dropout=draw(st.sampled_from([0.0, 0.3])),
        window=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 1000)),
    )
    batch, columns = draw(st.integers(1, 3)), draw(st.integers(2, 15))
    ids = small_ids(batch, columns, seed=draw(st.integers(0, 1000)))
    lengths = torch.tensor([draw(st.integers(0, columns)) for _ in range(batch)])
    lengths[0] = columns
    mask = (torch.arange(columns) >= columns - lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : draw(st.integers(0, columns - 1))] = -100
    depth = draw(st.integers(1, 4))
    call = {"attention_mask": mask, "labels": labels, "sleep_passes": depth}
    return model.train(), ids, call, draw(st.sampled_from(SINGLE + NESTED))


@given(cases())
@settings(max_examples=12)
def test_no_gradient_changes(case):
    model, ids, call, granularity = case
    assert_equal(gradients(model, granularity, ids, **call), gradients(model, None, ids, **call))


@pytest.mark.parametrize(("state_space", "eviction"), halved(STATE_SPACES, EVICTIONS))
def test_every_way_changes_no_gradient(state_space, eviction):
    """Ragged, left-padded rows that sleep three passes deep, looped blocks in the middle."""
    ids = small_ids(3, 13)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :9] = 0, 0
    call = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "sleep_passes": 3}
    model = small_model(
        loop=(1, 3), state_space=state_space, eviction=eviction, sleep_schedule="every_window"
    ).train()
    plain = gradients(model, None, ids, **call)
    for granularity in SINGLE + NESTED:
        assert_equal(gradients(model, granularity, ids, **call), plain)


@pytest.mark.parametrize("granularity", ["window", ("window", 2)])
def test_a_cache_goes_on_through_recomputed_windows(granularity):
    """The second call closes a window that the first one filled; both are learned from."""
    ids = small_ids(2, 13)
    results = []
    for choice in (granularity, None):
        model = small_model(loop=(0, 3), sleep_schedule="every_window").train()
        model.set_activation_checkpointing(choice)
        cache = SleepCache(model.config)
        parts = [
            model(part, labels=part, cache=cache, sleep_passes=3).loss
            for part in ids.split([5, 8], dim=1)
        ]
        sum(parts).backward()
        results.append((snapshot(cache), [*parts, *(p.grad for p in model.parameters())]))
    assert_same(results[0][0], results[1][0])
    assert_equal(results[0][1], results[1][1])


def test_an_error_leaves_the_cache_as_it_was(monkeypatch):
    model = small_model()
    model.set_activation_checkpointing("window")
    cache = model(small_ids(2, 7), sleep_passes=2).cache
    before = snapshot(cache)
    crossed = SleepCache.cross_boundary

    def fail_later(self, *args):
        if int(self.sleeps[0]) == 2:
            raise RuntimeError("no memory left")
        return crossed(self, *args)

    monkeypatch.setattr(SleepCache, "cross_boundary", fail_later)
    with pytest.raises(RuntimeError, match="no memory left"):
        model(small_ids(2, 14), cache=cache, sleep_passes=2)
    assert_same(snapshot(cache), before)


@pytest.mark.parametrize("granularity", [None, *SINGLE, *NESTED])
def test_every_block_is_computed_again_once_a_level(granularity):
    model = small_model(loop=(0, 3), sleep_schedule="every_window").train()
    calls = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = small_ids(2, 12)
    model.set_activation_checkpointing(granularity)
    loss = model(ids, labels=ids, sleep_passes=3).loss
    # Three windows of four blocks; behind two of them two passes of three, and the coda.
    assert len(calls) == 3 * 4 + 2 * (2 * 3 + 1)
    loss.backward()
    # The outer of two levels stops where the last group of a window has got what it starts from:
    # here one block, the coda.
    again = 2 * 26 - 3 if granularity in NESTED else 26 * (granularity is not None)
    assert len(calls) == 26 + again


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still held, and their maximum.

    Those of `given` tensors, of which an operation may return a view, do not count.
    """

    def __init__(self, given):
        super().__init__()
        self.given = {x.untyped_storage()._cdata for x in given}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.given:
                    reference = StorageWeakRef(storage)
                    self.held.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.operations += 1
        if self.operations % 20 == 0:
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        self.held = {key: pair for key, pair in self.held.items() if not pair[0].expired()}
        return sum(size for _, size in self.held.values())


def memory_of(granularity, passes=2, backward=True) -> tuple[int, int]:
    """Bytes held between forward and backward, and at most."""
    config = small_config(
        layer_types=["linear_attention", "full_attention"] * 2,
        state_space="mamba2",
        hidden_size=16,
        intermediate_size=24,
        window=12,
        sleep_schedule="every_window",
    )
    model = small_model(config, dtype=torch.float32, noise=0.0).train()
    model.set_activation_checkpointing(granularity)
    ids = small_ids(8, 3 * 12)
    with Live(model.parameters()) as live:
        out = model(ids, labels=ids, sleep_passes=passes, use_cache=False)
        gc.collect()
        held = live.now()
        if backward:
            out.loss.backward()
    return held, live.peak


def test_coarser_groups_keep_less():
    ways = (None, "block", 2, "pass", "window")
    held = [memory_of(granularity, backward=False)[0] for granularity in ways]
    assert all(less < more for more, less in zip(held, held[1:], strict=False)), held
    assert held[0] > 8 * held[1]
    assert memory_of(4, backward=False)[0] == held[3]
    assert memory_of("pass", passes=4, backward=False)[0] > held[3]
    assert memory_of("window", passes=4, backward=False)[0] == held[4]


def test_nested_checkpointing_keeps_less_while_a_window_is_computed_again():
    """Between windows as little as `window` alone, within one as little as the inner choice."""
    held, peak = memory_of("window")
    assert peak < 0.7 * memory_of(None)[1]
    for inner in ("pass", "block"):
        nested_held, nested_peak = memory_of(("window", inner))
        assert nested_held == held
        assert nested_peak < min(peak, memory_of(inner)[1])


@pytest.mark.parametrize("loop", [None, (0, 2)])
def test_only_what_crosses_a_boundary_is_kept_between_windows(monkeypatch, loop):
    starts = []
    after = forward._step_of_copy

    def watch(backbone, before, *step):
        starts.append(before)
        return after(backbone, before, *step)

    monkeypatch.setattr(forward, "_step_of_copy", watch)
    model = small_model(loop=loop)
    model.set_activation_checkpointing("window")
    model(small_ids(2, 14), sleep_passes=3)
    # A step is a window and the sleep behind it.
    assert [int(cache.sleeps[0]) for cache in starts] == [0, 1, 2]
    for cache in starts:
        assert cache.hidden is None and not cache.counts.any()
        for i, state in cache.states.items():
            is_attention = model.config.layer_types[i] == "full_attention"
            assert (state.S is None) == is_attention
            assert fields_of(state).keys() <= {"S"}


class Partitioned:
    """Parameters of the layers as under ZeRO-3: there while their module runs, or gets a gradient.

    whole: what they are then; of size 0 otherwise.
    """

    def __init__(self, model):
        self.whole = {p: p.data for p in model.model.layers.parameters()}
        for module in model.model.layers.modules():
            own = [p for p in module._parameters.values() if p is not None]
            # Its mixer reads the weight without calling the norm.
            own += [module.o_norm.weight] if hasattr(module, "o_norm") else []
            module.register_forward_pre_hook(lambda *_, own=own: self.gather(*own))
            module.register_forward_hook(lambda *_, own=own: self.free(*own))
        for p in self.whole:
            p.register_hook(lambda _, p=p: self.gather(p))
            p.register_post_accumulate_grad_hook(self.free)
            self.free(p)

    def gather(self, *parameters):
        for p in parameters:
            p.data = self.whole[p]

    def free(self, *parameters):
        for p in parameters:
            p.data = torch.empty(0, dtype=p.dtype)


@pytest.mark.parametrize("granularity", ["block", 2, "pass", "window", ("window", "block")])
def test_parameters_may_be_away_between_their_uses(granularity):
    ids = small_ids(2, 11)
    call = {"labels": ids, "sleep_passes": 3}
    changes = {"window": 3, "loop": (1, 3), "sleep_schedule": "every_window"}
    wanted = gradients(small_model(**changes).train(), None, ids, **call)
    model = small_model(**changes).train()
    Partitioned(model)
    assert_equal(gradients(model, granularity, ids, **call), wanted)


@pytest.mark.parametrize(
    "granularity",
    ["layer", "", 0, -1, True, 1.5, [], ("window",), ("window", None), ("window", "window"),
     ("window", 0), ("block", "window"), ("window", "block", 2), {"window": 1}],
)
def test_what_is_no_granularity_is_refused(granularity):
    model = small_model()
    model.set_activation_checkpointing(["window", 2])
    with pytest.raises(ValueError, match="granularity must be None, 'block', 'pass', 'window'"):
        model.set_activation_checkpointing(granularity)
    assert model.model.checkpointing == Checkpointing(group=2, window=True)
