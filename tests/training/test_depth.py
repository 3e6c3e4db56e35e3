"""Depth policies: what they draw, how often, and that nothing else decides it."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_sleep.training.depth import Choice, Fixed, Uniform, parse_depth

CONFIGS = [3, {"uniform": [1, 4]}, {"choice": {1: 0.5, 2: 0.3, 8: 0.2}}, {"choice": {2: 7}}]


@pytest.mark.parametrize("config", CONFIGS)
def test_frequencies_are_the_probabilities(config):
    policy = parse_depth(config)
    draws = 20_000
    counts = dict.fromkeys(policy.probabilities(), 0)
    for step in range(draws):
        counts[policy.draw(5, step)] += 1
    # Pearson's statistic has mean (classes - 1) and rarely exceeds five times that plus ten.
    statistic = sum(
        (counts[depth] - draws * share) ** 2 / (draws * share)
        for depth, share in policy.probabilities().items()
    )
    assert statistic <= 5 * (len(counts) - 1) + (10 if len(counts) > 1 else 0)
    assert sum(policy.probabilities().values()) == pytest.approx(1)
    assert policy.mean == pytest.approx(sum(d * counts[d] for d in counts) / draws, rel=0.03)
    assert policy.deepest == max(counts)


def test_neighbouring_steps_and_seeds_are_independent():
    policy = Uniform(1, 4)
    steps = Counter((policy.draw(0, i), policy.draw(0, i + 1)) for i in range(0, 64_000, 2))
    seeds = Counter((policy.draw(i, 7), policy.draw(i + 1, 7)) for i in range(0, 64_000, 2))
    for counts in (steps, seeds):
        cells = [counts[first, second] for first in range(1, 5) for second in range(1, 5)]
        assert sum((count - 2000) ** 2 / 2000 for count in cells) < 38  # 15 degrees, p = 0.001


def test_another_process_draws_the_same():
    code = (
        "from hybrid_sleep.training.depth import parse_depth\n"
        "p = parse_depth({'uniform': [1, 4]})\n"
        "print([p.draw(3, s) for s in range(30)])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    policy = Uniform(1, 4)
    assert there == str([policy.draw(3, step) for step in range(30)])


def test_draws_are_golden():
    # Runs made by earlier versions must resume with the depths they would have drawn.
    golden = [1, 1, 1, 1, 4, 3, 2, 4, 4, 1, 2, 2]
    assert [Uniform(1, 4).draw(0, step) for step in range(12)] == golden


@given(
    st.one_of(
        st.integers(1, 9),
        st.tuples(st.integers(1, 5), st.integers(0, 4)).map(
            lambda pair: {"uniform": [pair[0], sum(pair)]}
        ),
        st.dictionaries(st.integers(1, 9), st.floats(0.01, 5), min_size=1, max_size=4).map(
            lambda weights: {"choice": weights}
        ),
    ),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
)
def test_config_round_trip_draws_the_same(config, seed, step):
    policy = parse_depth(config)
    again = parse_depth(policy.to_config())
    assert again == policy
    assert policy.draw(seed, step) == again.draw(seed, step)
    assert policy.draw(seed, step) in policy.probabilities()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "sleep_passes must be an integer of at least 1, got 0"),
        (True, "sleep_passes must be an integer"),
        (2.0, "sleep_passes=2.0; allowed: an integer >= 1, {uniform"),
        ("4", "sleep_passes='4'; allowed"),
        (None, "sleep_passes=None; allowed"),
        ([1, 4], "allowed: an integer >= 1, {uniform"),
        ({}, "allowed: an integer >= 1, {uniform"),
        ({"normal": [1, 4]}, "{'normal': .*allowed"),
        ({"uniform": [1, 4], "choice": {1: 1}}, "allowed: an integer >= 1, {uniform"),
        ({"uniform": 4}, r"sleep_passes.uniform=4; allowed: \[low, high\]"),
        ({"uniform": [0, 4]}, "sleep_passes.uniform low must be an integer of at least 1"),
        ({"uniform": [3, 2]}, "sleep_passes.uniform high must be an integer of at least 3"),
        ({"uniform": [1, 2.5]}, "sleep_passes.uniform high must be an integer"),
        ({"choice": [1, 2]}, "sleep_passes.choice=.*allowed: {depth: weight"),
        ({"choice": {}}, "sleep_passes.choice is empty"),
        ({"choice": {0: 1}}, "sleep_passes.choice depth must be an integer of at least 1"),
        ({"choice": {1: 0}}, "weight of depth 1 is 0; allowed: a finite number > 0"),
        ({"choice": {1: float("inf")}}, "weight of depth 1 is inf"),
        ({"choice": {1: "x"}}, "weight of depth 1 is 'x'"),
    ],
)
def test_wrong_configs_name_the_key_and_what_is_allowed(value, message):
    with pytest.raises(ValueError, match=message):
        parse_depth(value)


def test_policies_are_compared_by_what_they_draw():
    assert parse_depth({"choice": {2: 1, 1: 3}}) == Choice(((1, 3), (2, 1)))
    assert parse_depth(Fixed(2)) == Fixed(2)
