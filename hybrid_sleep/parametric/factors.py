"""The low-rank factors of an edit of one weight, and the keys that it was solved for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """What an edit adds to a weight `[o, d]`: `left @ right`.

    left: `[o, r]`, right: `[r, d]`, both fp32. keys: `[p, d]` fp32, what later edits are to leave
    as they are; facts: `[p]` int64, the id of the fact that each of them belongs to.
    """

    left: Tensor
    right: Tensor
    keys: Tensor
    facts: Tensor

    def only(self, kept: Tensor) -> Factors:
        """The parts of some facts, `kept: [p]` bool; column i of left is of fact i."""
        return Factors(self.left[:, kept], self.right[kept], self.keys[kept], self.facts[kept])

    @property
    def norm(self) -> float:
        """`||left @ right||`, Frobenius, of which no dense matrix is made."""
        left, right = self.left.double(), self.right.double()
        square = ((left.T @ left) * (right @ right.T)).sum()
        return float(square.clamp(min=0).sqrt())


def merged(parts: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """One set of factors, by site, with the columns of all of `parts` in order."""
    by_site: dict[str, list[Factors]] = {}
    for commit in parts:
        for site, part in commit.items():
            if len(part.facts):
                by_site.setdefault(site, []).append(part)
    return {
        site: Factors(
            torch.cat([p.left for p in of], dim=1),
            *(torch.cat([getattr(p, name) for p in of]) for name in ("right", "keys", "facts")),
        )
        for site, of in by_site.items()
    }
