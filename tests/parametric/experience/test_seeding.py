"""A night of experts and on-policy rows: committed as ordinary weights, undone, written down."""

from __future__ import annotations

import pytest
import torch
from editable import tiny_hybrid, word_tokenizer
from memories import bits, opener, same

from hybrid_sleep import SleepCache
from hybrid_sleep.parametric import CachedContext, Imitation
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.fisher import covered
from hybrid_sleep.parametric.mix import Shares

TOKENIZER = word_tokenizer()
STUDY = StudyOptions(
    tokens=200, samples=6, length=3, shares=Shares(0.8, 0.0, 0.2), foundation=40, measured=4,
    rate=1e-2, strength=0.1, experts=2, on_policy=0.5,
    imitation=Imitation(z0=2),
)  # fmt: skip
ROWS = {"corpus": [[1, 4, 5, 6, 7], [1, 9, 8, 7, 6]], "ordinary": [[1, 10, 11, 12], [1, 3, 5]]}


def read(model):
    cache = SleepCache(model.config)
    with torch.no_grad():
        model(torch.tensor([[1, 5, 9, 6, 14, 20, 8, 25, 12, 7, 30]]), cache=cache)
    model.sleep(cache, passes=2)
    return CachedContext(cache, [[4, 15], [7, 13]])


@pytest.fixture
def opened(tmp_path):
    return opener(tmp_path / "memory", TOKENIZER, STUDY, **ROWS)


def test_a_night_of_experts_is_committed_and_undone_bit_for_bit(opened):
    model = tiny_hybrid()
    before, names = bits(model), list(bits(model))
    with opened(model) as memory:
        tried = memory.sleep(kind="experience", caches=[(context := read(model))], dry_run=True)
        assert tried.outcome == "rolled back" and same(before, bits(model))
        record = memory.sleep(kind="experience", caches=[context])
        assert record.outcome == "committed", record
        training = record.gate["training"]
        sizes = [sum(p.shape) * min(2, *p.shape) for p in covered(model)[0].values() if p.ndim > 1]
        assert (training["experts"], training["parameters"]) == (2, sum(sizes))
        # All rows have a teacher, the cache or the model itself.
        rows = sum(record.gate["study"]["mix"]["rows_of"].values())
        assert training["rows on policy"] == round(0.5 * rows) > 5
        assert 0 <= training["mean reward"] < 1
        assert record.gate["guard"]["penalty"] > 0
        after = bits(model)
        assert list(after) == names
        for name, p in covered(model)[0].items():
            change = after[name] - before[name]
            if p.ndim == 1:
                assert not change.any()
            else:
                assert change.any() and torch.linalg.svdvals(change)[2:].sum() < 1e-12
        # Another night's experts stand beside what the first one left, held by what it needed.
        second = memory.sleep(kind="experience", caches=[read(model)])
        assert second.outcome == "committed" and second.gate["guard"]["tasks"] == 2
        twice = bits(model)
    fresh = tiny_hybrid()
    with opened(fresh) as memory:
        assert same(twice, bits(fresh))
        memory.undo()
        assert same(after, bits(fresh))
        memory.undo()
        assert same(before, bits(fresh))


def test_the_record_of_a_night_without_experts_says_so(opened):
    model = tiny_hybrid()
    with opened(model, experts=None, on_policy=0.0, imitation=None, tokens=60) as memory:
        training = memory.sleep(kind="experience", caches=[read(model)]).gate["training"]
    assert training["experts"] is None and training["rows on policy"] == 0
    assert training["parameters"] == sum(p.numel() for p in covered(model)[0].values())


def test_the_rank_must_be_one():
    with pytest.raises(ValueError, match="experts must be an integer of at least 1, got 0"):
        StudyOptions(experts=0)
    assert StudyOptions.from_dict(STUDY.to_dict()) == STUDY
