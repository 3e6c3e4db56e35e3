"""Step 3: which facts the model answers now; over the cap, the least worth ones are given up."""

from __future__ import annotations

from dataclasses import replace

from hybrid_sleep.parametric.probes import audit as ask_facts
from hybrid_sleep.parametric.probes import is_healthy, shares
from hybrid_sleep.parametric.steps.night import Night


def audit(night: Night) -> None:
    """Ask every fact, those that wait as well, and choose which are kept under the cap.

    Worth, in this order: being answered, in how many wordings, being new.
    """
    memory = night.memory
    results = ask_facts(
        memory.model, memory.tokenizer, [(fact, relation) for _, fact, relation in night.items]
    )
    night.results = dict(zip((number for number, _, _ in night.items), results, strict=True))
    found = shares(results)
    night.before = replace(night.before, **found)
    night.record.read["answered"] = sum(map(is_healthy, results))
    over = len(night.items) - memory.options.cap

    def worth(number: int) -> tuple[bool, bool, int, int]:
        result = night.results[number]
        # What waits has not been tried, which says nothing against it.
        return number in night.waiting, is_healthy(result), sum(result.values()), number

    for number in sorted(night.results, key=worth)[: max(0, over)]:
        night.retired[number] = f"over the cap of {memory.options.cap} facts"
