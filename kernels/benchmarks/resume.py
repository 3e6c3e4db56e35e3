"""Work in slices: rows of an earlier call are kept if nothing that they depend on has changed."""

from __future__ import annotations

import hashlib
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from hybrid_sleep.support.io import unreadable
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.support.records import read_records

# Their versions decide what is measured; those that are not installed are not named.
PACKAGES = ("triton", "flash-linear-attention", "fla-core", "mamba-ssm", "causal-conv1d")
# Everything else in a record names what a row depends on.
WHEN = ("date",)


def record(device: Any) -> dict[str, Any]:
    """`provenance`, with versions of the peers and a fingerprint of all code under kernels/.

    The fingerprint tells apart what a commit's name does not: uncommitted changes, and checkouts
    without git.
    """
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**provenance(device), "packages": found, "source": _source()}


def _source() -> str:
    folder = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def rows_of(out: Path | None, benchmark: str, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows in `out`/results.json that were measured under the same record as `now`, or none.

    Raises OSError or ValueError if that file is damaged: a new one would take its place.
    """
    path = None if out is None else out / "results.json"
    if path is None or not path.exists():
        return []
    result = read_records(path)
    if result.get("benchmark") != benchmark:
        return []
    before, rows = result.get("provenance"), result.get("rows")
    if not isinstance(before, dict) or not isinstance(rows, list):
        raise unreadable(path, "it has no rows and provenance; remove it to measure anew")
    same = {name: x for name, x in before.items() if name not in WHEN} == {
        name: x for name, x in now.items() if name not in WHEN
    }
    return rows if same else []


class Budget:
    """Minutes that work may take: it is over when the next piece might not fit.

    Raises ValueError unless `minutes` is None (no end) or above 0.
    """

    def __init__(self, minutes: float | None):
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes={minutes}: must be above 0")
        self.seconds = None if minutes is None else 60 * minutes
        self.began = self.last = time.monotonic()
        self.longest = 0.0

    def over(self) -> bool:
        """Whether a piece as long as the longest so far would end too late; call between pieces."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.last)
        self.last = now
        return self.seconds is not None and now - self.began + self.longest > self.seconds
