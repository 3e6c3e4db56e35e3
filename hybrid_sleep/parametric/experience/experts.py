"""Knowledge Seeding (Behrouz et al., arXiv 2606.03979, section 3.3): a night that trains experts.

Beside every matrix W of a model stands a low-rank expert, `W + B A`; A and B are trained, all else
is frozen. In the paper's terms:

- sender: the fast memory, which here is a context or the fast weights of a cache; receiver: the
  slow weights, of which every matrix has an expert (in the paper those of the next slower block);
- compute: what the teacher, the model before the night with that memory, expects of each token
  (`lessons.taught`). As there, nothing of it is applied yet;
- consolidate: experts alone are trained towards it;
- commit: the products are added to the matrices, once, and the experts go, so that the model is an
  ordinary one of the same shapes; what was sent goes as well ("synaptic pruning"): experience is
  erased, and caches of the weights before are refused.

Expanding the model is thus for the night alone. The paper keeps its experts, behind a router, until
their block is consolidated itself; slow weights have no slower block to go to.

Left open there and chosen here: the divergence, KL(teacher || student); the share on policy, none
unless asked for (`on_policy.py`); and the start, A ~ N(0, 1 / rank) and B = 0, without a scale
behind them. So the student is the teacher at first, and the first step of AdamW moves an entry of W
by about one learning rate, whatever the rank: a rate means about what it means without experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.validation import check_count


class Expert(nn.Module):
    """`W + B A`, summed in fp32 or wider and rounded to the dtype of W: torch's parametrization of
    a weight, so that whatever reads it gets the sum.

    A: `[..., r, d]`, random; B: `[..., o, r]`, 0, of a weight `[..., o, d]`, a stack of matrices
    where it has more than two dimensions; both fp32, or fp64 where that is. r is `rank`, and at
    most o and d.
    """

    def __init__(self, weight: Tensor, rank: int, seed: int):
        super().__init__()
        *stack, rows, columns = weight.shape
        rank = min(rank, rows, columns)
        kind = torch.promote_types(weight.dtype, torch.float32)
        # Drawn on the CPU in one dtype, so that a seed means the same everywhere.
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(*stack, rank, columns, generator=generator) / math.sqrt(rank)
        self.A = nn.Parameter(drawn.to(weight.device, kind))
        self.B = nn.Parameter(torch.zeros(*stack, rows, rank, device=weight.device, dtype=kind))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum."""
        return (weight.to(self.A.dtype) + self.B @ self.A).to(weight.dtype)


@dataclass(frozen=True)
class Experts:
    """The experts of a model: weights, and what stands beside each, by the weight's name."""

    weights: dict[str, nn.Parameter]
    beside: dict[str, Expert]

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained, by `NAME/A` and `NAME/B`."""
        return {
            f"{name}/{which}": p
            for name, expert in self.beside.items()
            for which, p in (("A", expert.A), ("B", expert.B))
        }

    @torch.no_grad()
    def merge(self) -> None:
        """Add the products to the weights, in fp64, rounded once, and reset the experts to 0."""
        for name, expert in self.beside.items():
            weight = self.weights[name]
            added = expert.B.double() @ expert.A.double()
            weight.copy_((weight.double() + added).to(weight.dtype))
            expert.B.zero_()


@contextmanager
def grown(
    model: nn.Module, names: Collection[str], rank: int, *, seed: int = 0
) -> Iterator[Experts]:
    """`model` with an expert beside each matrix of the parameters `names`, inside of the block.

    Behind it the same parameters are where they were, in their order, with what was merged into
    them. A matrix that several modules share has one expert. Raises ValueError, before anything
    changes, for a rank below 1 and names without a matrix.
    """
    check_count("rank", rank)
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name] for name in names if parameters[name].ndim > 1}
    if not weights:
        raise ValueError(f"names must be of a matrix or more, got {sorted(names)}")
    beside = {
        name: Expert(weight, rank, derive_seed("expert", seed, name))
        for name, weight in weights.items()
    }
    name_of = {id(weight): name for name, weight in weights.items()}
    with ExitStack() as stack:
        for module in list(model.modules()):
            held = list(module._parameters.items())
            for own, p in held:
                if id(p) in name_of:
                    expert = beside[name_of[id(p)]]
                    # What torch would check by it, that shape and dtype stay, is so.
                    register_parametrization(module, own, expert, unsafe=True)
                    stack.callback(_removed, module, own, [x for x, _ in held])
        yield Experts(weights, beside)


def _removed(module: nn.Module, own: str, order: list[str]) -> None:
    """Give `module` its parameter back, in its place among the others."""
    remove_parametrizations(module, own, leave_parametrized=False)
    for name in order:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)
