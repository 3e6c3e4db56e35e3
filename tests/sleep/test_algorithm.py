"""What a sleep does: depth one, folds of passes, pruning, partial windows, depth that adapts."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from marks import halved
from small import (
    Row,
    assert_same,
    gap,
    oracle_of,
    small_ids,
    small_model,
    snapshot,
)

from hybrid_sleep import SleepCache
from hybrid_sleep.configuration import STATE_SPACES
from hybrid_sleep.sleep.options import EVICTIONS
from hybrid_sleep.sleep.state import LayerState

EXACT = 1e-10


def plain_hybrid(model, ids_T: torch.Tensor) -> torch.Tensor:
    """A windowed hybrid that has never heard of sleep: whole rows, masks, one recurrence a layer.

    Hard eviction: tokens see their own block of L, and convolutions start at its edge. Sliding:
    tokens see the L last ones, and nothing else knows of windows.
    """
    c, place = model.config, torch.arange(len(ids_T))
    if c.eviction == "hard":
        block, angle_place = place // c.window, place % c.window
        seen = (place <= place[:, None]) & (block == block[:, None])
    else:
        block, angle_place = torch.zeros_like(place), place
        seen = (place <= place[:, None]) & (place > place[:, None] - c.window)
    theta = c.rope_parameters["rope_theta"]
    frequency = theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), angle_place[:, None] * frequency)

    def rotated(x_THK):
        half = c.head_dim // 2
        z = torch.complex(x_THK[..., :half], x_THK[..., half:]) * turn[:, None]
        return torch.cat((z.real, z.imag), -1)

    def convolved(x_TC, taps_CW):
        parts = []
        for n in block.unique():
            part = F.pad(x_TC[block == n].T[None], (taps_CW.shape[1] - 1, 0))
            parts.append(F.conv1d(part, taps_CW[:, None], groups=len(taps_CW))[0].T)
        return F.silu(torch.cat(parts))

    h = model.model.embed_tokens(ids_T)
    for layer in model.model.layers:
        m, x = layer.mixer, layer.mixer_norm(h)
        if hasattr(m, "k_norm"):
            q = rotated(m.q_norm(m.q_proj(x).unflatten(-1, (-1, c.head_dim))))
            k = rotated(m.k_norm(m.k_proj(x).unflatten(-1, (-1, c.head_dim))))
            v = m.v_proj(x).unflatten(-1, (-1, c.head_dim))
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
            odds = torch.einsum("thk,shk->hts", q, k) / c.head_dim**0.5
            odds = odds.masked_fill(~seen, float("-inf")).softmax(-1)
            mixed = m.o_proj(torch.einsum("hts,shk->thk", odds, v).flatten(1))
        else:
            kv = convolved(torch.cat((m.k_proj(x), m.v_proj(x)), -1), m.kv_conv)
            k, v = kv.split((m.k_proj.out_features, m.v_proj.out_features), -1)
            q = convolved(m.q_proj(x), m.q_conv)
            heads = c.linear_num_value_heads
            share = heads // c.linear_num_key_heads
            q, k = (t.unflatten(-1, (-1, c.linear_key_head_dim)) for t in (q, k))
            q, k = (t.repeat_interleave(share, 1) for t in (q, k))
            v = v.unflatten(-1, (heads, -1))
            dt = F.softplus(m.a_proj(x) + m.dt_bias)
            decay = torch.exp(-torch.exp(m.A_log) * dt)[..., None, None]
            S, reads = torch.zeros(heads, k.shape[-1], v.shape[-1], dtype=x.dtype), []
            if c.state_space == "gated_deltanet":
                q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
                q, beta = q / c.linear_key_head_dim**0.5, m.b_proj(x).sigmoid()[..., None]
            for t in range(len(h)):
                S = decay[t] * S
                if c.state_space == "gated_deltanet":
                    write = beta[t] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
                else:
                    write = dt[t, :, None] * v[t]
                S = S + k[t, :, :, None] * write[:, None]
                reads.append(torch.einsum("hkv,hk->hv", S, q[t]))
            o = torch.stack(reads)
            if c.state_space == "mamba2":
                o = o + m.skip[:, None] * v
            gate = F.silu(m.g_proj(x)).unflatten(-1, (heads, -1))
            o = F.rms_norm(o, o.shape[-1:], m.o_norm.weight, m.o_norm.eps)
            mixed = m.o_proj((o * gate).flatten(1))
        h = h + mixed
        h = h + layer.mlp(layer.mlp_norm(h))
    return model.lm_head(model.model.norm(h))


@pytest.mark.parametrize(("state_space", "eviction"), halved(STATE_SPACES, EVICTIONS))
def test_depth_one_is_a_plain_hybrid(state_space, eviction):
    for loop, window in product((None, (1, 3)), (1, 4, 9)):
        model = small_model(
            state_space=state_space, eviction=eviction, loop=loop, window=window
        )
        ids = small_ids(2, 23)
        logits = model(ids, sleep_passes=1).logits
        for b in range(2):
            assert gap(logits[b], plain_hybrid(model, ids[b])) <= EXACT
        assert not torch.allclose(logits, model(ids, sleep_passes=2).logits)


def naive_sleep(model, cache: SleepCache, opening: dict, kept: int, depth: int) -> dict:
    """Passes 2..depth written out over whole blocks, nothing left away; state of each layer."""
    backbone, (start, end) = model.model, model.config.loop_range
    rows = cache.batch_size
    counts = cache.counts
    context = backbone.context(
        torch.full((rows,), kept),
        counts,
        kept,
        cache.first_position,
        cache.hidden,
        sleeping=True,
    )
    context = context._replace(keep_tails=True)
    states = dict(cache.states)

    def again(i, h, keep_S):
        start = opening.get(i, LayerState())
        if keep_S and states[i].S is not None:
            start = start._replace(S=states[i].S)
        h, states[i] = backbone.layers[i](h, start, context)
        return h

    h = cache.hidden
    for _ in range(depth - 1):
        for i in range(start, end):
            h = again(i, h, keep_S=True)
    for i in range(end, len(backbone.layers)):
        h = again(i, h, keep_S=False)
    return states


SIZES = [
    {"window": 5},
    {"window": 1},
    {"window": 24, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
     "num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2,
     "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24},
]  # fmt: skip


@pytest.mark.parametrize(
    ("attention", "state_space", "eviction", "size"),
    halved(["causal", "bidirectional"], STATE_SPACES, EVICTIONS, SIZES),
    ids=lambda value: f"window{value['window']}" if isinstance(value, dict) else None,
)
@torch.no_grad()
def test_pruned_sleep_has_the_bits_of_the_naive_one(state_space, eviction, attention, size):
    orders = (
        (["full_attention", "linear_attention"] * 2, (None, (1, 3), (0, 3), (0, 2), (2, 4))),
        (["linear_attention", "full_attention", "full_attention"], (None, (0, 2), (1, 2))),
    )
    for kinds, loops in orders:
        for loop, (depth, batch) in product(loops, ((2, 1), (3, 3))):
            model = small_model(
                layer_types=kinds, loop=loop, eviction=eviction, state_space=state_space,
                sleep_attention=attention, dtype=torch.float32, **size,
            )  # fmt: skip
            window = model.config.window
            ids = small_ids(batch, 2 * window)
            cache = SleepCache(model.config)
            model(ids[:, :window], cache=cache)
            model.sleep(cache, passes=depth)
            opening, kept = dict(cache.states), int(cache.kept[0])
            model(ids[:, window:], cache=cache)
            naive = naive_sleep(model, cache, opening, kept, depth)
            model.sleep(cache, passes=depth)
            for i, kind in enumerate(model.config.layer_types):
                held = cache.states[i]
                if kind == "linear_attention":
                    assert torch.equal(held.S, naive[i].S), (i, loop, depth)
                if eviction == "sliding" and kind == "full_attention" and window > 1:
                    assert held.S is None and len(held.slots) == 2
                    for a, b in zip(held.slots, naive[i].slots, strict=True):
                        assert torch.equal(a, b[:, :, b.shape[2] - (window - 1) :]), (i, loop)
                if eviction == "sliding" and kind == "linear_attention":
                    assert len(held.tails) == 2
                    for a, b in zip(held.tails, naive[i].tails, strict=True):
                        assert torch.equal(a, b), (i, loop)


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_second_sleep_changes_nothing(eviction):
    model = small_model(eviction=eviction, loop=(0, 3))
    cache = model(small_ids(2, 8), sleep_passes=2).cache
    first = model.sleep(cache, passes=3)
    assert (first.rows, first.passes, first.passes_by_row) == ([0, 1], 3, [3, 3])
    before = snapshot(cache)
    second = model.sleep(cache, passes=4)
    assert second.rows == []
    assert_same(before, snapshot(cache))


def test_sleep_before_the_first_token_changes_nothing():
    model = small_model()
    cache = SleepCache(model.config)
    before = snapshot(cache)
    assert model.sleep(cache, passes=3).rows == []
    assert_same(before, snapshot(cache))


@pytest.mark.parametrize(("state_space", "eviction"), [*product(STATE_SPACES, EVICTIONS)])
def test_a_partial_window_sleeps_when_told_to(state_space, eviction):
    """The next token opens a new window; rows with empty windows are left alone."""
    model = small_model(eviction=eviction, state_space=state_space, loop=(1, 3))
    ids, mask = small_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, 3:] = 0
    cache = SleepCache(model.config)
    rows = [Row(5), Row(5)]
    logits = [[], []]
    for part, sleep in ((slice(0, 3), 3), (slice(3, 5), 2), (slice(5, 13), 4)):
        out = model(
            ids[:, part], attention_mask=mask[:, part], cache=cache, sleep_passes=2
        )
        for b in range(2):
            there = mask[b, part].bool()
            rows[b].read(ids[b, part][there].tolist(), 2).sleep(sleep)
            logits[b] += list(out.logits[b, there])
        slept = model.sleep(cache, passes=sleep)
        assert slept.rows == ([0, 1] if part.start == 0 else [0])
    assert cache.sleeps.tolist() == [row.sleeps for row in rows] == [4, 1]
    for b in range(2):
        want = oracle_of(model).read(rows[b].windows)
        assert gap(torch.stack(logits[b]), torch.stack(want.logits)) <= EXACT
        for i, S in want.S.items():
            assert gap(cache.fast_weights[i][b], S) <= EXACT


def steps(model, tokens: list[int], deepest: int) -> list[float]:
    """Relative change of all fast weights from depth j - 1 to j, for j = 2..deepest."""
    states = []
    for depth in range(1, deepest + 1):
        row = Row(model.config.window).read(tokens, 1).sleep(depth)
        S = oracle_of(model).read(row.windows).S
        start, end = model.config.loop_range
        states.append(torch.cat([S[i].flatten() for i in S if start <= i < end]))
    return [((b - a).norm() / a.norm()).item() for a, b in zip(states, states[1:], strict=False)]


def test_auto_stops_each_row_at_its_own_depth():
    model = small_model(window=6, noise=0.3, seed=1)
    ids = small_ids(4, 6, seed=2)
    lengths = [6, 2, 4, 1]
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    curves = [steps(model, ids[b, : lengths[b]].tolist(), 8) for b in range(4)]
    # Between the rows' changes there is a tolerance that they reach at different depths.
    tol = sorted(min(curve[:4]) for curve in curves)[2] * 1.001
    wanted = [next((j for j, x in enumerate(c, 2) if x < tol), 8) for c in curves]
    assert len(set(wanted)) > 1
    cache = model(ids, attention_mask=mask).cache
    report = model.sleep(cache, passes="auto", tol=tol, max_passes=8)
    assert report.passes_by_row == wanted
    assert report.passes == max(wanted)
    for b in range(4):
        row = Row(6).read(ids[b, : lengths[b]].tolist(), 1).sleep(wanted[b])
        want = oracle_of(model).read(row.windows)
        alone = model(ids[b : b + 1, : lengths[b]]).cache
        assert model.sleep(alone, "auto", tol=tol, max_passes=8).passes == wanted[b]
        for i, S in want.S.items():
            assert gap(cache.fast_weights[i][b], S) <= EXACT
            assert gap(alone.fast_weights[i][0], S) <= EXACT


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("loop", [None, (0, 2), (1, 3)])
def test_auto_between_its_limits(eviction, loop):
    model = small_model(loop=loop, eviction=eviction)
    for tol, max_passes, depth in ((1e9, 9, 2), (1e-300, 4, 4), (1e9, 1, 1)):
        cache = model(small_ids(2, 9), sleep_passes=1).cache
        fixed = cache.copy()
        assert model.sleep(cache, "auto", tol=tol, max_passes=max_passes).passes == depth
        model.sleep(fixed, depth)
        for i, S in fixed.fast_weights.items():
            assert gap(cache.fast_weights[i], S) <= EXACT


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention", "linear_attention"], "loop": (0, 1)},
        {"layer_types": ["full_attention"] * 2, "eviction": "sliding"},
    ],
    ids=["written by the coda", "attention alone"],
)
def test_auto_is_refused_where_it_has_nothing_to_watch(changes):
    model = small_model(**changes)
    ids = small_ids(2, 4)
    cache = model(ids).cache
    before = snapshot(cache)
    with pytest.raises(ValueError, match="passes"):
        model.sleep(cache, "auto")
    with pytest.raises(ValueError, match="sleep_passes"):
        model(ids, cache=cache, sleep_passes="auto")
    with pytest.raises(ValueError, match="sleep_passes"):
        model.generate(ids, cache=cache, sleep_passes="auto", max_new_tokens=2)
    assert_same(before, snapshot(cache))


def test_report_says_what_happened():
    model = small_model(window=6)
    ids = small_ids(1, 6)
    cache = model(ids).cache
    before = cache.nbytes()
    report = model.sleep(cache, passes=4)
    assert report.bytes_freed == before - cache.nbytes() > 0
    assert cache.reports == [report]
    assert report.to_dict()["tokens_by_row"] == [6]
    states = []
    for depth in range(1, 5):
        row = Row(6).read(ids[0].tolist(), 1).sleep(depth)
        states.append(oracle_of(model).read(row.windows).S)
    assert report.change.keys() == states[0].keys()
    for i, changes in report.change.items():
        pairs = zip(states, states[1:], strict=False)
        wanted = [((b[i] - a[i]).norm() / a[i].norm()).item() for a, b in pairs]
        assert changes == pytest.approx(wanted, rel=1e-9)
    assert "4 pass(es)" in str(report)


def test_sleeps_on_the_way_are_reported_without_gradients_only():
    model = small_model()
    with torch.no_grad():
        cache = model(small_ids(2, 17), sleep_passes=2).cache
    assert [r.passes for r in cache.reports] == [2, 2, 2]
    assert model(small_ids(2, 17), sleep_passes=2).cache.reports == []
