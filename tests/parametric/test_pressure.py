"""Sleep pressure: each measure alone reaches a sleep, and more of it never asks for less."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_sleep.parametric.pressure import Limits, Measures, pressure

REST = Measures(degraded=0.0, load=0.0, hours=0.0, perplexity_ratio=1.0, locality=1.0)
WORSE = {"degraded": 1, "load": 1, "hours": 1, "perplexity_ratio": 1, "locality": -1}
MEASURES = st.builds(
    Measures,
    degraded=st.floats(0, 1),
    load=st.floats(0, 2),
    hours=st.floats(0, 1e4),
    perplexity_ratio=st.floats(0.5, 3),
    locality=st.floats(0, 1),
)


@pytest.mark.parametrize("name", WORSE)
def test_each_measure_alone_asks_for_a_nap_and_a_sleep(name):
    limits, rest = Limits(), getattr(REST, name)
    at = getattr(limits, name)

    def under(share, others=REST):
        return pressure(replace(others, **{name: rest + share * (at - rest)}), limits)

    assert pressure(REST).advice is None and pressure(REST).driver is None
    # Half a limit is one of few bits or not; a little on either side decides all the same.
    assert under(0.49).advice is None and under(0.51).advice == "nap"
    assert under(0.99).advice == "nap" and under(1.01).advice == "sleep"
    assert under(1.01).driver == name and under(1.01, Measures()).driver == name
    assert under(3).value == pytest.approx(3)
    assert sum(under(0.9).terms.values()) == pytest.approx(0.9)


@given(now=MEASURES, name=st.sampled_from(sorted(WORSE)), more=st.floats(0, 1))
def test_worse_never_asks_for_less(now, name, more):
    before = pressure(now)
    value = max(0.0, getattr(now, name) + WORSE[name] * more)
    after = pressure(replace(now, **{name: value}))
    assert after.value >= before.value
    assert before.value == max(before.terms.values()) == before.terms.get(before.driver, 0.0)
    assert all(after.terms[other] == before.terms[other] for other in WORSE if other != name)


def test_what_was_not_measured_asks_for_nothing_and_better_than_rest_is_rest():
    assert pressure(Measures()).value == 0
    assert pressure(Measures(perplexity_ratio=0.9)).value == 0
    assert asdict(pressure(Measures(load=0.25))) == {
        "value": 0.25,
        "driver": "load",
        "terms": {**dict.fromkeys(WORSE, 0.0), "load": 0.25},
        "advice": None,
    }
    assert pressure(Measures(load=0.25), Limits(nap=0.25)).advice == "nap"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"degraded": 0}, "degraded must be a finite number above 0, got 0"),
        ({"perplexity_ratio": 1.0}, "perplexity_ratio must be a finite number above 1, got 1.0"),
        ({"locality": 1.0}, "locality must be a finite number below 1, got 1.0"),
        ({"nap": 1.5}, "nap must be at most 1, where a sleep begins, got 1.5"),
    ],
)
def test_limits_that_nothing_stays_under_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)
    with pytest.raises(ValueError, match="hours must be a finite number of at least 0, got -1"):
        Measures(hours=-1)
