"""One token a row over buffers gives what appending it gives, and nobody else notices."""

from __future__ import annotations

import shutil
from itertools import product

import pytest
import torch
from marks import halved, slow
from small import (
    assert_same,
    expect,
    fields_of,
    gap,
    small_ids,
    small_model,
    snapshot,
)
from transformers import (
    CompileConfig,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from hybrid_sleep import SleepCache
from hybrid_sleep.configuration import STATE_SPACES
from hybrid_sleep.sleep import compiling, decoding
from hybrid_sleep.sleep.compiling import StepCompiler, few_rows
from hybrid_sleep.sleep.options import ATTENTIONS, CARRIES, EVICTIONS

EXACT = 1e-10
FIRST = ("gated_deltanet", "hard")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiling.COMPILERS)), reason="no C++ compiler"
)


def decode(model, cache, ids, *, passes=3, mask=None, look=lambda cache, t: None):
    """Logits `[B, T, V]` of ids that come one by one, and how each was taken in."""
    logits, paths = [], []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            now = None if mask is None else mask[:, t : t + 1]
            out = model(ids[:, t : t + 1], attention_mask=now, cache=cache, sleep_passes=passes)
            logits.append(out.logits)
            paths.append(cache.decoding)
            look(cache, t)
    return torch.cat(logits, 1), paths


def assert_close(a: SleepCache, b: SleepCache, tolerance: float = EXACT) -> None:
    """Two caches hold the same, but for rounding."""
    one, other = snapshot(a), snapshot(b)
    assert one.keys() == other.keys()
    for name, x in one.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            assert gap(other[name], x) <= tolerance, name
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, other[name]), name
        else:
            assert x == other[name], name


@pytest.fixture
def appending(monkeypatch):
    """Turns decoding in place off."""
    return lambda: monkeypatch.setattr(decoding, "_refusal", lambda *_: "turned off")


@pytest.mark.parametrize(
    ("state_space", "eviction", "attention", "carry"),
    halved(STATE_SPACES, EVICTIONS, ATTENTIONS, CARRIES),
)
def test_it_equals_the_specification(state_space, eviction, attention, carry):
    model = small_model(
        state_space=state_space, eviction=eviction, sleep_attention=attention,
        sleep_carry=carry, loop=(1, 3),
    )  # fmt: skip
    ids, cache = small_ids(2, 23), SleepCache(model.config)
    model(ids[:, :3], cache=cache, sleep_passes=3)
    logits, paths = decode(model, cache, ids[:, 3:])
    # The first one is appended, and that of every window which lets the one before it sleep.
    assert paths.count("in place") == 15, paths
    for b in range(2):
        want = expect(model, ids[b], 3)
        assert gap(logits[b], torch.stack(want.logits)[3:]) <= EXACT
        for i, S in want.S.items():
            assert gap(cache.fast_weights[i][b], S) <= EXACT


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_rows_at_places_of_their_own(eviction, appending):
    """Rows begin with windows filled differently, and take tokens or not as a mask has it."""
    model = small_model(eviction=eviction, loop=(0, 3), window=7)
    ids, taken = small_ids(4, 6), torch.tensor([6, 1, 4, 2])
    prompt = (torch.arange(6) < taken[:, None]).long()
    more = small_ids(4, 40, seed=1)
    mask = torch.rand(4, 40, generator=torch.Generator().manual_seed(2)) < 0.8
    mask[:, 25:] = torch.tensor([True, False, True, False])[:, None]
    mask[:, 11:14] = True
    caches, found = [], []
    for turn in range(2):
        cache = SleepCache(model.config)
        model(ids, attention_mask=prompt, cache=cache, sleep_passes=2)
        logits, paths = decode(model, cache, more, passes=2, mask=mask.long())
        assert ("in place" in paths) == (turn == 0)
        caches.append(cache)
        found.append(logits)
        appending()
    assert gap(*found) <= EXACT
    assert_close(*caches)


