"""What goes where a buffer is full."""

from __future__ import annotations

import hashlib
import math

from hybrid_sleep.parametric.experience.experience import Limits
from hybrid_sleep.parametric.experience.schema import WAITING
from hybrid_sleep.parametric.experience.vault import Vault


def worth(seed: int, number: int, importance: float) -> float:
    """What the experience `number` is worth against others of its source: log(u) / w.

    It orders as u^(1/w) does, so that what stays is a weighted random sample without replacement
    of all that ever was (Efraimidis and Spirakis 2006, A-ES). u in (0, 1) follows from `seed` and
    `number` alone, w is the importance.
    """
    drawn = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return math.log((int.from_bytes(drawn[:6], "big") + 0.5) / 2**48) / importance


def evict(vault: Vault, limits: Limits, newest: int) -> list[int]:
    """Delete what is worth least until all is within `limits`; returns the ids.

    First of the source `newest` while it has more than its share, then of the one that takes most.
    What was slept over goes before what waits.
    """
    gone: list[int] = []
    while (source := _too_full(vault, limits, newest)) is not None:
        least = vault.db.execute(
            "SELECT id FROM experiences WHERE source_id = ? "
            f"ORDER BY state = '{WAITING}', worth, id LIMIT 1",
            (source,),
        ).fetchone()[0]
        vault.db.execute("DELETE FROM experiences WHERE id = ?", (least,))
        vault.count(source, "evicted")
        gone.append(least)
    return gone


def _too_full(vault: Vault, limits: Limits, newest: int) -> int | None:
    query = "SELECT source_id, count(*), sum(size) FROM experiences GROUP BY source_id"
    filled = {source: (rows, size) for source, rows, size in vault.db.execute(query)}
    rows, size = filled.get(newest, (0, 0))
    if rows > limits.rows_of_one or size > limits.bytes_of_one:
        return newest
    all_rows, all_size = (sum(column) for column in zip(*filled.values(), strict=True))
    if all_rows <= limits.rows and all_size <= limits.bytes:
        return None
    return max(filled, key=lambda n: max(filled[n][0] / limits.rows, filled[n][1] / limits.bytes))
