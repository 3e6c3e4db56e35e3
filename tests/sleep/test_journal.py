"""The slow weights' version, digest, snapshots and rollback."""

from __future__ import annotations

import copy

import pytest
import torch
from small import small_ids, small_model
from torch import nn

from hybrid_sleep import SleepCache
from hybrid_sleep.sleep import weights
from hybrid_sleep.sleep.weights import rollback, snapshot, weights_digest, weights_version


def bits(model) -> dict[str, bytes]:
    return {n: p.detach().numpy().tobytes() for n, p in model.named_parameters()}


@torch.no_grad()
def add(model):
    model.model.layers[1].mlp.up_proj.weight.add_(1)


def replace_parameter(model):
    module = model.model.layers[1].mlp.up_proj
    module.weight = nn.Parameter(torch.zeros_like(module.weight))


def replace_module(model):
    model.model.layers[1].mlp.up_proj = copy.deepcopy(model.model.layers[3].mlp.up_proj)


def step(model):
    ids = small_ids(1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def load(model):
    model.load_state_dict(small_model(seed=1).state_dict())


def bump(model):
    model.bump_weights_version()


CHANGES = [add, replace_parameter, replace_module, step, load, bump]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_another_version_and_ends_a_cache(change):
    model = small_model()
    cache = model(small_ids(1, 3)).cache
    before = weights_version(model)
    assert weights_version(model) == before
    change(model)
    assert weights_version(model) > before
    with pytest.raises(ValueError, match="version"):
        model(small_ids(1, 1), cache=cache)
    model(small_ids(1, 1))
    model(small_ids(1, 1))
    assert weights_version(model) > before


def test_replaced_modules_are_watched_like_those_they_replace():
    model = small_model()
    weights_version(model)
    replace_module(model)
    seen = weights_version(model)
    add(model)
    assert weights_version(model) > seen


def test_a_copy_has_a_journal_of_its_own():
    model = small_model()
    before = weights_version(model)
    twin = copy.deepcopy(model)
    add(twin)
    assert weights_version(model) == before
    assert weights_digest(model) != weights_digest(twin)


def test_the_digest_is_computed_once_a_version(tmp_path, monkeypatch):
    model, count = small_model(), []
    plain = weights._digest

    def counted(tensors, more=""):
        tensors = list(tensors)
        count.append({name for name, _ in tensors})
        return plain(tensors, more)

    monkeypatch.setattr(weights, "_digest", counted)
    cache = model(small_ids(1, 3)).cache
    for place in ("first", "second"):
        cache.save_pretrained(tmp_path / place)
        SleepCache.from_pretrained(tmp_path / place, model=model)
    names = {name for name, _ in model.named_parameters()}
    assert count.count(names) == 1
    before = weights_digest(model)
    add(model)
    assert weights_digest(model) != before and count.count(names) == 2


def test_a_write_that_no_version_tells_of_is_still_another_digest():
    model = small_model()
    before, version = weights_digest(model), weights_version(model)
    for p in model.parameters():
        p.data.mul_(1.5)
    assert weights_version(model) == version
    assert weights_digest(model) != before


def test_rollback_restores_every_bit_and_refuses_the_caches_of_both_times():
    model = small_model()
    with torch.no_grad():
        weight = model.model.layers[0].mixer.q_proj.weight
        weight[0, 0], weight[0, 1], weight[0, 2] = -0.0, 1e-310, float("nan")
    before, digest = bits(model), weights_digest(model)
    old = model(small_ids(1, 3)).cache
    kept, objects = snapshot(model), [*model.parameters()]
    version = weights_version(model)
    step(model)
    new = model(small_ids(1, 3)).cache
    assert bits(model) != before
    assert rollback(model, kept) > version
    assert bits(model) == before and weights_digest(model) == digest
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    for cache in (old, new):
        with pytest.raises(ValueError, match="version"):
            model(small_ids(1, 1), cache=cache)


def test_some_parameters_are_rolled_back_and_the_others_stay():
    model = small_model()
    name = "model.layers.1.mlp.up_proj.weight"
    kept = snapshot(model, [name])
    before = bits(model)
    step(model)
    after = bits(model)
    rollback(model, kept)
    assert bits(model) == after | {name: before[name]}


def test_a_snapshot_that_does_not_fit_changes_nothing():
    model = small_model()
    kept = snapshot(model)
    before, version = bits(model), weights_version(model)
    wider = snapshot(small_model(intermediate_size=11))
    with pytest.raises(ValueError, match=r"mlp.*torch.Size|mlp.*shape \(1[01], 12\)"):
        rollback(model, wider)
    kept.tensors["model.norm.weight"].add_(1)
    with pytest.raises(ValueError, match="snapshot must be as it was taken"):
        rollback(model, kept)
    with pytest.raises(ValueError, match="names must be parameters of the model, got 'nothing'"):
        snapshot(model, ["nothing"])
    assert (bits(model), weights_version(model)) == (before, version)
