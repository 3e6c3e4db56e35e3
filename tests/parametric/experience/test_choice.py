"""What a sleep is over: a band of surprise, a share of each source, a budget of tokens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_sleep.parametric.experience.choice import Candidate, choose, percentiles


def test_percentiles_by_hand():
    assert percentiles([4.0, 1.0, 3.0, 2.0]) == [87.5, 12.5, 62.5, 37.5]
    assert percentiles([1.0, 1.0, 2.0]) == [100 / 3, 100 / 3, 250 / 3]
    assert percentiles([7.0]) == [50.0] and percentiles([]) == []


def rows(count, kind="text", source="ada", tokens=1):
    of = percentiles(list(range(count)))
    return [Candidate(i, source, kind, tokens, x) for i, x in enumerate(of)]


def test_the_band_by_hand():
    # Of twenty, at 2.5, 7.5, ... 97.5, four are below 20 and one is above 95.
    taken, left_out = choose(rows(20), 1000)
    assert sorted(taken) == list(range(4, 19))
    assert left_out == {"known already": 4, "too surprising": 1}
    assert sorted(choose(rows(20), 1000, band=(0, 100))[0]) == list(range(20))
    # Its ends belong to it.
    assert sorted(choose(rows(20), 1000, band=(22.5, 92.5))[0]) == list(range(4, 19))


def test_a_correction_surprises_and_is_taken():
    taken, left_out = choose(rows(20, "correction"), 1000)
    assert len(taken) == 20 and left_out == {}


def test_the_seed_decides_alone():
    found = {tuple(choose(rows(20), 5, seed=seed)[0]) for seed in range(20)}
    assert len(found) > 10
    assert choose(rows(20), 5, seed=3) == choose(rows(20)[::-1], 5, seed=3)


def test_what_was_taken_is_not_taken_again():
    even = {x.id for x in rows(20) if x.id % 2 == 0}
    taken, left_out = choose(rows(20), 1000, known=even.__contains__)
    assert all(x % 2 for x in taken) and left_out["a duplicate"] == 8


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 9), st.floats(0, 100)), max_size=30),
    st.integers(1, 60),
    st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    st.integers(0, 5),
)
def test_no_more_than_the_budget_and_the_share(found, tokens, share, seed):
    candidates = [Candidate(i, s, "text", n, p) for i, (s, n, p) in enumerate(found)]
    taken, left_out = choose(candidates, tokens, seed=seed, share=share)
    assert len(set(taken)) == len(taken) and len(taken) + sum(left_out.values()) == len(found)
    by_source = Counter()
    for i in taken:
        assert 20 <= found[i][2] <= 95
        by_source[found[i][0]] += found[i][1]
    assert by_source.total() <= tokens
    within = {s for s, _, p in found if 20 <= p <= 95}
    for source in within:
        assert by_source[source] <= tokens * max(share, 1 / len(within))
    # Nothing that would still fit is left.
    for i, (source, n, p) in enumerate(found):
        if i not in taken and 20 <= p <= 95:
            too_much = by_source[source] + n > tokens * max(share, 1 / len(within))
            assert too_much or by_source.total() + n > tokens


@pytest.mark.parametrize(
    "wrong", [{"band": (50, 20)}, {"band": (0, 101)}, {"share": 0}, {"share": 1.1}]
)
def test_what_is_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        choose(rows(3), 10, **wrong)
