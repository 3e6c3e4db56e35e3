"""The low-rank factors of an edit of one weight, and the keys that it was solved for."""

from __future__ import annotations

from dataclasses import dataclass

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
