"""Several documents in a row: each is read, and learned from, as if it were alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import halved
from small import gap, small_ids, small_model

from hybrid_sleep import SleepCache
from hybrid_sleep.configuration import STATE_SPACES
from hybrid_sleep.sleep.documents import Documents, find_documents, positions_in_document
from hybrid_sleep.sleep.options import EVICTIONS, SCHEDULES

EXACT = 1e-10


def runs(document_ids: list[list[int]]) -> list[tuple[int, int, int]]:
    """Row, first column and length of each document, by walking along the rows."""
    found = []
    for b, row in enumerate(document_ids):
        before = -1
        for t, one in enumerate(row):
            if one != -1 and one == before:
                found[-1][2] += 1
            elif one != -1:
                found.append([b, t, 1])
            before = one
    return [tuple(one) for one in found]


def pack(lengths: list[list[int]], columns: int, gap_before: int = 0) -> torch.Tensor:
    """Rows of documents of the given lengths, each with pads before it, filled up with pads."""
    rows = []
    for row in lengths:
        ids = [x for i, n in enumerate(row) for x in [-1] * gap_before + [i] * n]
        rows.append(ids + [-1] * (columns - len(ids)))
    return torch.tensor(rows)


def alone(model, ids, where, labels=None, **how):
    """The outputs of each document in a call of its own."""
    outputs = []
    for b, start, length in where:
        part = slice(start, start + length)
        given = None if labels is None else labels[b : b + 1, part]
        outputs.append(model(ids[b : b + 1, part], labels=given, use_cache=True, **how))
    return outputs


@st.composite
def packed(draw):
    """Document ids with pads and repeated ids anywhere."""
    columns = draw(st.integers(1, 17))
    pieces = st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 8)))
    rows = [
        [x for x, n in draw(pieces) for _ in range(n)] for _ in range(draw(st.integers(1, 3)))
    ]
    return torch.tensor([(row + [-1] * columns)[:columns] for row in rows])


@given(packed(), st.data())
@settings(max_examples=15)
def test_documents_do_not_know_of_each_other(document_ids, data):
    model = small_model(
        layer_types=["full_attention", "linear_attention", "linear_attention"],
        loop=data.draw(st.sampled_from([None, (0, 2), (1, 2)])),
        eviction=data.draw(st.sampled_from(EVICTIONS)),
        state_space=data.draw(st.sampled_from(STATE_SPACES)),
        window=data.draw(st.integers(1, 6)),
    )
    ids = small_ids(*document_ids.shape, seed=data.draw(st.integers(0, 1000)))
    depth = data.draw(st.integers(1, 3))
    where = runs(document_ids.tolist())
    wanted = alone(model, ids, where, sleep_passes=depth)
    grouped = model(ids, document_ids=document_ids, sleep_passes=depth)
    together = model(ids, document_ids=document_ids, sleep_passes=depth, use_cache=True)
    assert grouped.cache is None
    cache = together.cache
    assert len(cache.counts) == len(where)
    for m, (b, start, length) in enumerate(where):
        for out in (grouped, together):
            assert gap(out.logits[b, start : start + length], wanted[m].logits[0]) <= EXACT
        theirs = wanted[m].cache
        for name in ("counts", "positions", "sleeps"):
            assert getattr(cache, name)[m] == getattr(theirs, name)[0]
        for i, S in theirs.fast_weights.items():
            assert gap(cache.fast_weights[i][m], S[0]) <= EXACT
    assert not grouped.logits[document_ids == -1].any()
    assert not together.logits[document_ids == -1].any()


LENGTHS = [[7, 1, 12, 3], [16, 2], [5, 5, 6]]


@pytest.mark.parametrize(("schedule", "eviction"), halved(SCHEDULES, EVICTIONS))
def test_the_loss_and_its_gradients_are_those_of_the_documents(eviction, schedule):
    """Every option that changes how gradients are computed included; labels stay inside."""
    document_ids = pack([[7, 1, 4], [11, 2]], 14)
    ids = small_ids(2, 14)
    labels = ids.clone()
    labels[:, ::3] = -100
    labels[1, :6] = -100
    model = small_model(eviction=eviction, sleep_schedule=schedule, loop=(0, 3)).train()
    where = runs(document_ids.tolist())
    for granularity, cuts in ((None, (None, None)), (("window", 2), (2, 1))):
        model.set_activation_checkpointing(granularity)
        model.set_truncation(*cuts)
        results = []
        for whole in (True, False):
            model.zero_grad()
            how = {"sleep_passes": 3, "num_items_in_batch": 1}
            if whole:
                loss = model(ids, labels=labels, document_ids=document_ids, **how).loss
            else:
                loss = sum(out.loss for out in alone(model, ids, where, labels, **how))
            loss.backward()
            results.append((loss, [p.grad.clone() for p in model.parameters()]))
        (loss, grads), (wanted, theirs) = results
        # transformers computes every loss in fp32, so each document's gradient is rounded to that.
        assert gap(loss, wanted) <= 1e-6
        assert max(gap(a, b) for a, b in zip(grads, theirs, strict=True)) <= 1e-6
        logits = model(ids, labels=labels, document_ids=document_ids, sleep_passes=3).logits
        apart = alone(model, ids, where, labels, sleep_passes=3)
        weigh = torch.randn_like(logits)
        one = torch.autograd.grad((logits * weigh).sum(), [*model.parameters()])
        total = sum(
            (out.logits[0] * weigh[b, start : start + length]).sum()
            for out, (b, start, length) in zip(apart, where, strict=True)
        )
        other = torch.autograd.grad(total, [*model.parameters()])
        assert max(gap(a, b) for a, b in zip(one, other, strict=True)) <= EXACT


def test_the_loss_is_the_mean_over_what_documents_predict():
    """By hand: the first token of a document is predicted by nothing, whatever stands before it."""
    model = small_model(sleep_schedule="every_window")
    document_ids = pack(LENGTHS, 28, gap_before=1)
    ids = small_ids(3, 28)
    out = model(ids, labels=ids, document_ids=document_ids, sleep_passes=2)
    losses = [
        -torch.log_softmax(out.logits[b, t], 0)[ids[b, t + 1]]
        for b, start, length in runs(document_ids.tolist())
        for t in range(start, start + length - 1)
    ]
    assert len(losses) == sum(map(sum, LENGTHS)) - sum(map(len, LENGTHS))
    assert gap(out.loss, sum(losses) / len(losses)) <= 1e-6


def test_single_precision():
    model = small_model(dtype=torch.float32, noise=0.1)
    document_ids = pack(LENGTHS, 25)
    ids = small_ids(3, 25)
    out = model(ids, document_ids=document_ids, sleep_passes=3, use_cache=True)
    where = runs(document_ids.tolist())
    for m, ((b, start, length), one) in enumerate(
        zip(where, alone(model, ids, where, sleep_passes=3), strict=True)
    ):
        assert gap(out.logits[b, start : start + length], one.logits[0]) <= 1e-4
        for i, S in one.cache.fast_weights.items():
            assert gap(out.cache.fast_weights[i][m], S[0]) <= 1e-4


def test_embeddings_masks_and_last_columns():
    """Pads by mask are pads by id; embeddings are as good as ids; only some logits are as good."""
    model = small_model(window=3)
    document_ids = pack(LENGTHS, 28, gap_before=1)
    ids = small_ids(3, 28)
    wanted = model(ids, document_ids=document_ids, sleep_passes=2).logits
    mask = (document_ids != -1).long()
    filled = document_ids.where(mask.bool(), 0)
    masked = model(ids, attention_mask=mask, document_ids=filled, sleep_passes=2)
    assert torch.equal(masked.logits, wanted)
    embeds = model.model.embed_tokens(ids)
    embedded = model(inputs_embeds=embeds, document_ids=document_ids, sleep_passes=2)
    assert torch.equal(embedded.logits, wanted)
    last = model(ids, document_ids=document_ids, sleep_passes=2, logits_to_keep=4).logits
    assert gap(last, wanted[:, -4:]) <= EXACT
    # The fast weights of one document are a memory like any other.
    cache = model(ids, document_ids=document_ids, sleep_passes=2, use_cache=True).cache
    cache.batch_select_indices(torch.tensor([4]))
    more = small_ids(1, 5, seed=1)
    text = torch.cat((ids[1:2, 1:17], more), dim=1)
    whole = model(text, sleep_passes=2).logits[:, 16:]
    assert gap(model(more, cache=cache, sleep_passes=2).logits, whole) <= EXACT


def test_only_pads():
    model = small_model()
    for use_cache in (True, False):
        out = model(small_ids(2, 3), document_ids=torch.full((2, 3), -1), use_cache=use_cache)
        assert not out.logits.any() and out.logits.shape == (2, 3, 11)


def test_short_documents_do_not_wait_for_a_long_one():
    """What the blocks read is at most a third more than there is, windows and sleeps together."""
    model = small_model(window=4)
    lengths = [[37, 3], [1, 2, 5, 4, 6, 12, 3, 7], [8, 8, 8, 8, 8]]
    document_ids = pack(lengths, 40)
    read = []
    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[:2].numel()))
    model(small_ids(3, 40), document_ids=document_ids, sleep_passes=3)
    tokens = sum(map(sum, lengths))
    # A sleep reads full windows only: behind a text of n tokens there are (n - 1) // 4 of them.
    sleeps = sum(2 * 4 * ((n - 1) // 4) for row in lengths for n in row)
    assert tokens + sleeps <= sum(read) <= tokens * 4 / 3 + sleeps


@given(st.lists(st.integers(1, 3000), max_size=60))
def test_groups_waste_at_most_a_third(lengths):
    length = torch.tensor(lengths, dtype=torch.long)
    groups = list(Documents(torch.zeros_like(length), torch.zeros_like(length), length).by_length())
    assert sorted(i for group in groups for i in group.tolist()) == list(range(len(lengths)))
    for group in groups:
        assert group.tolist() == sorted(group.tolist())
        assert 3 * len(group) * int(length[group].max()) <= 4 * int(length[group].sum())
    if lengths:
        assert len(groups) <= 1 + math.log(max(lengths)) / math.log(4 / 3)


@given(packed(), st.data())
def test_layout_against_a_walk_along_the_rows(document_ids, data):
    bits = st.lists(st.integers(0, 1), min_size=document_ids.numel(), max_size=document_ids.numel())
    mask = torch.tensor(data.draw(bits)).view(document_ids.shape)
    for keep in (None, mask):
        ids = document_ids if keep is None else document_ids.where(keep.bool(), -1)
        where = runs(ids.tolist())
        found = find_documents(document_ids, keep)
        found = (found.row.tolist(), found.start.tolist(), found.length.tolist())
        assert [*zip(*found, strict=True)] == where
        wanted = torch.full_like(ids, -1)
        for b, start, length in where:
            wanted[b, start : start + length] = torch.arange(length)
        assert torch.equal(positions_in_document(document_ids, keep), wanted)


def test_what_cannot_be_packed_is_refused():
    model = small_model()
    ids = small_ids(2, 6)
    whole = torch.zeros_like(ids)
    cache = SleepCache(model.config)
    refused = [
        (r"document_ids starts each .* cache must be None", whole, cache),
        (r"document_ids must be of the input's shape, \(2, 6\), got \(2, 5\)", whole[:, 1:], None),
        ("document_ids must be integers", whole.double(), None),
        ("document_ids must be integers", whole.bool(), None),
        ("document_ids must be at least 0, or -1 at pads, got -2", whole - 2, None),
    ]
    for message, document_ids, past in refused:
        with pytest.raises(ValueError, match=message):
            model(ids, document_ids=document_ids, cache=past)
        with pytest.raises(ValueError, match=message):
            model(ids, labels=ids, document_ids=document_ids, cache=past)
    assert not cache.is_initialized
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 6\]"):
        positions_in_document(whole, torch.ones(2, 5))
