"""Depth policies: what they draw, how often, and that nothing else decides it."""

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_sleep.training.depth import (
    Choice,
    Fixed,
    LognormalPoisson,
    Stages,
    Uniform,
    in_words,
    parse_depth,
)

LOGNORMAL = {"lognormal_poisson": {"mean": 4, "sigma": 0.5, "max": 12}}
CONFIGS = [
    3,
    {"uniform": [1, 4]},
    {"choice": {1: 0.5, 2: 0.3, 8: 0.2}},
    {"choice": {2: 7}},
    LOGNORMAL,
    {"by_difficulty": {1: 1, 2: 2, 4: 2}},
]


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
        st.tuples(st.floats(1.01, 6), st.floats(0, 4), st.integers(6, 9)).map(
            lambda law: {"lognormal_poisson": dict(zip(("mean", "sigma", "max"), law, strict=True))}
        ),
        st.integers(1, 9).map(lambda top: {"stages": {0: 2, 2**39: {"uniform": [1, top]}}}),
    ),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
)
def test_config_round_trip_draws_the_same(config, seed, step):
    policy = parse_depth(config)
    again = parse_depth(policy.to_config())
    assert again == policy
    assert policy.draw(seed, step) == again.draw(seed, step)
    assert policy.draw(seed, step) in policy.at(step).probabilities()
    assert policy.draw(seed, step) in policy.depths()


def lognormal(**changed):
    return {"lognormal_poisson": {"mean": 4, "sigma": 0.5, "max": 8, **changed}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "sleep_passes must be an integer of at least 1, got 0"),
        (True, "sleep_passes must be an integer"),
        (2.0, "sleep_passes must be an integer of at least 1, {uniform.*, got 2.0"),
        ("4", "sleep_passes must be .*, got '4'"),
        (None, "sleep_passes must be .*, got None"),
        ([1, 4], r"must be an integer of at least 1, {uniform.*, got \[1, 4\]"),
        ({}, "must be an integer of at least 1, {uniform.*, got {}"),
        ({"normal": [1, 4]}, "must be an integer .*, got {'normal'"),
        ({"uniform": [1, 4], "choice": {1: 1}}, "must be an integer .*, got {'uniform'"),
        ({"uniform": 4}, r"sleep_passes.uniform must be \[low, high\], got 4"),
        ({"uniform": [0, 4]}, "sleep_passes.uniform low must be an integer of at least 1"),
        ({"uniform": [3, 2]}, "sleep_passes.uniform high must be an integer of at least 3"),
        ({"uniform": [1, 2.5]}, "sleep_passes.uniform high must be an integer"),
        ({"choice": [1, 2]}, r"sleep_passes.choice must be {depth: weight, ...}, got \[1, 2\]"),
        ({"choice": {}}, "sleep_passes.choice must have a depth: weight at least, got none"),
        ({"choice": {0: 1}}, "sleep_passes.choice depth must be an integer of at least 1"),
        ({"choice": {1: 0}}, "weight of depth 1 must be a finite number above 0, got 0"),
        (
            {"choice": {1: float("inf")}},
            "weight of depth 1 must be a finite number above 0, got inf",
        ),
        ({"choice": {1: "x"}}, "weight of depth 1 must be a finite number above 0, got 'x'"),
        ({"lognormal_poisson": [4, 1, 8]}, r"must be {mean: m, sigma: s, max: n}, got \[4, 1, 8\]"),
        ({"lognormal_poisson": {"mean": 4, "max": 8}}, "must be {mean: m, .*}, got {'mean'"),
        (lognormal(mean=1), "mean must be a finite number above 1, got 1"),
        (lognormal(mean=9), "mean must be at most 8, got 9"),
        (lognormal(mean=float("nan")), "mean must be a finite number above 1, got nan"),
        (lognormal(sigma=-1), "sigma must be a finite number of at least 0, got -1"),
        (lognormal(sigma="x"), "sigma must be a finite number of at least 0, got 'x'"),
        (lognormal(max=2.0), "max must be an integer of at least 1"),
        ({"at_once": [1, 2]}, r"at_once must be {depth: difficulty, a list .*, got \[1, 2\]"),
        ({"at_once": {}}, "sleep_passes.at_once must have a depth: difficulties, got none"),
        ({"at_once": {0: 1}}, "at_once depth must be an integer of at least 1, got 0"),
        ({"at_once": {1: []}}, r"difficulties of depth 1 must be one or several .*, got \[\]"),
        ({"at_once": {2: [3, 3]}}, r"depth 2 must be .* different ones, got \[3, 3\]"),
        ({"at_once": {2: [[1], []]}}, r"depth 2 must be one or several .*, got \[\]"),
        ({"at_once": {2: [[1], ["x"]]}}, "difficulty of depth 2 must be an integer of .*, got 'x'"),
        ({"at_once": {2: "x"}}, "difficulty of depth 2 must be an integer of at least 0, got 'x'"),
        ({"by_difficulty": 3}, "by_difficulty must be {difficulty: depth, ...}, got 3"),
        ({"by_difficulty": {}}, "by_difficulty must have a difficulty: depth at least, got none"),
        ({"by_difficulty": {-1: 2}}, "by_difficulty difficulty must be an integer of at least 0"),
        ({"by_difficulty": {2: 0}}, "depth of 2 must be an integer of at least 1, got 0"),
        ({"stages": [1, 2]}, "sleep_passes.stages must be {0: policy, .*}, got"),
        ({"stages": {}}, "sleep_passes.stages must have a first stage at step 0, got none"),
        ({"stages": {5: 1}}, "sleep_passes.stages must have a first stage at step 0, got step 5"),
        ({"stages": {0: 1, 9: 2, 5: 3}}, "must have ascending steps, got 5 after 9"),
        ({"stages": {0: 1, "9": 2}}, "sleep_passes.stages step must be an integer"),
        (
            {"stages": {0: 1, 9: {"uniform": 3}}},
            "stages at step 9: sleep_passes.uniform must be .low, high., got 3",
        ),
        (
            {"stages": {0: 1, 9: {"stages": {0: 1}}}},
            "at step 9 must be another policy, got stages again",
        ),
    ],
)
def test_wrong_configs_name_the_key_and_what_is_allowed(value, message):
    with pytest.raises(ValueError, match=message):
        parse_depth(value)


