"""Intervals against their equations and tables, gaps seed by seed against sums by hand."""

from __future__ import annotations

import math

import pytest

from hybrid_sleep.eval.measure.statistics import (
    Gap,
    Seeds,
    best_depth,
    over_questions,
    over_seeds,
    wilson,
)


@pytest.mark.parametrize(
    ("shares", "interval"),
    [
        ([0.5], None),
        ([0.4, 0.6], (0.0, 1.0)),
        # Deviation .1; t = 4.30265 for three.
        ([0.4, 0.5, 0.6], (0.5 - 4.30265 * 0.1 / 3**0.5, 0.5 + 4.30265 * 0.1 / 3**0.5)),
        ([1.0, 1.0, 1.0], (1.0, 1.0)),
    ],
)
def test_interval_over_seeds_is_student_s(shares, interval):
    found = over_seeds(shares)
    assert found == (None if interval is None else pytest.approx(interval))


def test_interval_over_many_seeds_nears_the_normal_one():
    shares = [0.4, 0.6] * 50
    low, high = over_seeds(shares)
    assert (low + high) / 2 == pytest.approx(0.5)
    # 100 values at .1 from their mean, by a table of Student's t: 1.98422.
    assert (high - low) / 2 == pytest.approx(1.98422 * 0.1 / 99**0.5, rel=1e-5)


@pytest.mark.parametrize("share, count", [(0.0, 50), (0.43, 200), (0.99, 2000), (1.0, 10)])
def test_wilson_interval_solves_its_equation(share, count):
    """The bounds are the p at which the observed share lies 1.96 standard errors away."""
    for bound in wilson(share, count):
        if 1e-12 < bound < 1 - 1e-12:
            error = math.sqrt(bound * (1 - bound) / count)
            assert abs(share - bound) / error == pytest.approx(1.959964, rel=1e-6)
        else:
            assert bound == pytest.approx(share, abs=1e-12)


def test_seeds_say_their_mean_and_range():
    seeds = Seeds((0.25, 0.75, 0.5))
    assert (seeds.mean, seeds.lowest, seeds.highest) == (0.5, 0.25, 0.75)
    assert seeds.interval == over_seeds([0.25, 0.75, 0.5])
    assert Seeds((0.5,)).interval is None


def test_gaps_are_of_the_seeds_that_both_have():
    gap = Gap.between({0: 0.9, 1: 0.7, 2: 0.1}, {0: 0.55, 1: 0.8, 3: 0.0})
    assert gap == Gap(*(pytest.approx(x) for x in (0.125, -0.1, 0.35)))
    assert not gap.agreed and not gap.small
    assert Gap(0.2, 0.1, 0.3).agreed and Gap(-0.2, -0.3, -0.1).agreed
    assert Gap(0.0, -0.019, 0.019).small and not Gap(0.0, -0.021, 0.0).small
    assert Gap.between({0: 0.9}, {1: 0.9}) is None


def test_the_best_depth_is_the_smallest_of_equals():
    assert best_depth({4: 0.9, 2: 0.9, 1: 0.4}) == 2


def test_all_questions_weigh_the_same():
    assert over_questions({0: 0.25, 1: 0.5}, {0: 3, 1: 1}) == (3 * 0.25 + 0.5) / 4
