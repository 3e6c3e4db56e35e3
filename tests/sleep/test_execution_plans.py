"""The plans of the sleep engine: when they are made, kept, dropped and not used, and why."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from recorder import FIRST, PATHS, Recorder, engine_of, read, sleep_both_ways
from small import assert_same, small_ids, small_model, snapshot

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.sleep import execution
from hybrid_sleep.sleep.execution import MOST_PLANS, SleepEngine


@torch.no_grad()
def test_weights_edited_in_place_are_seen_and_moved_ones_are_captured_again():
    model = small_model(dtype=torch.float32)
    engine = engine_of(model)

    def paths(count):
        return [
            sleep_both_ways(model, engine, read(model, [5, 5], seed), passes=3)
            for seed in range(count)
        ]

    assert paths(3) == PATHS[:3]
    for p in model.parameters():
        p.mul_(1.1)
    assert paths(1) == ["recorded: replayed"]
    weight = model.model.layers[1].mixer.k_proj.weight
    weight.data = weight.data * 1.5
    assert paths(2) == PATHS[:2]
    model.model.layers[3].mixer.v_proj.weight = torch.nn.Parameter(-weight.data[:1].repeat(6, 1))
    assert paths(2) == PATHS[:2]
    model.double()
    assert not engine.plans
    assert paths(2) == PATHS[:2]


@torch.no_grad()
def test_the_plan_unused_for_longest_goes_first():
    model = small_model(window=16)
    engine = engine_of(model)

    def path(length):
        return sleep_both_ways(model, engine, read(model, [length], length), passes=3)

    lengths = range(1, MOST_PLANS + 2)
    assert [path(n) for n in lengths] == [FIRST] * len(lengths)
    assert [path(n) for n in lengths[:-1]] == ["recorded: captured"] * MOST_PLANS
    assert path(1) == "recorded: replayed"
    assert path(lengths[-1]) == "recorded: captured"
    assert len(engine.plans) == MOST_PLANS
    assert len({id(plan.record) for plan in engine.plans.values()}) == 1
    assert path(1) == "recorded: replayed"
    assert path(2) == "recorded: captured"
    assert len(engine.plans) == MOST_PLANS


def test_shapes_are_not_remembered_without_end(monkeypatch):
    monkeypatch.setattr(execution, "MOST_SHAPES", 2)
    model = small_model(window=9)
    engine = engine_of(model)
    with torch.no_grad():
        paths = [
            sleep_both_ways(model, engine, read(model, [n], 0), passes=2)
            for n in (1, 2, 3, 1, 3, 3)
        ]
    assert paths == [FIRST] * 4 + PATHS[1:3]


@pytest.mark.parametrize("at", ["made", "recorded"])
@torch.no_grad()
def test_a_capture_that_fails_is_told_once_and_not_tried_again(at, monkeypatch):
    warned = []
    monkeypatch.setattr(execution.logger, "warning", warned.append)

    class Broken(Recorder):
        tried = 0

        def __init__(self, device):
            Broken.tried += 1
            if at == "made":
                raise RuntimeError("no pool")

        def __call__(self, work):
            work()
            raise RuntimeError("no graph")

    model = small_model(dtype=torch.float32)
    engine = model.model.engine = SleepEngine(Broken)
    why = "no pool" if at == "made" else "no graph"
    reason = f"capture failed with RuntimeError: {why}"
    paths = [
        sleep_both_ways(model, engine, read(model, [5, 4], seed), passes=3) for seed in range(4)
    ]
    assert paths == [FIRST, *[f"eager: {reason}"] * 3]
    assert Broken.tried == 1 and not engine.plans
    assert warned == [f"sleeps of this shape run eagerly: {reason}"]


@torch.no_grad()
def test_a_replay_that_fails_leaves_the_cache_as_it_was():
    class Fragile(Recorder):
        def __call__(self, work):
            work()

            def replay():
                raise RuntimeError("the device is gone")

            return replay

    model = small_model()
    model.model.engine = SleepEngine(Fragile)
    model.sleep(read(model, [5], 0), passes=3)
    cache = read(model, [5], 1)
    before = snapshot(cache)
    with pytest.raises(RuntimeError, match="the device is gone"):
        model.sleep(cache, passes=3)
    assert_same(before, snapshot(cache))
    assert model.model.engine.lock.acquire(blocking=False)


@torch.no_grad()
def test_fast_weights_that_are_not_finite_are_refused_in_a_replay_too():
    model = small_model()
    engine_of(model)
    for seed in range(2):
        model.sleep(read(model, [5, 5], seed), passes=3)
    cache = read(model, [5, 5], 2)
    layer = next(iter(cache.fast_weights))
    cache.states[layer] = cache.states[layer]._replace(
        S=torch.full_like(cache.states[layer].S, float("nan"))
    )
    before = snapshot(cache)
    with pytest.raises(ValueError, match=f"fast weights of layer {layer}"):
        model.sleep(cache, passes=3)
    assert_same(before, snapshot(cache))
    # What lay in the buffers does not reach the next sleep.
    assert sleep_both_ways(model, model.model.engine, read(model, [5, 5], 3), passes=3) == PATHS[2]


def hooked(model):
    model.model.layers[1].mixer.k_proj.register_forward_hook(lambda *_: None)


def hooked_everywhere(model):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    model.undo = handle.remove


def wrapped(model):
    mlp = model.model.layers[2].mlp
    mlp.forward = mlp.forward


def dropping(model):
    model.config.attention_dropout = 0.1
    model.train()


def of_another_type(model):
    class Special(torch.Tensor):
        pass

    norm = model.model.layers[0].mixer_norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().as_subclass(Special))


def parametrized(model):
    mlp = model.model.layers[0].mlp
    torch.nn.utils.parametrize.register_parametrization(
        mlp.up_proj, "weight", torch.nn.Identity()
    )


def turned_off(model):
    model.model.engine = None


def no_gpu(model):
    model.model.engine = SleepEngine()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "a Linear has forward hooks, which a graph would skip"),
        (hooked_everywhere, "forward hooks on every module, which a graph would skip"),
        (wrapped, "a SwiGLU has forward hooks, which a graph would skip"),
        (dropping, "attention_dropout=0.1 in training mode"),
        (of_another_type, "weights are of type Special, not plain tensors"),
        (parametrized, "a ParametrizedLinear has a weight that is computed"),
        (turned_off, "turned off"),
        pytest.param(
            no_gpu, "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)  # fmt: skip
def test_the_reason_is_told(change, reason):
    model = small_model()
    engine_of(model)
    change(model)
    try:
        for _ in range(3):
            report = model.sleep(read(model, [5], 0), passes=2)
            assert report.path == f"eager: {reason}"
            assert reason in str(report) and report.to_dict()["path"] == report.path
    finally:
        getattr(model, "undo", lambda: None)()


def test_gradients_and_autocast_are_reasons_and_a_hook_on_the_prelude_is_none():
    model = small_model(loop=(1, 3), dtype=torch.float32)
    engine = engine_of(model)
    ids = small_ids(2, 12)
    for _ in range(3):
        model(ids, sleep_passes=3).logits.sum().backward()
    assert not engine.plans and not engine._shapes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        told = [model.sleep(read(model, [5], 0), passes=2).path for _ in range(2)]
    assert told == ["eager: autocast is on"] * 2
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert sleep_both_ways(model, engine, read(model, [5], 0), passes=2) == FIRST
        assert sleep_both_ways(model, engine, read(model, [5], 0), passes=2) == PATHS[1]


def test_plans_made_in_inference_mode_serve_outside_it_and_back():
    model = small_model(dtype=torch.float32)
    engine = engine_of(model)
    paths = []
    for seed, mode in enumerate((torch.inference_mode, torch.inference_mode, torch.no_grad) * 2):
        with mode():
            cache = read(model, [5, 2], seed)
            paths.append(sleep_both_ways(model, engine, cache, passes=3))
    assert paths == [*PATHS, PATHS[-1], PATHS[-1]]


@torch.no_grad()
def test_a_model_with_plans_is_copied_pickled_and_saved_without_them(tmp_path):
    model = small_model(dtype=torch.float32)
    engine = engine_of(model)
    for seed in range(2):
        model.sleep(read(model, [5], seed), passes=3)
    assert engine.plans
    assert not any("engine" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    model.model.engine = SleepEngine()
    twins = [pickle.loads(pickle.dumps(model)), HybridSleepForCausalLM.from_pretrained(tmp_path)]
    model.model.engine = engine
    twins.append(copy.deepcopy(model))
    assert twins[-1].model.engine.capture is Recorder
    wanted = model.sleep(read(model, [5], 7), passes=3)
    assert wanted.path == PATHS[2]
    for twin in twins:
        assert isinstance(twin.model.engine, SleepEngine) and twin.model.engine is not engine
        assert not twin.model.engine.plans
        for path in PATHS[:2]:
            engine_path = twin.model.engine.capture is Recorder
            report = twin.sleep(read(twin, [5], 7), passes=3)
            assert report.change == wanted.change
            assert report.path == path or not engine_path
