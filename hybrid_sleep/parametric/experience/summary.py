"""What a buffer holds, in counts for a report."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hybrid_sleep.parametric.experience.erasure import erased_counts
from hybrid_sleep.parametric.experience.schema import ERASED, SLEPT, WAITING
from hybrid_sleep.parametric.experience.vault import Vault

SCRUBBED = "scrubbed: "


def summary(vault: Vault) -> dict[str, Any]:
    """Counts by state and source, and what was dropped; see `Buffer.summary`."""
    names = {source.id: name for name, source in vault.sources.items()}
    sources: dict[str, dict[str, Any]] = {
        name: {
            WAITING: 0, SLEPT: 0, "tokens": 0, "bytes": 0, "offered": 0, "duplicates": 0,
            "evicted": 0, "scrubbed": {},
        }
        for name in vault.sources
    }  # fmt: skip
    query = (
        "SELECT source_id, state, count(*), sum(tokens), sum(size) FROM experiences "
        "GROUP BY source_id, state"
    )
    for number, state, rows, tokens, size in vault.db.execute(query):
        of = sources[names[number]]
        of[state] += rows
        of["tokens"] += tokens
        of["bytes"] += size
    totals: Counter[str] = Counter()
    for number, what, count in vault.db.execute("SELECT * FROM tallies ORDER BY what"):
        totals[what] += count
        if number in names and what.startswith(SCRUBBED):
            sources[names[number]]["scrubbed"][what.removeprefix(SCRUBBED)] = count
        elif number in names:
            sources[names[number]][what] = count
    past = erased_counts(vault)
    summed = (WAITING, SLEPT, "tokens", "bytes")
    sums = {what: sum(of[what] for of in sources.values()) for what in summed}
    return {
        "states": {WAITING: sums[WAITING], SLEPT: sums[SLEPT], ERASED: past[ERASED]},
        "tokens": sums["tokens"],
        "bytes": sums["bytes"],
        "offered": totals["offered"],
        "duplicates": totals["duplicates"],
        "evicted": totals["evicted"],
        "scrubbed": {
            what.removeprefix(SCRUBBED): count
            for what, count in totals.items()
            if what.startswith(SCRUBBED)
        },
        "erasures": past["erasures"],
        "sources": sources,
    }