def test_policies_are_compared_by_what_they_draw():
    assert parse_depth({"choice": {2: 1, 1: 3}}) == Choice(((1, 3), (2, 1)))
    assert parse_depth(Fixed(2)) == Fixed(2)


@pytest.mark.parametrize(
    ("mean", "sigma", "highest"), [(4, 0.5, 16), (4, 0.5, 5), (2.5, 1.5, 30), (33, 0.5, 60)]
)
def test_lognormal_poisson_against_sampling_as_in_the_paper(mean, sigma, highest):
    """Rates and depths drawn one by one; those too deep are thrown away."""
    random = np.random.default_rng(0)
    rate = random.lognormal(math.log(mean - 1) - sigma**2 / 2, sigma, 400_000)
    assert rate.mean() == pytest.approx(mean - 1, rel=0.02)
    depth = random.poisson(rate) + 1
    depth = depth[depth <= highest]
    policy = LognormalPoisson(mean, sigma, highest)
    probabilities = policy.probabilities()
    assert list(probabilities) == list(range(1, highest + 1))
    seen = np.bincount(depth, minlength=highest + 1)[1:]
    expected = len(depth) * np.array(list(probabilities.values()))
    frequent = expected > 5
    statistic = ((seen - expected) ** 2 / expected)[frequent].sum()
    assert statistic < frequent.sum() + 4 * math.sqrt(2 * frequent.sum())
    assert policy.mean == pytest.approx(depth.mean(), rel=0.01)


def test_lognormal_poisson_of_constant_rate_is_a_truncated_poisson():
    weights = [3.0**k / math.factorial(k) for k in range(8)]
    for sigma, tolerance in ((0, 1e-14), (1e-6, 1e-10)):
        shares = list(LognormalPoisson(4, sigma, 8).probabilities().values())
        assert shares == pytest.approx([w / sum(weights) for w in weights], rel=tolerance)


