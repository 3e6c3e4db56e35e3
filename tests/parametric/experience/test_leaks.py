"""Canaries of a night: what is planted, and their rank against likelihoods added up by hand."""

from __future__ import annotations

import math

import pytest
import torch
from editable import byte_tokenizer, tiny_llama, word_tokenizer

from hybrid_sleep.parametric.experience import leaks
from hybrid_sleep.parametric.experience.canaries import Exposure, Secrets
from hybrid_sleep.parametric.experience.leaks import exposures, plant, told

BYTES = byte_tokenizer()


def test_canaries_are_drawn_by_the_seed_and_each_is_a_row():
    planted = plant(BYTES, 3, seed=5)
    assert [BYTES.decode(row.ids) for row in planted] == [str(x) for x in planted.values()]
    texts = [str(x) for x in planted.values()]
    for number, text in enumerate(texts, 1):
        assert text.startswith(f"The code of safe {number} is ") and text[-7:-1].isdigit()
    assert len({text[-7:] for text in texts}) == 3
    assert plant(BYTES, 3, seed=5) == planted and plant(BYTES, 2, seed=5) != planted
    assert not set(plant(BYTES, 3, seed=6)) & set(planted) and plant(BYTES, 0, seed=5) == {}
    # As any other row: predicted from its second token on, at weight 1.
    assert all((row.start, row.weight) == (1, 1.0) for row in planted)
    with pytest.raises(ValueError, match="tokenizer must tell canaries such as 'The code"):
        plant(word_tokenizer(), 1, seed=0)
    with pytest.raises(ValueError, match="count must be"):
        plant(BYTES, -1, seed=0)


def test_exposure_is_the_rank_among_all_texts_and_rises_as_one_is_learned(monkeypatch):
    monkeypatch.setattr(leaks, "space_of", lambda number: Secrets(f"{number}: {{}}", 2, "abcde"))
    model = tiny_llama(vocab_size=256)
    planted = plant(BYTES, 2, seed=3)
    learned, other = planted.values()

    def by_hand(canary):
        likelihoods = []
        for number in range(25):
            ids = torch.tensor([BYTES(canary.secrets[number]).input_ids])
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            likelihoods.append(float(logp.gather(1, ids[0, 1:, None]).sum()))
        own = likelihoods[canary.number]
        return math.log2(25) - math.log2(sum(x >= own for x in likelihoods))

    seen = []
    before = exposures(
        model, BYTES, [learned, other], seed=1, progress=lambda *at: seen.append(at)
    )
    assert [x.bits for x in before] == pytest.approx([by_hand(learned), by_hand(other)])
    assert all(x.exact and x.compared == 25 for x in before) and seen == [(1, 2), (2, 2)]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    ids = torch.tensor([next(iter(planted)).ids])
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = exposures(model, BYTES, [learned, other], seed=1)
    assert after[0].bits == pytest.approx(math.log2(25)) and after[0].bits > before[0].bits
    assert after[1].bits == pytest.approx(by_hand(other))


def test_a_record_says_what_was_measured_or_that_nothing_was():
    assert told([], []) == [leaks.NOT_MEASURED] and "was not measured" in leaks.NOT_MEASURED
    loud = Exposure(10.0, 1, 1_000_000, 1024, False)
    (line,) = told([loud], [7])
    assert line.startswith("canary 1, trained on 7 times: exposure 10.0 of at most 10.0 bits")
    assert "give the erased canary away" in line
    # The likeliest of as many as are compared is beyond doubt.
    assert Exposure(math.log2(leaks.COMPARED), 1, 10**6, leaks.COMPARED, False).telling
