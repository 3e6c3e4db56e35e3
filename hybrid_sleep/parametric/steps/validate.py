"""Step 5: the gate. What does not pass is taken back bit for bit."""

from __future__ import annotations

from hybrid_sleep.parametric.gate import Measured, judge
from hybrid_sleep.parametric.probes import audit, measure
from hybrid_sleep.parametric.steps.night import Night


def validate(night: Night, strength: float) -> bool:
    """Measure what the sleep did at `strength`, on all facts it began with; the gate judges.

    Facts that were given up count as lost: a sleep must not pass by dropping what is hard, unless
    the cap asked for it.
    """
    memory = night.memory
    asked = [x for x in night.items if x[0] not in night.retired]
    results = audit(
        memory.model, memory.tokenizer, [(fact, relation) for _, fact, relation in asked]
    )
    after = measure(memory.model, memory.tokenizer, results, memory.probes, memory.baseline)
    before: Measured = night.before
    verdict = night.verdicts[strength] = judge(before, after, memory.options.thresholds)
    if verdict.passed:
        night.results = dict(zip((number for number, _, _ in asked), results, strict=True))
    return verdict.passed