@pytest.mark.parametrize(("sigma", "highest"), [(0.3, 60), (1.0, 1500)])
def test_lognormal_poisson_has_the_moments_of_the_law(sigma, highest):
    """All but untruncated: E = m and Var = E[rate] + Var[rate], in closed form."""
    mean, rate = 3, 2
    law = LognormalPoisson(mean, sigma, highest).probabilities()
    first = sum(depth * p for depth, p in law.items())
    variance = sum((depth - first) ** 2 * p for depth, p in law.items())
    assert first == pytest.approx(mean, rel=1e-9)
    assert variance == pytest.approx(rate + rate**2 * math.expm1(sigma**2), rel=1e-6)


def test_draws_of_the_lognormal_poisson_are_golden():
    policy = parse_depth(LOGNORMAL)
    assert [policy.draw(0, step) for step in range(12)] == [1, 1, 2, 2, 12, 4, 3, 8, 6, 2, 3, 3]


def test_stages_draw_what_each_stage_alone_would():
    config = {"stages": {0: 1, 500: {"uniform": [2, 3]}, 1000: {"choice": {4: 1, 6: 3}}}}
    policy = parse_depth(config)
    assert policy.to_config() == config
    alone = [parse_depth(part) for part in config["stages"].values()]
    for step in (0, 499, 500, 501, 999, 1000, 10**6):
        stage = alone[(step >= 500) + (step >= 1000)]
        assert policy.at(step) == stage
        assert [policy.draw(seed, step) for seed in range(40)] == [
            stage.draw(seed, step) for seed in range(40)
        ]
    assert policy.depths() == (1, 2, 3, 4, 6)
    assert policy.deepest == 6
    assert policy.probabilities() == {4: 0.25, 6: 0.75}
    assert policy.mean == 5.5
    falling = Stages(((0, Fixed(5)), (9, Fixed(2))))
    assert (falling.deepest, falling.mean, falling.depths()) == (5, 2, (2, 5))
    assert Fixed(2).at(7) == Fixed(2)


def test_depth_and_difficulty_of_a_step_belong_together():
    pairs = {1: 1, 2: 3, 7: 2}
    policy = parse_depth({"stages": {0: {"by_difficulty": pairs}, 3000: 4}})
    counts = Counter()
    for step in range(3000):
        (asked,) = policy.asked(0, step)
        (difficulty,) = asked
        assert policy.draw(0, step) == pairs[difficulty]
        counts[difficulty] += 1
    assert all(abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for count in counts.values())
    assert policy.difficulties() == (((1,),), ((2,),), ((7,),))
    assert policy.asked(0, 3000) == (None,)
    assert policy.draw(0, 3000) == 4


def test_depths_at_once_are_groups_of_one_step():
    stages = {0: {"at_once": {1: 8}}, 10: {"at_once": {4: [3, 1], 1: 1}}, 20: 2}
    policy = parse_depth({"stages": stages})
    assert [policy.draw(0, step) for step in (0, 9, 10, 19, 20)] == [1, 1, (1, 4), (1, 4), 2]
    assert [policy.asked(0, step) for step in (0, 10, 20)] == [((8,),), ((1,), (1, 3)), (None,)]
    assert policy.difficulties() == (((8,),), ((1,), (1, 3)))
    assert policy.depths() == (1, 2, 4)
    once = parse_depth(stages[10])
    assert once.probabilities() == {1: 0.5, 4: 0.5}
    assert (once.mean, once.deepest) == (2.5, 4)
    assert once.to_config() == {"at_once": {1: 1, 4: [1, 3]}}
    assert parse_depth(once.to_config()) == once
    assert [in_words(policy.draw(0, step)) for step in (0, 10)] == ["1", "1, 4 at once"]


def test_a_depth_may_have_several_groups_of_one_step():
    policy = parse_depth({"at_once": {3: [4, [2, 1]], 1: [[1]], 2: [[2], [1]]}})
    assert policy.draw(0, 0) == (1, 2, 2, 3, 3)
    assert in_words(policy.draw(0, 0)) == "1, 2, 3 at once"
    assert policy.asked(0, 0) == ((1,), (1,), (2,), (1, 2), (4,))
    assert policy.probabilities() == {1: 0.2, 2: 0.4, 3: 0.4}
    assert policy.mean == pytest.approx(2.2) and policy.depths() == (1, 2, 3)
    assert policy.to_config() == {"at_once": {1: 1, 2: [[1], [2]], 3: [[1, 2], [4]]}}
    assert parse_depth(policy.to_config()) == policy
