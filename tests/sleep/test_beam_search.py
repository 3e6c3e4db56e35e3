"""Beam search against every continuation there is, over windows that close on the way."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from small import small_ids, small_model

from hybrid_sleep.sleep.options import EVICTIONS

VOCAB, STEPS, DEPTH = 3, 4, 3


def model_of(eviction: str = "hard"):
    return small_model(vocab_size=VOCAB, window=3, noise=0.4, eviction=eviction)


@torch.no_grad()
def log_likelihoods(model, ids_T: torch.Tensor, ends: list[tuple[int, ...]]) -> list[float]:
    """Log-likelihood of each continuation by whole forwards; those as long as each other are the
    rows of one, the first of which is read alone too."""
    total = [0.0] * len(ends)
    for length in {len(end) for end in ends}:
        places = [i for i, end in enumerate(ends) if len(end) == length]
        ends_BT = torch.tensor([ends[i] for i in places])
        whole = torch.cat((ids_T.expand(len(places), -1), ends_BT), 1)
        logits = model(whole, sleep_passes=DEPTH).logits
        alone = model(whole[:1], sleep_passes=DEPTH).logits
        torch.testing.assert_close(logits[:1], alone, rtol=0, atol=1e-12)
        steps = logits[:, len(ids_T) - 1 : -1].float().log_softmax(-1)
        each = steps.gather(2, ends_BT[..., None]).sum((1, 2))
        for i, value in zip(places, each.tolist(), strict=True):
            total[i] = value
    return total


def brute_force(model, ids_T, penalty: float, eos: int | None) -> list[tuple[float, tuple]]:
    """All continuations, best first, by log-likelihood over length ** penalty."""
    ends = set()
    for end in product(range(VOCAB), repeat=STEPS):
        stop = end.index(eos) + 1 if eos in end else STEPS
        ends.add(end[:stop])
    ends = sorted(ends)
    scores = log_likelihoods(model, ids_T, ends)
    scored = [(score / len(end) ** penalty, end) for score, end in zip(scores, ends, strict=True)]
    return sorted(scored, reverse=True)


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize(("penalty", "eos"), [(1.0, None), (0.0, 2), (1.0, 2), (2.0, 2)])
def test_wide_enough_beams_find_the_best(eviction, penalty, eos):
    model = model_of(eviction)
    ids = small_ids(2, 5, vocab=2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    best = 4
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=STEPS,
        num_beams=VOCAB**STEPS,
        num_return_sequences=best,
        length_penalty=penalty,
        early_stopping="never",
        eos_token_id=eos,
        pad_token_id=0,
        sleep_passes=DEPTH,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for b in range(2):
        wanted = brute_force(model, ids[b, mask[b].bool()], penalty, eos)
        for place in range(best):
            score, end = wanted[place]
            found = out.sequences[b * best + place, 5 : 5 + len(end)]
            assert tuple(found.tolist()) == end
            assert out.sequences_scores[b * best + place].item() == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_narrow_beams_follow_the_search_written_out(eviction):
    model = model_of(eviction)
    ids = small_ids(1, 4, vocab=VOCAB)
    beams: list[tuple[int, ...]] = [()]
    for _ in range(7):
        grown = [(*beam, token) for beam in beams for token in range(VOCAB)]
        scores = log_likelihoods(model, ids[0], grown)
        ranked = sorted(zip(scores, grown, strict=True), reverse=True)
        beams = [beam for _, beam in ranked[:2]]
    out = model.generate(
        ids, max_new_tokens=7, num_beams=2, num_return_sequences=2, sleep_passes=DEPTH,
        do_sample=False,
    )  # fmt: skip
    assert [tuple(row.tolist()) for row in out[:, 4:]] == beams
