"""Loss by position and depth, against one token at a time in plain Python."""

import math

import pytest
import torch

from hybrid_sleep.training import losses
from hybrid_sleep.training.losses import LossByPosition

B, T, V = 4, 23, 7
DEPTHS = (1, 2, 4)


def batch(seed):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=random) * 3
    labels = torch.randint(0, V, (B, T), generator=random)
    labels[torch.rand(B, T, generator=random) < 0.3] = -100
    mask = (torch.rand(B, T, generator=random) < 0.8).long()
    mask[0] = 1
    mask[1, :9] = 0
    mask[2] = 0
    ids = (torch.rand(B, T, generator=random) < 0.2).long().cumsum(1)
    ids[3, 4:6] = -1
    positions = torch.randint(0, 60, (B, 1), generator=random) + torch.arange(T)
    return logits, labels, {"attention_mask": mask, "document_ids": ids, "positions": positions}


def token_by_token(entries, bins):
    """The summary of `entries`, (logits, labels, window, depth, the rest), from its meaning."""
    by_bin, by_depth = [[] for _ in range(bins)], {depth: [] for depth in DEPTHS}
    for logits, labels, window, depth, given in entries:
        for row in range(B):
            before, index = None, 0
            for t in range(T):
                ids = given.get("document_ids")
                pad = "attention_mask" in given and not given["attention_mask"][row, t]
                if pad or (ids is not None and ids[row, t] == -1):
                    # A pad ends a document, but not a row.
                    before, index = (before, index) if ids is None else (None, 0)
                    continue
                if ids is not None and before is not None and ids[row, t] != ids[row, before]:
                    before, index = None, 0
                place = index if "positions" not in given else int(given["positions"][row, t])
                label = int(labels[row, t])
                if before is not None and label != -100:
                    scores = logits[row, before].tolist()
                    loss = math.log(sum(math.exp(x) for x in scores)) - scores[label]
                    by_bin[math.floor((place % window) / window * bins + 1e-9)].append(loss)
                    by_depth[depth].append(loss)
                before, index = t, index + 1
    mean = lambda found: sum(found) / len(found) if found else None  # noqa: E731
    return {
        "loss_by_position": [mean(found) for found in by_bin],
        "loss_by_depth": {depth: mean(found) for depth, found in by_depth.items()},
    }


def assert_same(found, expected):
    assert list(found["loss_by_depth"]) == list(expected["loss_by_depth"])
    found, expected = (
        [*summary["loss_by_position"], *summary["loss_by_depth"].values()]
        for summary in (found, expected)
    )
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == (other if other is None else pytest.approx(other, rel=1e-5))


@pytest.mark.parametrize("chunk", [None, 1, 5 * V])
@pytest.mark.parametrize(
    "names",
    [
        (),
        ("attention_mask",),
        ("document_ids",),
        ("attention_mask", "document_ids"),
        ("attention_mask", "document_ids", "positions"),
        ("positions",),
    ],
)
def test_sums_are_those_of_single_tokens(monkeypatch, names, chunk):
    if chunk is not None:
        monkeypatch.setattr(losses, "CHUNK", chunk)
    for bins, windows in ((3, (6, 9)), (4, (5, 2)), (1, (3, 50))):
        counted, entries = LossByPosition(DEPTHS, bins=bins), []
        for seed, (window, depth) in enumerate(zip(windows, (1, 4), strict=True)):
            logits, labels, given = batch(seed)
            given = {name: given[name] for name in names}
            counted.add(logits, labels, window, depth=depth, **given)
            entries.append((logits, labels, window, depth, given))
        found = counted.summary()
        assert_same(found, token_by_token(entries, bins))
        assert found["loss_by_depth"][2] is None


def test_groups_of_rows_count_at_their_own_depths():
    logits, labels, given = batch(3)
    together, apart = LossByPosition(DEPTHS, 4), LossByPosition(DEPTHS, 4)
    mask = given["attention_mask"]
    together.add(logits, labels, 8, depth=(4, 1), attention_mask=mask)
    for depth, rows in ((4, slice(2)), (1, slice(2, 4))):
        apart.add(logits[rows], labels[rows], 8, depth=depth, attention_mask=mask[rows])
    torch.testing.assert_close(together.tensor(), apart.tensor())
    assert together.tensor()[1].sum(1).count_nonzero() == 2


def test_a_padded_row_counts_as_it_does_alone():
    logits, labels, _ = batch(5)
    alone, padded = LossByPosition([2], bins=4), LossByPosition([2], bins=4)
    alone.add(logits[:1, :15], labels[:1, :15], 6, depth=2)
    places = torch.tensor([0, 1, 4, 5, 6, 8, 9, 10, 11, 15, 16, 17, 18, 20, 21])
    mask = torch.zeros(1, T, dtype=torch.long)
    mask[:, places] = 1
    spread_logits, spread_labels = torch.randn(1, T, V), torch.randint(0, V, (1, T))
    spread_logits[:, places], spread_labels[:, places] = logits[:1, :15], labels[:1, :15]
    padded.add(spread_logits, spread_labels, 6, depth=2, attention_mask=mask)
    torch.testing.assert_close(padded.tensor(), alone.tensor(), rtol=1e-12, atol=0)


def test_tables_of_ranks_add_up_and_reset_forgets():
    parts = [LossByPosition(DEPTHS) for _ in range(2)]
    whole = LossByPosition(DEPTHS)
    for seed, part in enumerate(parts):
        logits, labels, _ = batch(seed)
        part.add(logits, labels, 8, depth=DEPTHS[seed])
        whole.add(logits, labels, 8, depth=DEPTHS[seed])
    before = parts[0].tensor()
    pooled = LossByPosition(DEPTHS)
    pooled.load(before + parts[1].tensor())
    assert_same(pooled.summary(), whole.summary())
    assert torch.equal(parts[0].tensor(), before)
    pooled.reset()
    assert pooled.summary() == {
        "loss_by_position": [None] * 8,
        "loss_by_depth": dict.fromkeys(DEPTHS),
    }


def test_nothing_supervised_counts_nothing_and_gradients_are_left_alone():
    counted = LossByPosition([1])
    logits = torch.randn(B, T, V, requires_grad=True)
    counted.add(logits, torch.full((B, T), -100), 8, depth=1)
    assert float(counted.tensor().sum()) == 0
    counted.add(logits.bfloat16(), torch.zeros(B, T, dtype=torch.long), 8, depth=1)
    assert not counted.tensor().requires_grad
    assert int(counted.tensor()[1].sum()) == B * (T - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "depth must be one of 1, 2, 4, or .*, got 3"),
        ({"depth": (1, 3)}, r"depth must be one of 1, 2, 4, or one .*, got \(1, 3\)"),
        ({"depth": (1, 2, 4)}, r"one for each group of 4 rows, got \(1, 2, 4\)"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        (
            {"labels": torch.zeros(B, T - 1)},
            r"labels must have the shape of the logits, \(4, 23\), got \(4, 22\)",
        ),
        ({"document_ids": torch.zeros(T)}, "document_ids must have the shape of the logits"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    logits, labels, _ = batch(0)
    counted = LossByPosition(DEPTHS)
    with pytest.raises(ValueError, match=message):
        counted.add(**{"logits": logits, "labels": labels, "window": 8, "depth": 1, **change})
    assert float(counted.tensor().sum()) == 0
    with pytest.raises(ValueError, match="table must have shape \\(2, 3, 8\\), got \\(2, 3\\)"):
        counted.load(torch.zeros(2, 3))
