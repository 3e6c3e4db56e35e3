"""The learning rate of every arm of a comparison, chosen on examples that are not the test's.

A rate that suits a run need not suit what it is compared with: longer, wider and deeper trainings
have best rates of their own. So each is trained at multiples of the config's learning rates, with a
seed that the comparison does not have, and goes in at the multiple that was best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hybrid_sleep.validation import check_number

if TYPE_CHECKING:
    from hybrid_sleep.eval.studies.variants import Variant
    from hybrid_sleep.eval.trials import Call
    from hybrid_sleep.training import RunConfig

FOLDER = "rates"


def check_rates(rates: Sequence[float]) -> list[float]:
    """`rates`, ascending; ValueError unless they are different numbers above 0."""
    for rate in rates:
        check_number("rates", rate, above=0)
    if len({*rates}) < len(rates):
        raise ValueError(f"rates must be different multiples, got {list(rates)}")
    return sorted(rates)


def trials_of(variant: Variant, run: RunConfig, rates: Sequence[float]) -> dict[float, Variant]:
    """`variant` of `run` at each multiple of its learning rates, measured where it is compared."""
    return {
        rate: replace(
            at_rate(variant, run, rate),
            name=f"{variant.name}_x{rate:g}",
            label=f"{variant.label}, rates x {rate:g}",
            depths=[variant.compared_at],
            tied={},
            rate=None,
        )
        for rate in rates
    }


def at_rate(variant: Variant, run: RunConfig, rate: float) -> Variant:
    """`variant` of `run`, trained at `rate` times the learning rates of the run."""
    assert isinstance(variant.changes, dict)
    scaled: dict[str, Any] = {"train.lr_adamw": run.train.lr_adamw * rate}
    if run.train.lr_muon is not None:
        scaled["train.lr_muon"] = run.train.lr_muon * rate
    return replace(variant, changes={**variant.changes, **scaled}, rate=rate)


def best(shares: Mapping[float, float]) -> float:
    """The rate with the largest share; of equal ones that which changes the config least."""
    return max(shares, key=lambda rate: (shares[rate], -abs(math.log(rate))))


def own_call(call: Call) -> Call:
    """`call` for the trials of rates: one seed that it does not have, a folder of its own."""
    return replace(
        call,
        seeds=[max(call.seeds) + 1],
        out=None if call.out is None else call.out / FOLDER,
    )
