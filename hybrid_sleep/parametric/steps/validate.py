"""Step 5: the gate. What does not pass is taken back bit for bit."""

from __future__ import annotations

from hybrid_sleep.parametric.edit import Edit
from hybrid_sleep.parametric.gate import judge
from hybrid_sleep.parametric.probes import audit, measure
from hybrid_sleep.parametric.steps.night import Attempt, Night


def validate(night: Night, strength: float, edit: Edit | None) -> Attempt:
    """Measure what `edit`, which is in the weights, did, on all facts the sleep began with.

    Facts that were given up count as lost: a sleep must not pass by dropping what is hard, unless
    the cap asked for it.
    """
    memory = night.memory
    asked = [x for x in night.items if x[0] not in night.retired]
    results = audit(
        memory.model, memory.tokenizer, [(fact, relation) for _, fact, relation in asked]
    )
    after = measure(memory.model, memory.tokenizer, results, memory.probes, memory.baseline)
    verdict = judge(night.before, after, memory.options.thresholds)
    by_id = dict(zip((number for number, _, _ in asked), results, strict=True))
    return Attempt(strength, edit, by_id, verdict)
