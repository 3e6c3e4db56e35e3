"""Which weights a task needs: by its Fisher information, by the path taken, or all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.fisher import Fisher, covered, estimate_fisher, left_out
from hybrid_sleep.parametric.guard import Guard, part_of, wide
from hybrid_sleep.validation import check_number


class OnlineEWC(Guard):
    """Elastic weight consolidation with one running Fisher information and one anchor.

    `F <- decay F + F_task`, each F_task of mean 1 (Progress & Compress, Schwarz et al., arXiv
    1805.06370, Eqs. 7-9; Huszar, PNAS 2018). Separate penalties with anchors of their own would
    count earlier tasks twice. F is local: it tells of the weights that it was measured at.
    """

    def measure(self, rows: Sequence[Sequence[int]], **options: Any) -> Fisher:
        """The Fisher information of the model on `rows`; see `estimate_fisher`."""
        return estimate_fisher(self.model, rows, left_out=self._leave_out, **options)

    def consolidate(self, fisher: Fisher | None = None) -> None:
        """Add the Fisher information of the task, which `measure` gives, and anchor.

        Raises ValueError, before anything changes, unless `fisher` is of the weights as they are.
        """
        if fisher is None:
            raise ValueError("fisher must be of the weights as they are now, got None")
        fisher.check(self.model)
        self.left_out = dict(fisher.left_out)
        self._add(fisher.values)


class L2(Guard):
    """All trainable weights alike: a Fisher information of ones, however many tasks there were.

    Arguments as in `Guard`, which has more.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        left_out: Callable[[nn.Module], Mapping[str, str]] = left_out,
    ):
        super().__init__(model, strength, left_out=left_out)

    def _settings(self) -> dict[str, Any]:
        return {}

    def consolidate(self, fisher: Fisher | None = None) -> None:
        """Hold all weights where they are now."""
        chosen, self.left_out = covered(self.model, self._leave_out)
        ones = {name: torch.ones_like(p, dtype=torch.float32) for name, p in chosen.items()}
        self._take(ones, 1.0)


class SynapticIntelligence(Guard):
    """Importance is what a weight's own way through a task did for the loss.

    `omega_i = -sum over steps of g_i * (change of theta_i)`, and for a task `max(omega_i, 0) /
    (d_i^2 + damping)` with d_i the whole change (Zenke, Poole, Ganguli, arXiv 1703.04200, Eqs. 3-5,
    damping their xi). A negative omega, a weight that moved uphill, would make a penalty without
    lower bound, hence the 0. g is the gradient as the optimizer gets it, clipped if it is; there is
    none to see in DeepSpeed. Other arguments as in `Guard`.
    """

    def __init__(self, model: nn.Module, strength: float, *, damping: float = 0.1, **options: Any):
        self.damping = check_number("damping", damping, above=0)
        self.path: dict[str, Tensor] = {}
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        super().__init__(model, strength, **options)

    def anchor(self) -> None:
        """See `Guard.anchor`; the way to the weights of now counts for nothing."""
        super().anchor()
        self.path, self._before = {}, {}

    def _watched(self) -> set[str]:
        return set(covered(self.model, self._leave_out)[0])

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep gradients and weights."""
        parameters = self._fresh()
        self._before = {}
        for name in self.anchors:
            p = parameters[name]
            if hasattr(p, "_hp_mapping"):
                raise ValueError(
                    "model must have its gradients whole in every process for "
                    "SynapticIntelligence, but DeepSpeed has shared them out; OnlineEWC needs none"
                )
            if p.grad is not None:
                self._before[name] = wide(p.grad).clone(), wide(p).clone()

    @torch.no_grad()
    def after_step(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """The proximal step; then its and the optimizer's change count for the path."""
        super().after_step(groups)
        parameters = dict(self.model.named_parameters())
        for name, (gradient, before) in self._before.items():
            done = -(gradient * (wide(parameters[name]) - before)).float()
            self.path[name] = self.path[name] + done if name in self.path else done
        self._before = {}

    @torch.no_grad()
    def consolidate(self, fisher: Fisher | None = None) -> None:
        """Add the importance of the way since the last anchor, and anchor.

        Raises ValueError, before anything changes, where no step was taken since, or none that
        lowered the loss.
        """
        parameters = self._fresh()
        if not self.path:
            raise ValueError("path must have at least a step since the last anchor, got none")
        new = {}
        for name, omega in self.path.items():
            whole = (wide(parameters[name]) - wide(self.anchors[name])).float()
            new[name] = omega.clamp(min=0) / (whole.square() + self.damping)
        self._add(new)

    def state(self) -> dict[str, Tensor]:
        """Those of `Guard.state`, and `path/NAME`."""
        return super().state() | {f"path/{name}": x for name, x in self.path.items()}

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "damping": self.damping}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        super()._load_state(state)
        self.path = part_of(state, "path")
