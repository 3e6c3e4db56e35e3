"""A stand-in for CUDA graphs: recorded steps run again over the same buffers.

It is as strict in what matters: a replay runs the function of the sleep that was recorded, so
whatever that reads beside the plan's buffers is an earlier sleep's, and has been overwritten with
NaN by then.
"""

from __future__ import annotations

import pytest
import torch
from small import assert_same, gap, small_ids, snapshot

from hybrid_sleep import SleepCache
from hybrid_sleep.sleep.execution import SleepEngine
from hybrid_sleep.sleep.trees import map_tensors

FIRST = "eager: first sleep of this shape, the next one is captured"
PATHS = [FIRST, "recorded: captured", "recorded: replayed", "recorded: replayed"]


class Recorder:
    """Records a function by keeping it, and replays it by calling it."""

    label = "recorded"
    made = 0

    def __init__(self, device):
        type(self).made += 1

    @staticmethod
    def refuses(device):
        return None

    @staticmethod
    def stream(device):
        return None

    def __call__(self, work):
        work()
        return work


def engine_of(model) -> SleepEngine:
    model.model.engine = SleepEngine(Recorder)
    return model.model.engine


def spoil(tree) -> None:
    """Overwrite every float of a tree with NaN."""
    map_tensors(lambda x: x.fill_(float("nan")) if x.is_floating_point() else x, tree)


def spoil_cache(cache: SleepCache) -> None:
    spoil(tuple(cache.tensors()))


def own(cache: SleepCache) -> SleepCache:
    """A copy that shares no tensor."""
    twin = cache.copy()
    twin._each(torch.Tensor.clone)
    return twin


def plain(report) -> dict:
    told = report.to_dict()
    return {k: v for k, v in told.items() if k not in ("path", "seconds", "change", "time")}


def read(model, lengths: list[int], seed: int) -> SleepCache:
    """Rows of the given lengths, left-padded; full windows on the way only evict."""
    longest = max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    ids = small_ids(len(lengths), longest, seed=seed)
    return model(ids, attention_mask=mask.long(), sleep_passes=1).cache


def sleep_both_ways(model, engine, cache, exact=True, **how) -> str:
    """Sleep with and without the engine, compare all that is left, and say the engine's path."""
    eager, mine = own(cache), own(cache)
    model.model.engine = None
    wanted = model.sleep(eager, **how)
    model.model.engine = engine
    source = mine.copy()
    told = model.sleep(mine, **how)
    assert_same(snapshot(cache), snapshot(source))
    assert wanted.path in ("eager: turned off", "eager: only one pass", "")
    assert plain(told) == plain(wanted)
    assert told.change.keys() == wanted.change.keys()
    left, right = snapshot(mine), snapshot(eager)
    if exact:
        assert told.change == wanted.change
        assert_same(left, right)
    else:
        assert left.keys() == right.keys()
        for name, value in right.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                assert gap(left[name], value) <= 1e-12, name
            elif isinstance(value, torch.Tensor):
                assert torch.equal(left[name], value), name
        for layer, changes in wanted.change.items():
            assert told.change[layer] == pytest.approx(changes, rel=1e-9)
    before = snapshot(mine)
    for plan in engine.plans.values():
        spoil(plan.carry._replace(context=()))
    assert_same(before, snapshot(mine))
    spoil_cache(source)
    spoil_cache(mine)
    return told.path
