"""What holds the weights of a model by their importance, where it is experts that are trained.

The penalty is that of the change of the weights, `strength / 2 * sum F (B A)^2`, and not one of A
and of B, whose sizes say nothing of what changes (arXiv 2602.17559). As in `guard.py` it is no part
of the loss: a proximal step follows each of the optimizer's. That of both factors together has no
closed form, that of one at a time has, row by row of B, and then column by column of A:

    b_i <- (I + c sum_j F_ij a_j a_j^T)^-1 b_i,   a_j <- (I + c sum_i F_ij b_i b_i^T)^-1 a_j,

with c = learning rate * strength: the exact minimisers of `|b - b_i|^2 / 2 + c / 2 sum_j F_ij
(b . a_j)^2`, and of the same in a. For small c these are gradient steps of the penalty through the
product; neither diverges at any strength. They take about rank^2 multiplications for each entry of
the weights, in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_sleep.parametric.experience.experts import Experts
from hybrid_sleep.parametric.guard import Guard, GuardCallback, write_parameter

# Entries of a block of the sums, and the largest pull: beyond it fp64 would lose the identity.
AT_ONCE = 1 << 22
STRONGEST = 1e10


class NearnessCallback(GuardCallback):
    """`GuardCallback` for `experts` beside the weights that `guard` holds.

    Raises ValueError unless the guard is anchored at these weights. At strength 0 no bit changes.
    """

    def __init__(self, guard: Guard, experts: Experts):
        super().__init__(guard)
        self.experts = experts
        self.importance: dict[str, Tensor] = {}
        for name, weight in experts.weights.items() if guard.strength else ():
            if name not in guard.importance:
                continue
            if not torch.equal(guard.anchors[name].to(weight.device), weight):
                raise ValueError(
                    f"guard must be anchored at the weights that experts stand beside, got another "
                    f"{name!r}; call anchor()"
                )
            self.importance[name] = guard.importance[name].to(weight.device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing: weights with experts beside them do not change."""

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The proximal steps of all experts."""
        rates = {id(p): float(group["lr"]) for group in self._groups for p in group["params"]}
        for name, importance in self.importance.items():
            expert = self.experts.beside[name]
            pull = rates[id(expert.B)] * self.guard.strength
            b, a = pulled(expert.B, expert.A, importance, pull)
            write_parameter(expert.B, b)
            write_parameter(expert.A, a)


def pulled(b: Tensor, a: Tensor, importance: Tensor, pull: float) -> tuple[Tensor, Tensor]:
    """Factors `b: [..., o, r]` and `a: [..., r, d]`, in their dtype, behind their proximal steps.

    importance: F, `[..., o, d]`; pull: c. What has no importance keeps its bits.
    """
    new_b, new_a = (x.clone(memory_format=torch.contiguous_format) for x in (b, a))
    stacks = (x.reshape(-1, *x.shape[-2:]) for x in (new_b, new_a, importance))
    for of_b, of_a, weights in zip(*stacks, strict=True):
        of_b.copy_(_nearer(of_b, of_a.T, weights, pull))
        of_a.copy_(_nearer(of_a.T, of_b, weights.T, pull).T)
    return new_b, new_a


def _nearer(rows: Tensor, others: Tensor, weights: Tensor, pull: float) -> Tensor:
    """`(I + pull sum_j weights_ij y_j y_j^T)^-1 x_i` of `rows` x `[n, r]`, `others` y `[m, r]` and
    `weights: [n, m]`; fp64."""
    rank = rows.shape[1]
    size = max(1, AT_ONCE // rank**2)
    identity = torch.eye(rank, dtype=torch.float64, device=rows.device)
    found = []
    for of_rows, x in zip(weights.split(size), rows.double().split(size), strict=True):
        total = torch.zeros(len(x), rank**2, dtype=torch.float64, device=rows.device)
        for part, y in zip(of_rows.split(size, 1), others.double().split(size), strict=True):
            total += part.double() @ (y[:, :, None] * y[:, None, :]).flatten(1)
        sums = total.reshape(-1, rank, rank) * pull
        most = sums.diagonal(dim1=1, dim2=2).sum(-1).clamp(min=STRONGEST)
        sums = sums * (STRONGEST / most)[:, None, None]
        factor = torch.linalg.cholesky(identity + sums)
        found.append(torch.cholesky_solve(x[:, :, None], factor)[:, :, 0])
    return torch.cat(found)
