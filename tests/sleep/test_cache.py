"""Rows of a cache can be picked, repeated and copied, and it does not grow."""

from __future__ import annotations

import pytest
import torch
from marks import halved
from small import assert_same, fields_of, gap, small_ids, small_model, snapshot

from hybrid_sleep import SleepCache
from hybrid_sleep.configuration import STATE_SPACES
from hybrid_sleep.sleep.options import EVICTIONS

EXACT = 1e-10
LENGTHS = (13, 4, 8)


def ragged(model):
    ids = small_ids(3, 13)
    mask = (torch.arange(13) < torch.tensor(LENGTHS)[:, None]).long()
    with torch.no_grad():
        return ids, model(ids, attention_mask=mask, sleep_passes=2).cache


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.copy(), [0, 1, 2]),
    ],
    ids=["select", "select one", "reorder", "repeat", "copy"],
)
def test_picked_rows_go_on_as_they_would_have(eviction, change, rows):
    model = small_model(eviction=eviction, loop=(0, 3))
    ids, cache = ragged(model)
    change(cache)
    assert cache.batch_size == len(rows)
    new = small_ids(len(rows), 9, seed=5)
    with torch.no_grad():
        out = model(new, cache=cache, sleep_passes=2)
    for place, row in enumerate(rows):
        whole = torch.cat((ids[row, : LENGTHS[row]], new[place]))[None]
        alone = model(whole, sleep_passes=2)
        assert gap(out.logits[place], alone.logits[0, LENGTHS[row] :]) <= EXACT
        assert cache.sleeps[place] == alone.cache.sleeps[0]
        for i, S in alone.cache.fast_weights.items():
            assert gap(cache.fast_weights[i][place], S[0]) <= EXACT


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_copies_go_their_own_ways(eviction):
    model = small_model(eviction=eviction, loop=(1, 3))
    _, cache = ragged(model)
    twin = cache.copy()
    before = snapshot(cache)
    assert_same(before, snapshot(twin))
    with torch.no_grad():
        model(small_ids(3, 9), cache=twin, sleep_passes=3)
    model.sleep(twin, passes=2)
    twin.batch_repeat_interleave(2)
    assert_same(before, snapshot(cache))
    ahead = snapshot(twin)
    model.sleep(cache, passes=2)
    cache.reset()
    assert_same(ahead, snapshot(twin))


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_reset_makes_it_new(eviction):
    model = small_model(eviction=eviction, loop=(1, 3))
    _, cache = ragged(model)
    cache.reset()
    assert cache.batch_size == -1
    assert cache.nbytes() == 0
    assert cache.get_seq_length() == 0
    assert_same(snapshot(SleepCache(model.config)), snapshot(cache))
    ids = small_ids(1, 12)
    again = model(ids, cache=cache, sleep_passes=2).logits
    assert torch.equal(again, model(ids, sleep_passes=2).logits)


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("loop", [None, (1, 3)])
def test_it_does_not_grow_with_what_was_read(eviction, loop):
    model = small_model(eviction=eviction, loop=loop, window=4)
    cache = SleepCache(model.config)
    sizes = []
    with torch.no_grad():
        for _ in range(40):
            size = []
            for _ in range(4):
                model(small_ids(2, 1), cache=cache, sleep_passes=2)
                size.append(cache.nbytes())
            sizes.append(size)
    assert cache.sleeps.tolist() == [39, 39]
    assert sizes[2] == sizes[10] == sizes[39]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(cache)}
    assert sum(held.values()) <= 2 * cache.nbytes()


def tensors(cache: SleepCache) -> list[torch.Tensor]:
    states = [*cache.states.values(), *cache.opening.values()]
    found = [x for state in states for x in (state.S, *state.tails, *state.slots)]
    return [x for x in (*found, cache.hidden) if x is not None]


def test_bytes_are_those_of_the_tensors():
    model = small_model(eviction="sliding", loop=(1, 3))
    _, cache = ragged(model)
    assert cache.nbytes() == sum(x.numel() * x.element_size() for x in tensors(cache))
    assert model.config.fast_weight_bytes == 2 * 2 * 4 * 3 * 4


