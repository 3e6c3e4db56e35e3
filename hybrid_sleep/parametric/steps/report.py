"""Step 6: one commit, or the record of an attempt, and what a person can read of it."""

from __future__ import annotations

import time

from hybrid_sleep.parametric.probes import is_healthy
from hybrid_sleep.parametric.record import Record
from hybrid_sleep.parametric.schema import ACTIVE, DEGRADED, QUARANTINED, RETIRED, WRITTEN
from hybrid_sleep.parametric.steps.night import Night


def report(night: Night, outcome: str, why: str = "") -> Record:
    """Finish the record and commit it; states of facts change with it, and only if it passed."""
    record, memory = night.record, night.memory
    record.outcome, record.why = outcome, why
    record.gate = {"before": night.before.to_dict()}
    chosen = night.chosen
    if night.attempts:
        record.gate = {
            # Where none is chosen, the last one stands for the sleep.
            **(chosen or night.attempts[-1]).verdict.to_dict(),
            "tried": [
                {
                    "strength": attempt.strength,
                    "after": attempt.verdict.after.to_dict(),
                    "failures": list(attempt.verdict.failures),
                }
                for attempt in night.attempts
            ],
        }
    names = {number: str(fact) for number, fact, _ in night.items}
    reasons = {**night.retired, **night.quarantined}
    record.dropped = {names[number]: reason for number, reason in reasons.items()}
    record.ids = sorted(names)
    states: dict[int, str] = {}
    results = chosen.results if chosen else night.results
    if chosen:
        record.changed = memory.edited.change()
        states = dict.fromkeys(night.retired, RETIRED) | dict.fromkeys(
            night.quarantined, QUARANTINED
        )
        for number, _, _ in night.live:
            states[number] = ACTIVE if is_healthy(results[number]) else DEGRADED
    audits = {
        number: result
        for number, result in results.items()
        if states.get(number, WRITTEN[0]) in WRITTEN
    }
    record.seconds = time.perf_counter() - night.began
    edit = chosen.edit if chosen else None
    return memory.committed(
        record,
        states=states,
        factors=edit.factors if edit else None,
        replace=chosen is not None,
        edits=edit.facts if edit else None,
        audits=audits,
    )
