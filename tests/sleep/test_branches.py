"""Groups of rows at depths of their own, against the specification and calls of one depth."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from marks import halved
from small import expect, gap, small_ids, small_model

from hybrid_sleep.sleep import branches
from hybrid_sleep.sleep.options import CARRIES, EVICTIONS

EXACT = 1e-10
DEPTHS = (3, 1, 2)
# Two linear layers behind the loop, one of them in front of attention: a coda, and one that writes.
LOOPS = (None, (1, 3), (0, 2))


@pytest.fixture
def shared(monkeypatch):
    """How often groups shared their first window."""
    calls, real = [], branches.branch

    def counted(*args):
        calls.append(args[2])
        return real(*args)

    monkeypatch.setattr("hybrid_sleep.sleep.forward.branch", counted)
    return calls


def groups_of(ids: torch.Tensor, tail: int, count: int = len(DEPTHS)) -> torch.Tensor:
    """`count` times the rows `ids`, the last `tail` columns drawn anew for each group."""
    rows = ids.repeat(count, 1)
    rows[:, -tail:] = small_ids(len(rows), tail, seed=9)
    return rows


def labels_of(rows: torch.Tensor, tail: int) -> torch.Tensor:
    labels = torch.full_like(rows, -100)
    labels[:, -tail:] = rows[:, -tail:]
    return labels


def gradients(model, *calls):
    """The gradients of the summed losses of `calls` (ids, labels, depths), and the logits."""
    model.zero_grad()
    logits = []
    for ids, labels, depths in calls:
        out = model(ids, labels=labels, sleep_passes=depths, num_items_in_batch=1)
        out.loss.backward()
        logits.append(out.logits.detach())
    found = {}
    for name, parameter in model.named_parameters():
        # What a later pass has of its own may have no effect, as where hidden states go nowhere.
        no_effect = parameter.grad is None and name.startswith("model.later_layers.")
        found[name] = torch.zeros_like(parameter) if no_effect else parameter.grad.clone()
    return found, torch.cat(logits)


@pytest.mark.parametrize(
    ("eviction", "carry", "loop", "distinct"), halved(EVICTIONS, CARRIES, LOOPS, (1, 2))
)
@pytest.mark.parametrize("columns", [8, 13])
def test_groups_are_calls_of_one_depth(shared, eviction, carry, loop, distinct, columns):
    model = small_model(
        eviction=eviction, sleep_carry=carry, loop=loop, distinct_passes=distinct
    )
    rows = groups_of(small_ids(2, columns), 3)
    labels = labels_of(rows, 3)
    found, logits = gradients(model, (rows, labels, DEPTHS))
    assert shared == [DEPTHS]
    alone = zip(rows.split(2), labels.split(2), DEPTHS, strict=True)
    wanted, by_depth = gradients(model, *alone)
    assert gap(logits, by_depth) < EXACT
    for name, gradient in wanted.items():
        assert gap(found[name], gradient) < EXACT, name
    for row, depth, logit in zip(rows, (d for d in DEPTHS for _ in range(2)), logits, strict=True):
        # The last window is supervised and no window follows it: all others sleep.
        assert gap(logit, torch.stack(expect(model, row, depth).logits)) < EXACT


@pytest.mark.parametrize("state_space", ["gated_deltanet", "mamba2"])
def test_a_cache_goes_on_as_its_groups(state_space):
    model = small_model(state_space=state_space)
    rows = groups_of(small_ids(2, 7), 2)
    model.train()
    cache = model(rows, sleep_passes=DEPTHS, use_cache=True).cache
    model.eval()
    more = small_ids(6, 9, seed=4)
    with torch.no_grad():
        together = model(more, cache=cache, sleep_passes=DEPTHS).logits
    for row, following, depth, logit in zip(
        rows, more, (d for d in DEPTHS for _ in range(2)), together, strict=True
    ):
        whole = torch.stack(expect(model, torch.cat([row, following]), depth).logits)
        assert gap(logit, whole[7:]) < EXACT
    assert cache.sleeps.tolist() == [3] * 6


def _other_text(model, rows, labels):
    rows[-1, 0] = (rows[-1, 0] + 1) % 11


def _supervised(model, rows, labels):
    labels[:, 2] = rows[:, 2]


def _truncated(model, rows, labels):
    model.set_truncation(passes=1)


def _cut_at_boundaries(model, rows, labels):
    model.set_truncation(windows=1)


def _recomputed(model, rows, labels):
    model.set_activation_checkpointing("window")


@pytest.mark.parametrize(
    "change", [_other_text, _supervised, _truncated, _cut_at_boundaries, _recomputed]
)
def test_what_tells_groups_apart_is_not_shared(shared, change):
    model, rows = small_model(), groups_of(small_ids(2, 12), 3)
    labels = labels_of(rows, 3)
    change(model, rows, labels)
    found, logits = gradients(model, (rows, labels, DEPTHS))
    assert not shared
    wanted, by_depth = gradients(
        model, *zip(rows.split(2), labels.split(2), DEPTHS, strict=True)
    )
    assert gap(logits, by_depth) < EXACT
    assert all(gap(found[name], wanted[name]) < EXACT for name in wanted)


def test_dropout_is_drawn_for_each_group(shared):
    model = small_model(attention_dropout=0.5).train()
    model(groups_of(small_ids(2, 8), 3), sleep_passes=DEPTHS)
    assert not shared
    model.eval()
    model(groups_of(small_ids(2, 8), 3), sleep_passes=DEPTHS)
    assert shared


def test_groups_without_gradients_report_each_sleep():
    model, rows = small_model(), groups_of(small_ids(2, 8), 3)
    with torch.no_grad():
        cache = model(rows, sleep_passes=DEPTHS, use_cache=True).cache
    slept = {N: report.rows for report in cache.reports for N in report.passes_by_row}
    assert slept == {3: [0, 1], 1: [2, 3], 2: [4, 5]}


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ((1, 2), r"sleep_passes must be a depth, or a tuple whose length divides the 3 rows"),
        ((), r"sleep_passes must be .* got \(\)"),
        ((1, 0, 2), r"sleep_passes\[1\] must be an integer of at least 1, got 0"),
        ((1, 2, "auto"), r"sleep_passes\[2\] must be an integer of at least 1, got 'auto'"),
    ],
)
def test_depths_that_fit_no_groups(depths, message):
    with pytest.raises(ValueError, match=message):
        small_model()(small_ids(3, 4), sleep_passes=depths)


def test_documents_take_one_depth():
    with pytest.raises(ValueError, match="sleep_passes must be one depth where rows hold several"):
        ids = small_ids(2, 6)
        small_model()(ids, document_ids=torch.zeros_like(ids), sleep_passes=(1, 2))


def test_a_shallow_group_does_not_feel_a_deeper_one():
    """What depth 1 leaves is what a batch that never slept deeper has, in any order of groups."""
    model, ids = small_model(), small_ids(2, 8)
    for order in product((1, 3), repeat=2):
        rows = groups_of(ids, 3, count=2)
        logits = model(rows, sleep_passes=order).logits
        depths = (depth for depth in order for _ in range(2))
        for row, depth, logit in zip(rows, depths, logits, strict=True):
            assert gap(logit, torch.stack(expect(model, row, depth).logits)) < EXACT
