"""A sleep through the engine, without a GPU, is the eager sleep: bits, reports and caches."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import halved
from recorder import PATHS, Recorder, engine_of, own, read, sleep_both_ways
from small import assert_same, gap, small_ids, small_model, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_sleep import SleepCache
from hybrid_sleep.configuration import STATE_SPACES
from hybrid_sleep.sleep.execution import SleepEngine
from hybrid_sleep.sleep.options import CARRIES, EVICTIONS

MODELS = st.fixed_dictionaries(
    {
        "state_space": st.sampled_from(STATE_SPACES),
        "eviction": st.sampled_from(EVICTIONS),
        "sleep_attention": st.sampled_from(["causal", "bidirectional"]),
        "sleep_carry": st.sampled_from(CARRIES),
        "distinct_passes": st.integers(1, 3),
        "loop": st.sampled_from([None, (1, 3), (0, 2), (0, 3), (2, 4)]),
        "layer_types": st.sampled_from(
            [
                ["full_attention", "linear_attention"] * 2,
                ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
                ["full_attention", "full_attention", "linear_attention", "full_attention"],
            ]
        ),
    }
)
DEPTHS = st.one_of(st.integers(1, 5), st.just("auto"))


CASES = {
    "changes": MODELS,
    "passes": DEPTHS,
    "lengths": st.lists(st.integers(1, 13), min_size=1, max_size=5),
    "uniform": st.booleans(),
    "tol": st.sampled_from([1e-300, 0.05, 0.3, 1.0]),
}


@settings(max_examples=15)
@given(**CASES)
def test_replays_are_what_eager_passes_leave(changes, passes, lengths, uniform, tol):
    replays_are_what_eager_passes_leave(changes, passes, lengths, uniform, tol)


@pytest.mark.slow
@settings(max_examples=40)
@given(**CASES)
def test_many_replays_are_what_eager_passes_leave(changes, passes, lengths, uniform, tol):
    replays_are_what_eager_passes_leave(changes, passes, lengths, uniform, tol)


@torch.no_grad()
def replays_are_what_eager_passes_leave(changes, passes, lengths, uniform, tol):
    lengths = [lengths[0]] * len(lengths) if uniform else lengths
    exact = len(lengths) & (len(lengths) - 1) == 0
    model = small_model(**changes, dtype=torch.float32 if exact else torch.float64)
    try:
        if passes == "auto":
            model.sleep(read(model, [1], 0), passes="auto")
    except ValueError:
        passes = 3
    engine = engine_of(model)
    paths = []
    for seed in range(4):
        cache = read(model, lengths, seed)
        paths.append(
            sleep_both_ways(
                model, engine, cache, exact, passes=passes, tol=tol, max_passes=5
            )
        )
    assert paths == (["eager: only one pass"] * 4 if passes == 1 else PATHS)


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: results whose values or shapes the host waits for,
    constants of the host, another device, random numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name, tags = kwargs or {}, func._schema.name, func.tags
        # With dropout 0 attention draws nothing; an index of integers has a known shape.
        attention = "scaled_dot_product" in name
        indexed = name == "aten::index" and not any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        assert torch.Tag.data_dependent_output not in tags, name
        assert torch.Tag.nondeterministic_seeded not in tags or attention, name
        assert torch.Tag.dynamic_output_shape not in tags or indexed, name
        assert "lift_fresh" not in name and "pin_memory" not in name, name
        return func(*args, **kwargs)


class Strict(Recorder):
    """Records only what a CUDA graph could hold too."""

    def __call__(self, work):
        with NoWaiting():
            work()
        return work


@pytest.mark.parametrize(
    ("lengths", "attention", "state_space", "eviction"),
    halved([[5, 5], [5, 2], [1], [5, 5, 5]], ["sdpa", "eager"], STATE_SPACES, EVICTIONS),
)
@torch.no_grad()
def test_no_step_waits_for_the_device(state_space, eviction, attention, lengths):
    model = small_model(
        state_space=state_space, eviction=eviction, loop=(0, 3), dtype=torch.bfloat16
    )
    model.set_attn_implementation(attention)
    model.model.engine = SleepEngine(Strict)
    for paths in PATHS[:3]:
        assert model.sleep(read(model, lengths, 0), passes=4).path == paths


def test_what_waits_for_the_device_is_refused():
    x = torch.ones(3)
    for waits in (x.sum().item, x.nonzero, lambda: x[x > 0], lambda: torch.rand(2),
                  lambda: torch.tensor([1.0]), lambda: bool(x.sum() > 0)):  # fmt: skip
        with pytest.raises(AssertionError), NoWaiting():
            waits()


@pytest.mark.parametrize(
    ("state_space", "eviction", "loop"), halved(STATE_SPACES, EVICTIONS, [None, (1, 3)])
)
@torch.no_grad()
def test_rows_that_sleep_at_different_times_read_on_as_without_the_engine(
    state_space, eviction, loop
):
    model = small_model(state_space=state_space, eviction=eviction, loop=loop)
    engine = engine_of(model)
    mask = torch.ones(5, 31, dtype=torch.long)
    for row in range(5):
        mask[row, : 2 * row] = 0
    for seed in range(2):
        ids, outs = small_ids(5, 31, seed=seed), []
        for model.model.engine in (None, engine):
            cache, logits = SleepCache(model.config), []
            for part in (slice(0, 17), slice(17, 18), slice(18, 31)):
                out = model(
                    ids[:, part], attention_mask=mask[:, part], cache=cache,
                    sleep_passes=3,
                )  # fmt: skip
                logits.append(out.logits)
            outs.append((torch.cat(logits, 1), cache))
        (wanted, eager), (given_, mine) = outs
        assert gap(given_, wanted) <= 1e-12
        for layer, S in eager.fast_weights.items():
            assert gap(mine.fast_weights[layer], S) <= 1e-12
    assert len({tuple(report.rows) for report in mine.reports}) > 2
    assert {report.path for report in mine.reports} >= {"recorded: replayed"}


@torch.no_grad()
def test_rows_up_to_the_next_power_of_two_share_a_plan():
    model = small_model()
    engine = engine_of(model)
    paths = [
        sleep_both_ways(model, engine, read(model, [5] * rows, rows), exact=False, passes=3)
        for rows in (4, 4, 3, 4, 3)
    ]
    assert paths == [*PATHS, PATHS[-1]]
    (plan,) = engine.plans.values()
    assert len(plan.carry.h) == 4


@torch.no_grad()
def test_each_depth_takes_the_steps_it_needs():
    model = small_model()
    engine = engine_of(model)
    pruned, whole = ("looped_pass", True), ("looped_pass", False)
    steps = []
    for passes in (2, 2, 2, 4, 4, "auto", "auto"):
        path = sleep_both_ways(
            model, engine, read(model, [5, 5], 0), passes=passes, tol=1e-300, max_passes=4
        )
        held = [
            [(step.__name__, dict(flags)["last"] is not None) for step, flags in plan.replays]
            for plan in engine.plans.values()
        ]
        steps.append((path, *held))
    assert steps == [
        (PATHS[0],),
        (PATHS[1], [pruned]),
        (PATHS[2], [pruned]),
        (PATHS[1], [pruned, whole]),
        (PATHS[2], [pruned, whole]),
        # Rows that stop one by one need a mask, so these are another shape.
        (PATHS[0], [pruned, whole]),
        (PATHS[1], [pruned, whole], [whole]),
    ]


@torch.no_grad()
def test_a_window_of_one_token():
    model = small_model(window=1)
    engine = engine_of(model)
    paths = [sleep_both_ways(model, engine, read(model, [1, 1], n), passes=3) for n in range(3)]
    assert paths == PATHS[:3]


@torch.no_grad()
def test_threads_that_let_one_model_sleep_do_not_meet_in_its_buffers():
    model = small_model(dtype=torch.float32)
    caches = [read(model, [5, 5], seed) for seed in range(8)]
    model.model.engine, wanted = None, []
    for cache in caches:
        wanted.append(own(cache))
        model.sleep(wanted[-1], passes=4)
    engine_of(model)
    for seed in range(2):
        model.sleep(own(caches[seed]), passes=4)

    def sleep(cache):
        with torch.no_grad():
            model.sleep(cache, passes=4)

    threads = [threading.Thread(target=sleep, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cache, eager in zip(caches, wanted, strict=True):
        assert cache.reports[-1].path == PATHS[2]
        assert_same(snapshot(cache), snapshot(eager))
