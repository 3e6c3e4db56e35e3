"""Step 2: which facts there are to keep, at most as many as the cap allows."""

from __future__ import annotations

from hybrid_sleep.parametric.schema import QUARANTINED, WAITING, WRITTEN
from hybrid_sleep.parametric.steps.night import Night


def curate(night: Night) -> None:
    """Collect what is written and what waits; the newest version of a fact counts.

    Facts that were quarantined get another chance, since others may have made room.
    """
    memory = night.memory
    newest = {known.fact.key: known for known in memory.facts((*WRITTEN, *WAITING))}
    chosen = sorted(newest.values(), key=lambda known: known.id)
    night.items = [(x.id, x.fact, memory.relation(x.fact.relation)) for x in chosen]
    night.waiting = {x.id for x in chosen if x.state not in WRITTEN}
    tried = sum(x.state == QUARANTINED for x in chosen)
    night.record.read = {
        "facts": len(chosen),
        "of them waiting": len(night.waiting) - tried,
        "quarantined before": tried,
    }
