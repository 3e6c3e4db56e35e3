"""The exposure of a canary whose rank is known."""

from __future__ import annotations

import math

import pytest

from hybrid_sleep.parametric.experience.canaries import Canary, Secrets, exposure

SECRETS = Secrets("The code is {}.", 3)


def ranked(canary, rank):
    """A scorer by which `rank` - 1 texts, those after the canary, are likelier than it."""

    def score(texts):
        numbers = [int(x.removeprefix("The code is ").removesuffix(".")) for x in texts]
        behind = [(n - canary.number) % canary.secrets.size for n in numbers]
        return [0.0 if x == 0 else 1.0 if x < rank else -1.0 for x in behind]

    return score


@pytest.mark.parametrize("rank", [1, 2, 8, 125, 1000])
def test_exposure_by_its_definition(rank):
    canary = SECRETS.canary(5)
    found = exposure(canary, ranked(canary, rank))
    assert found.exact and found.rank == rank and found.compared == found.size == 1000
    assert found.bits == pytest.approx(math.log2(1000) - math.log2(rank), abs=1e-12)


def test_texts_as_likely_count_before_it():
    found = exposure(SECRETS.canary(0), lambda texts: [0.5] * len(texts))
    assert found.rank == 1000 and found.bits == 0


def test_by_sampling_it_is_close_to_exact_and_bounded():
    secrets = Secrets("The code is {}.", 6)
    canary = secrets.canary(1)
    assert secrets.size == 10**6
    found = exposure(canary, ranked(canary, 250_000), compared=4000, seed=2)
    assert not found.exact and found.compared == 4000
    # Four standard deviations of a share of a quarter among 3999.
    assert abs(2**-found.bits - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 3999)
    best = exposure(canary, ranked(canary, 1), compared=4000)
    assert best.bits == best.most == math.log2(4000)
    assert best == exposure(canary, ranked(canary, 1), compared=4000)


def test_the_space_is_all_texts_of_the_format_once():
    small = Secrets("<{}>", 3, "abc")
    texts = [small[i] for i in range(small.size)]
    assert len(set(texts)) == 27 and texts[0] == "<aaa>" and texts[5] == "<abc>"
    assert str(Canary(small, 26)) == "<ccc>"
    drawn = {str(small.canary(seed)) for seed in range(300)}
    assert drawn == set(texts) and small.canary(7) == small.canary(7)


def test_the_report_says_it_plainly_and_without_the_secret():
    canary = SECRETS.canary(0)
    few = exposure(canary, ranked(canary, 1))
    assert "too few texts" in str(few) and not few.telling
    wide = Secrets("The code is {}.", 4).canary(0)
    loud, quiet = (exposure(wide, ranked(wide, rank)) for rank in (2, 5000))
    assert loud.telling and "give the erased canary away" in str(loud)
    assert "exposure 12.3 of at most 13.3 bits (rank 2 of 10,000)" in str(loud)
    assert not quiet.telling and "50 % show as much" in str(quiet)
    for found in (few, loud, quiet):
        assert found.to_dict()["says"] == str(found)
        assert str(wide)[12:16] not in str(found).replace(",", "")


def test_what_is_out_of_range_is_refused():
    for wrong in ({"text": "no place"}, {"text": "{} {}"}, {"length": 0}, {"alphabet": "aa"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Secrets(**wrong)
    with pytest.raises(ValueError, match="score must"):
        exposure(SECRETS.canary(0), lambda texts: [float("nan")] * len(texts))
    with pytest.raises(ValueError, match="compared"):
        exposure(SECRETS.canary(0), len, compared=1)
