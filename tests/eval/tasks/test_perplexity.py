"""Perplexity against a loop over single documents."""

import math

import pytest
import torch
from small import small_config, small_ids, small_model

from hybrid_sleep.eval.tasks.perplexity import measure_perplexity
from hybrid_sleep.training.text.tokenizer import FIRST_BYTE, load_tokenizer

WINDOW = 5


@pytest.fixture(scope="module")
def model():
    return small_model(small_config(vocab_size=259, sleep_schedule="every_window"))


def rows():
    """Two rows of documents of 7, 1, 4, 60 tokens and of 29, 3, pads: the documents, the batch."""
    lengths = [[7, 1, 4, 60], [29, 3]]
    documents = [
        [small_ids(n, seed=10 * i + j, vocab=259) for j, n in enumerate(row)]
        for i, row in enumerate(lengths)
    ]
    ids = torch.zeros(2, 72, dtype=torch.long)
    numbers = torch.full((2, 72), -1)
    for i, row in enumerate(documents):
        whole = torch.cat(row)
        ids[i, : len(whole)] = whole
        numbers[i, : len(whole)] = torch.cat([torch.full((len(d),), j) for j, d in enumerate(row)])
    return [d for row in documents for d in row], {"input_ids": ids, "document_ids": numbers}


def by_hand(model, documents, depth):
    """(place of the predicting token, loss, whether a byte is predicted) of every prediction."""
    found = []
    for ids in documents:
        with torch.no_grad():
            logits = model(input_ids=ids[None], sleep_passes=depth, use_cache=False).logits[0]
        for place in range(len(ids) - 1):
            wanted = int(ids[place + 1])
            loss = -logits[place].log_softmax(-1)[wanted].item()
            found.append((place, loss, wanted >= 3))
    return found


def mean(losses):
    return sum(losses) / len(losses)


@pytest.mark.parametrize("packed", [True, False])
def test_perplexity_is_that_of_every_document_alone(model, packed):
    documents, batch = rows()
    if packed:
        batches = [batch]
    else:
        batches = [{"input_ids": ids[None]} for ids in documents]
    model.train()
    measured = measure_perplexity(model, batches, [3, 1], bytes_from=FIRST_BYTE)
    assert model.training
    model.eval()
    assert list(measured) == [1, 3]
    for depth, result in measured.items():
        found = by_hand(model, documents, depth)
        loss = mean([loss for _, loss, _ in found])
        close = {"rel": 1e-5}
        assert result["tokens"] == len(found) == 6 + 3 + 59 + 28 + 2
        assert result["loss"] == pytest.approx(loss, **close)
        assert result["perplexity"] == pytest.approx(math.exp(loss), **close)
        bits = sum(loss for _, loss, _ in found) / math.log(2)
        assert result["bits_per_byte"] == pytest.approx(
            bits / sum(byte for *_, byte in found), **close
        )
        assert result["by_position"] == pytest.approx(
            [mean([x for place, x, _ in found if place % WINDOW == i]) for i in range(WINDOW)],
            **close,
        )
        assert result["by_window"] == pytest.approx(
            [mean([x for p, x, _ in found if min(p // WINDOW, 8) == w]) for w in range(9)],
            **close,
        )
    assert measured[1]["loss"] != measured[3]["loss"]
    assert "bits_per_byte" not in measure_perplexity(model, batches, [1])[1]


def test_positions_share_eight_parts_of_a_wide_window():
    model = small_model(small_config(vocab_size=259, window=20))
    ids = small_ids(1, 19, vocab=259)
    ((_, result),) = measure_perplexity(model, [{"input_ids": ids}], [2]).items()
    found = by_hand(model, ids, 2)
    # Places 0 1 2 | 3 4 | 5 6 7 | 8 9 | 10 11 12 | 13 14 | 15 16 17 | 18 19, of which 18 predicts
    # nothing here.
    parts = [(0, 3), (3, 5), (5, 8), (8, 10), (10, 13), (13, 15), (15, 18)]
    assert result["by_position"] == pytest.approx(
        [mean([x for place, x, _ in found if a <= place < b]) for a, b in parts], rel=1e-5
    )
    assert result["by_window"] == pytest.approx([result["loss"]], rel=1e-5)


def test_what_cannot_be_measured_is_refused(model):
    one = {"input_ids": torch.tensor([[5]])}
    with pytest.raises(ValueError, match="batches must hold a token behind another"):
        measure_perplexity(model, [one], [1])
    with pytest.raises(ValueError, match="batches must hold a token"):
        measure_perplexity(model, [], [1])
    with pytest.raises(ValueError, match="depths"):
        measure_perplexity(model, [one], [1, 1])


def test_bytes_begin_behind_the_special_tokens():
    tokenizer = load_tokenizer("bytes")
    special = tokenizer.all_special_ids
    assert tokenizer("\x00", add_special_tokens=False).input_ids == [FIRST_BYTE]
    assert max(special) < FIRST_BYTE