def test_a_window_longer_than_what_is_hashed_at_once(appending):
    model = small_model(window=150, layer_types=["linear_attention"])
    ids, caches = small_ids(2, 149), []
    mask = torch.ones_like(ids)
    mask[1, 30:60] = 0
    for turn in range(2):
        cache = SleepCache(model.config)
        _, paths = decode(model, cache, ids, mask=mask)
        assert paths.count("in place") == (0 if turn else 148)
        caches.append(cache)
        appending()
    one, other = (cache.history.folded() for cache in caches)
    assert torch.equal(one.whole, other.whole) and torch.equal(one.opening, other.opening)


def test_a_row_whose_window_is_full_and_takes_nothing_keeps_all_of_it(appending):
    model = small_model(window=5)
    ids, more = small_ids(2, 5), small_ids(2, 4, seed=1)
    cache, other = SleepCache(model.config), SleepCache(model.config)
    prompt = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    for held in (cache, other):
        model(ids, attention_mask=prompt, cache=held)
    only_second = torch.tensor([[0] * 4, [1] * 4])
    _, paths = decode(model, cache, more, mask=only_second)
    assert paths[1:] == ["in place"] * 3
    appending()
    decode(model, other, more, mask=only_second)
    assert_close(other, cache)
    model.sleep(cache, passes=3)
    model.sleep(other, passes=3)
    assert_close(other, cache)


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_who_looks_at_a_cache_changes_nothing(eviction):
    model = small_model(eviction=eviction, window=9)
    ids = small_ids(2, 30)
    looks = [
        lambda cache: cache.nbytes(),
        lambda cache: cache.fast_weights,
        lambda cache: cache.hidden,
        lambda cache: cache.history,
        lambda cache: repr(cache),
        lambda cache: len(cache),
    ]
    quiet, watched = SleepCache(model.config), SleepCache(model.config)
    logits, paths = decode(model, quiet, ids)
    seen, broken = decode(
        model, watched, ids, look=lambda cache, t: t % 3 or looks[t // 3 % len(looks)](cache)
    )
    assert paths.count("in place") > broken.count("in place") > 0
    assert gap(seen, logits) <= EXACT
    assert_close(quiet, watched)


def test_copies_and_picked_rows_are_not_written_in():
    model = small_model(window=12)
    ids = small_ids(3, 10)
    cache = SleepCache(model.config)
    decode(model, cache, ids[:, :6])
    twin, second = cache.copy(), cache.copy()
    second.batch_select_indices(torch.tensor([1]))
    before = snapshot(twin), snapshot(second)
    held = cache.states, cache.hidden
    kept = [x.clone() for state in held[0].values() for x in fields_of(state).values()]
    logits, _ = decode(model, cache, ids[:, 6:])
    assert_same(before[0], snapshot(twin))
    assert_same(before[1], snapshot(second))
    now = [x for state in held[0].values() for x in fields_of(state).values()]
    assert all(map(torch.equal, kept, now))
    again, _ = decode(model, twin, ids[:, 6:])
    assert gap(again, logits) <= EXACT
    alone, _ = decode(model, second, ids[1:2, 6:])
    assert gap(alone[0], logits[1]) <= EXACT


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_step_that_is_broken_off_leaves_no_trace(error):
    model = small_model(window=20)
    ids = small_ids(2, 12)
    cache, other = SleepCache(model.config), SleepCache(model.config)
    decode(model, cache, ids[:, :6])
    decode(model, other, ids[:, :6])

    def fail(*_):
        raise error("stop")

    handle = model.model.layers[3].register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        decode(model, cache, small_ids(2, 1, seed=5))
    handle.remove()
    assert_same(snapshot(other), snapshot(cache))
    decode(model, cache, ids[:, 6:8])
    handle = model.model.layers[3].register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        decode(model, cache, small_ids(2, 1, seed=5))
    handle.remove()
    rest, paths = decode(model, cache, ids[:, 8:])
    assert paths[0] == "in place"
    wanted, _ = decode(model, other, ids[:, 6:])
    assert gap(rest, wanted[:, 2:]) <= EXACT
    assert_close(other, cache)


def test_what_else_goes_the_ordinary_way_and_says_why():
    model = small_model(window=9)
    ids = small_ids(1, 4)
    cache = SleepCache(model.config)
    assert cache.decoding == "nothing decoded yet"
    with torch.no_grad():
        model(ids, cache=cache)
        assert cache.decoding == "appended: several tokens"
        model(ids[:, :1], cache=cache)
        assert cache.decoding == "appended: the first token that comes alone"
        model(ids[:, :1], cache=cache)
        assert cache.decoding == "in place"
        model(ids[:, :1], cache=cache, labels=ids[:, :1])
        assert cache.decoding.startswith("appended: hidden states of every layer, or supervised")
        model(ids[:, :1], cache=cache, output_hidden_states=True)
        assert cache.decoding.startswith("appended: hidden states of every layer, or supervised")
    out = model(ids[:, :1], cache=cache)
    assert cache.decoding == "appended: gradients are on"
    out.logits.sum().backward()
    with torch.no_grad():
        assert len(cache.counts) == 1 and cache.counts.tolist() == [9]
        model(ids[:, :1], cache=cache)
        assert cache.decoding == "appended: a window is full" or cache.sleeps.tolist() == [1]
    single = small_model(window=9, dtype=torch.float32)
    cache = SleepCache(single.config)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            single(ids[:, :1], cache=cache)
        assert cache.decoding == "appended: autocast is on"


def test_inference_mode_may_begin_and_end_anywhere():
    model = small_model(window=20)
    ids, cache, other = small_ids(1, 12), SleepCache(model.config), SleepCache(model.config)
    wanted, _ = decode(model, other, ids)
    found = []
    for t in range(12):
        with torch.inference_mode(t // 3 % 2 == 1), torch.no_grad():
            found.append(model(ids[:, t : t + 1], cache=cache).logits)
        assert cache.decoding == "in place" or t == 0
    assert gap(torch.cat(found, 1), wanted) <= EXACT
    assert_close(other, cache)


def test_a_backbone_that_cannot_is_told_apart(monkeypatch):
    model = small_model(window=9)
    ids, cache = small_ids(1, 5), SleepCache(model.config)
    monkeypatch.delattr(type(model.model), "decoding_context")
    _, paths = decode(model, cache, ids)
    assert paths[-1] == "appended: this backbone has no `decoding_context`"


@torch.no_grad()
def test_hooks_on_the_backbone_see_every_token():
    model = small_model(window=9)
    ids, cache = small_ids(1, 6), SleepCache(model.config)
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append(cache.decoding))
    decode(model, cache, ids)
    assert seen[2:] == ["in place"] * 4


def test_beams_are_appended_and_greedy_search_is_not(monkeypatch):
    model = small_model(window=9, noise=0.4, seed=3)
    ids = small_ids(2, 3)
    steps = []
    real = decoding.decode_step
    monkeypatch.setattr(decoding, "decode_step", lambda *args: steps.append(1) or real(*args))
    model.generate(ids, max_new_tokens=8, num_beams=2, do_sample=False)
    assert not steps
    model.generate(ids, max_new_tokens=8, do_sample=False)
    assert len(steps) == 5


def test_few_rows_is_a_product():
    for shape in ((1, 7), (3, 1, 7), (2, 2, 7)):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weight = torch.randn(5, 7, dtype=torch.float64)
        assert gap(few_rows(x, weight), torch.nn.functional.linear(x, weight)) <= EXACT


@needs_compiler
@pytest.mark.parametrize(
    ("state_space", "eviction"),
    [
        FIRST,
        *(slow(*kind) for kind in product(STATE_SPACES, EVICTIONS) if kind != FIRST),
    ],
)
def test_compiled_once_for_all_windows(state_space, eviction):
    """64 windows, each longer than the fewest slots that a step looks at."""
    window = 70
    model = small_model(
        layer_types=["full_attention", "linear_attention"], state_space=state_space,
        eviction=eviction, window=window,
    )  # fmt: skip
    compiler = model.model.compiler
    cache, other = SleepCache(model.config), SleepCache(model.config)
    cache.compile = True
    ids = small_ids(1, 64 * window)
    logits, paths = decode(model, cache, ids[:, :5], passes=2)
    assert paths[2].startswith("in place, compiled, in"), paths[2]
    assert compiler.compilations == 1
    rest, _ = decode(model, cache, ids[:, 5:], passes=2)
    assert compiler.compilations == 1
    assert int(cache.sleeps[0]) == 63
    count = 3 * window
    wanted, _ = decode(model, other, ids[:, :count], passes=2)
    assert gap(torch.cat((logits, rest), 1)[:, :count], wanted) <= EXACT


@needs_compiler
def test_compiled_steps_see_new_weights_and_rows_that_take_nothing():
    model = small_model(
        layer_types=["linear_attention", "full_attention"], window=12, dtype=torch.float32,
        noise=0.1,
    )  # fmt: skip
    cache, other = SleepCache(model.config), SleepCache(model.config)
    cache.compile = True
    ids = small_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    logits, paths = decode(model, cache, ids, mask=mask)
    assert paths[-1].startswith("in place, compiled")
    wanted, _ = decode(model, other, ids, mask=mask)
    assert gap(logits, wanted) <= 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    caches = [SleepCache(model.config) for _ in range(2)]
    caches[0].compile = True
    compiled, plain = (decode(model, held, ids)[0] for held in caches)
    assert gap(compiled, plain) <= 1e-4
    assert gap(compiled, logits) > 1e-2


def test_a_compiler_that_fails_is_left_alone(monkeypatch, caplog):
    model = small_model(window=9)

    def fail(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda step, **_: fail)
    cache, other = SleepCache(model.config), SleepCache(model.config)
    cache.compile = True
    ids = small_ids(1, 8)
    logits, paths = decode(model, cache, ids)
    assert paths[-1] == "in place, not compiled: RuntimeError: no compiler here"
    assert gap(logits, decode(model, other, ids)[0]) <= EXACT
    monkeypatch.setattr(torch, "compile", lambda step, **_: pytest.fail("compiled again"))
    decode(model, cache, ids)


@pytest.mark.parametrize(
    ("settings", "compiles"),
    [
        ({"max_new_tokens": 4}, False),
        ({"max_new_tokens": 4, "compile_config": CompileConfig()}, True),
        (
            {
                "generation_config": GenerationConfig(
                    max_new_tokens=4, compile_config=CompileConfig(), do_sample=False
                )
            },
            True,
        ),
        ({"max_new_tokens": 3000}, True),
        ({"max_new_tokens": 3000, "disable_compile": True}, False),
        ({"max_length": 3000}, True),
        ({"max_length": 10}, False),
    ],
)
def test_generate_compiles_where_it_pays_or_is_asked_to(settings, compiles, monkeypatch, caplog):
    model = small_model(window=9, noise=0.4, seed=3)
    calls = []
    monkeypatch.setattr(
        StepCompiler, "__call__", lambda self, step, *args: calls.append(step) or step(*args)
    )
    monkeypatch.setattr(StepCompiler, "path", "compiled", raising=False)
    ids = small_ids(1, 3)
    # Of thousands of tokens that may come, a few do.
    stop = StoppingCriteriaList([MaxLengthCriteria(8)])
    options = {"do_sample": False, **settings}
    out = model.generate(ids, return_dict_in_generate=True, stopping_criteria=stop, **options)
    assert bool(calls) == compiles
    assert "Compilation will be skipped" not in caplog.text
    assert out.cache.compile == compiles
    assert compiling.FEW_ROWS >= 1