def test_tokens_cannot_be_taken_back():
    model = small_model()
    _, cache = ragged(model)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(3)
    assert_same(before, snapshot(cache))
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize(("state_space", "eviction"), halved(STATE_SPACES, EVICTIONS))
def test_rows_that_are_split_hold_what_they_would_alone(eviction, state_space):
    model = small_model(eviction=eviction, state_space=state_space, loop=(0, 3))
    ids, cache = ragged(model)
    cache.finished = torch.tensor([True, False, False])
    parts = cache.split()
    assert [part.batch_size for part in parts] == [1, 1, 1]
    for row, part in enumerate(parts):
        with torch.no_grad():
            alone = model(ids[row : row + 1, : LENGTHS[row]], sleep_passes=2).cache
        want, held = snapshot(alone), snapshot(part)
        # Zeros that a row has only because its neighbours needed them are nothing.
        held = {k: x for k, x in held.items() if k in want or bool(x.any())}
        assert held.keys() == want.keys()
        for name in want.keys() - {"columns", "reports"}:
            if want[name] is None or want[name].dtype in (torch.long, torch.bool):
                assert held[name] is want[name] or torch.equal(held[name], want[name]), name
            else:
                assert gap(held[name], want[name]) <= EXACT, name
        assert part.nbytes() <= alone.nbytes() + sum(
            x.nbytes for name, x in snapshot(part).items() if name not in want
        )
        assert part.reports == [] and part.finished is None
    twice = cache.split([2, 1])
    assert [part.counts.tolist() for part in twice] == [
        cache.counts[:2].tolist(), cache.counts[2:].tolist(),
    ]  # fmt: skip


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_caches_that_are_joined_go_on_as_each_alone(eviction):
    model = small_model(eviction=eviction, loop=(0, 3))
    texts = [small_ids(1, n, seed=n) for n in (3, 13, 5, 1)]
    with torch.no_grad():
        caches = [model(text, sleep_passes=2).cache for text in texts]
    fresh, joined = SleepCache(model.config), SleepCache.join(caches)
    assert joined.batch_size == 4 and joined.columns == 13
    assert joined.sleeps.tolist() == [0, 2, 0, 0]
    assert SleepCache.join([fresh]).batch_size == -1
    more = small_ids(4, 9, seed=7)
    with torch.no_grad():
        model.sleep(joined, passes=3)
        out = model(more, cache=joined, sleep_passes=3)
    for row, cache in enumerate(caches):
        with torch.no_grad():
            model.sleep(cache, passes=3)
            alone = model(more[row : row + 1], cache=cache, sleep_passes=3)
        assert gap(out.logits[row], alone.logits[0]) <= EXACT
        for i, S in cache.fast_weights.items():
            assert gap(joined.fast_weights[i][row], S[0]) <= EXACT
        assert torch.equal(joined.history.folded().whole[row], cache.history.folded().whole[0])
    again = SleepCache.join(joined.split([1, 2, 1]))
    assert_same(snapshot(joined) | {"columns": 0, "reports": 0},
                snapshot(again) | {"columns": 0, "reports": 0})  # fmt: skip


def test_caches_that_do_not_belong_together_are_not_joined():
    model, other = small_model(), small_model(seed=1)
    cache = model(small_ids(1, 3)).cache
    with pytest.raises(ValueError, match="at least one SleepCache, got none"):
        SleepCache.join([])
    with pytest.raises(ValueError, match=r"caches\[1\] must be of the same model and weights"):
        SleepCache.join([cache, other(small_ids(1, 3)).cache])
    with pytest.raises(ValueError, match=r"caches\[1\] must be of the same options"):
        SleepCache.join([cache, SleepCache(small_model(window=4).config)])
    for sizes in ([2], [0, 1], []):
        with pytest.raises(ValueError, match="sizes must be at least 1 each and 1 in all"):
            cache.split(sizes)


def test_a_transaction_that_fails_leaves_no_trace():
    model = small_model(loop=(0, 3))
    _, cache = ragged(model)
    before = snapshot(cache)
    with pytest.raises(KeyboardInterrupt), cache.transaction():
        model.sleep(cache, passes=2)
        cache.batch_select_indices(torch.tensor([1]))
        raise KeyboardInterrupt
    assert_same(before, snapshot(cache))
    with cache.transaction():
        cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_rows_are_renewed_for_other_texts(eviction):
    """A new text in a used row is what it is in a new cache, and the rows beside it go on."""
    model = small_model(eviction=eviction, loop=(1, 3))
    cache, others = SleepCache(model.config), SleepCache(model.config)
    old, more, new = small_ids(3, 13), small_ids(3, 6, seed=1), small_ids(3, 9, seed=2)
    here = torch.tensor([1])
    with torch.no_grad():
        model(old, cache=cache, sleep_passes=3)
        model(old, cache=others, sleep_passes=3)
        cache.renew(here)
        held = [x for state in cache.states.values() for x in fields_of(state).values()]
        for x in (*held, cache.hidden, *cache.history.folded()[:2]):
            assert not bool(x[1].any()) and bool(x[0].any())
        assert cache.counts[1] == cache.positions[1] == cache.sleeps[1] == 0
        # The new prompt alone, then all rows token by token.
        mask = torch.zeros(3, 9, dtype=torch.long)
        mask[1] = 1
        model(new, attention_mask=mask, cache=cache, sleep_passes=3)
        for t in range(6):
            out = model(more[:, t : t + 1], cache=cache, sleep_passes=3)
        assert cache.decoding == "in place"
        kept = [model(more, cache=others, sleep_passes=3).logits[b, -1] for b in range(1)]
        alone = model(torch.cat((new, more), 1), sleep_passes=3)
    assert gap(out.logits[0, -1], kept[0]) <= EXACT
    assert gap(out.logits[1, -1], alone.logits[1, -1]) <= EXACT
    for i, S in alone.cache.fast_weights.items():
        assert gap(cache.fast_weights[i][1], S[1]) <= EXACT
        assert gap(cache.fast_weights[i][2], others.fast_weights[i][2]) <= EXACT


@pytest.mark.parametrize("rows", [[3], [1, 0], [1, 1], [-1]])
def test_what_is_no_row_is_not_renewed(rows):
    model = small_model()
    cache = model(small_ids(3, 4)).cache
    before = snapshot(cache)
    with pytest.raises(ValueError, match="rows must be ascending indices below 3"):
        cache.renew(torch.tensor(rows))
    assert_same(before, snapshot(cache))
