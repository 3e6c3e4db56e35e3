"""Hold weights near what earlier tasks need: an anchor, an importance, and a proximal step.

`L(theta) = L_task(theta) + strength / 2 * sum_i F_i (theta_i - anchor_i)^2` (Kirkpatrick et al.,
arXiv 1612.00796, Eq. 3). The penalty is not put into the loss, where it would be clipped together
with the gradient of the task, rescaled by Adam, and diverge for a learning rate above
`2 / (strength F)`. Instead its proximal step follows each of the optimizer's,

    theta <- (theta' + c anchor) / (1 + c),    c = learning rate * strength * F,

which is decoupled from the optimizer as AdamW's weight decay is, and stable for every strength.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hybrid_sleep.parametric.durable import read_described, write_tensors
from hybrid_sleep.parametric.fisher import Fisher, check_whole, left_out, mean_of, with_mean_1
from hybrid_sleep.sleep.weights import adapter_state, durable_version, weights_digest
from hybrid_sleep.support.io import unreadable
from hybrid_sleep.validation import check_flag, check_number

# Larger ones pull no harder: 1 / (1 + c) is 0 in fp32 long before.
STRONGEST_PULL = 1e30

G = TypeVar("G", bound="Guard")


class Guard(ABC):
    """What holds the weights of `model`; subclasses say what importance is.

    Args:
        model: a causal model, whole in every process (ZeRO stages 0 to 2).
        strength: >= 0, of the penalty. Importance has mean 1, so it means the same for every model
            and loss: under plain gradient descent the rate at which an average weight is pulled
            back, in learning rates; under Adam, whose steps are about one learning rate long, such
            a weight comes to rest at most 1 / strength from its anchor. 0 changes no bit.
        decay: of the importance from earlier tasks whenever one is added, in [0, 1]; 1 never
            forgets, and leaves no room for anything new in the end.
        normalise: divide the importance of each task by its mean (arXiv 1805.06370),
            so that all are protected alike. False takes what was measured, as Bayes' rule does.
        left_out: parameters not to hold, by name, and why.

    Use: `with guard.guarding(optimizer): fit(model, ..., optimizer=optimizer)`, or
    `Trainer(..., callbacks=[GuardCallback(guard)])`, without weight decay, which pulls elsewhere;
    then `guard.consolidate(guard.measure(rows))`. After any other change of the weights (an edit, a
    commit, a rollback, a merged adapter) `anchor` takes them as they are; until then the guard
    refuses to work. What it does not cover, new parameters and new rows among it, has importance
    0 and moves freely; so do the factors of a LoRA.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        decay: float = 0.95,
        normalise: bool = True,
        left_out: Callable[[nn.Module], Mapping[str, str]] = left_out,
    ):
        self.strength = check_number("strength", strength, least=0)
        self.decay = check_number("decay", decay, least=0)
        if decay > 1:
            raise ValueError(f"decay must be a number of at least 0 and at most 1, got {decay!r}")
        self.normalise = check_flag("normalise", normalise)
        self.model, self._leave_out = model, left_out
        check_whole(model)
        self.left_out: dict[str, str] = {}
        self.importance: dict[str, Tensor] = {}
        self.anchors: dict[str, Tensor] = {}
        self.tasks = 0
        self.measured_mean: float | None = None
        self.anchor()

    def anchor(self) -> None:
        """Hold the weights that `model` has now, after a commit or another change of them.

        Importance stays; of a parameter that has grown, new entries have none. Raises ValueError,
        before anything changes, if a parameter is gone or has another shape.
        """
        parameters = dict(self.model.named_parameters())
        importance = {
            name: _grown(name, value, parameters.get(name))
            for name, value in self.importance.items()
        }
        kept = importance.keys() | self._watched()
        anchors = {name: p.detach().clone() for name, p in parameters.items() if name in kept}
        self.importance, self.anchors = importance, anchors
        self._mark = _mark(self.model)

    def penalty(self) -> Tensor:
        """`strength / 2 * sum F (theta - anchor)^2`, a scalar in fp32 or wider with a gradient to
        the parameters alone, to be logged, or added to a loss instead of the proximal step."""
        parameters = self._fresh()
        device = next(self.model.parameters()).device
        total = torch.zeros((), device=device)
        # In the order of the model, so that the sum is the same wherever importance comes from.
        for name, p in parameters.items():
            if name in self.importance:
                gap = wide(p) - wide(self.anchors[name])
                total = total + (self.importance[name] * gap.square()).sum().to(device)
        return 0.5 * self.strength * total

    def before_step(self) -> None:
        """To be called when gradients are there and the optimizer has not stepped yet."""
        self._fresh()

    @torch.no_grad()
    def after_step(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """The proximal step; to be called behind the optimizer's.

        groups: its parameter groups, of which each has `params` and the `lr` of the step.
        """
        parameters = self._fresh()
        if self.strength == 0:
            return
        names = {id(parameters[name]): name for name in self.importance}
        for group in groups:
            for p in group["params"]:
                name = names.get(id(p))
                if name is not None:
                    pull = self.importance[name] * (float(group["lr"]) * self.strength)
                    write_parameter(p, _pulled(p, self.anchors[name], pull))

    def measure(self, rows: Sequence[Sequence[int]], **options: Any) -> Fisher | None:
        """What `consolidate` needs to know of a task, of which `rows` of ids are examples.

        options: of `estimate_fisher`. None where the guard needs none.
        """
        return None

    @abstractmethod
    def consolidate(self, fisher: Fisher | None = None) -> None:
        """Count what was trained since the last time as a task to protect, and anchor there.

        fisher: what `measure` gave for the weights as they are now.
        """

    def _watched(self) -> set[str]:
        """Names of parameters to anchor besides those that have importance."""
        return set()

    def _add(self, new: Mapping[str, Tensor]) -> None:
        """`importance <- decay * importance + new` (arXiv 1805.06370, Eq. 9), and anchor."""
        measured = mean_of(new)
        scaled = with_mean_1(new) if self.normalise else dict(new)
        parameters = dict(self.model.named_parameters())
        importance = {
            name: self.decay * _grown(name, value, parameters.get(name))
            for name, value in self.importance.items()
        }
        for name, value in scaled.items():
            value = _grown(name, value.float(), parameters.get(name))
            importance[name] = importance[name] + value if name in importance else value
        self._take(importance, measured)

    def _take(self, importance: dict[str, Tensor], measured: float) -> None:
        self.importance, self.measured_mean = importance, measured
        self.tasks += 1
        self.anchor()

    def _fresh(self) -> dict[str, nn.Parameter]:
        """The parameters of the model; ValueError if the anchor is not of its present version."""
        parameters = dict(self.model.named_parameters())
        if not self.anchors:
            return parameters
        if _mark(self.model) != self._mark:
            raise ValueError(
                "anchor must be of the present version of the weights, but they were edited, "
                f"committed or rolled back since (version {self._mark[0]}, now "
                f"{durable_version(self.model)}); call anchor()"
            )
        for name, value in list(self.anchors.items()):
            p = parameters.get(name)
            if p is None or p.shape != value.shape:
                found = "none" if p is None else f"one of shape {tuple(p.shape)}"
                raise ValueError(
                    f"model must have {name!r} of shape {tuple(value.shape)}, as it was anchored, "
                    f"got {found}; anchor() takes what has grown"
                )
            if value.device != p.device:
                # Trainer moves a model that it is given.
                self.anchors[name] = value.to(p.device)
                if name in self.importance:
                    self.importance[name] = self.importance[name].to(p.device)
        return parameters

    @contextmanager
    def guarding(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """While the block runs, each `optimizer.step()` is followed by the proximal step."""
        before = optimizer.register_step_pre_hook(lambda *_: self.before_step())
        after = optimizer.register_step_post_hook(
            lambda stepped, *_: self.after_step(stepped.param_groups)
        )
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def report(self) -> dict[str, Any]:
        """What a record of a sleep should say: settings, what is held, and how far it has moved.

        measured_mean: of the last task's importance before it was normalised. penalty: now.
        """
        counts: dict[str, int] = {}
        for why in self.left_out.values():
            why = "tied" if why.startswith("tied") else why
            counts[why] = counts.get(why, 0) + 1
        return {
            "guard": type(self).__name__,
            "strength": self.strength,
            **self._settings(),
            "tasks": self.tasks,
            "held": sum(value.numel() for value in self.importance.values()),
            "measured_mean": self.measured_mean,
            "left_out": counts,
            "penalty": float(self.penalty().detach()),
        }

    def state(self) -> dict[str, Tensor]:
        """All tensors, by `importance/NAME` and `anchor/NAME`."""
        return {
            f"{kind}/{name}": value
            for kind, values in (("importance", self.importance), ("anchor", self.anchors))
            for name, value in values.items()
        }

    def _settings(self) -> dict[str, Any]:
        """What the class is made with besides the model and the strength."""
        return {"decay": self.decay, "normalise": self.normalise}

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        self.importance, self.anchors = part_of(state, "importance"), part_of(state, "anchor")

    def save(self, path: str | os.PathLike) -> None:
        """Write to the file `path` (safetensors), atomically, with the digest of the weights."""
        about = {
            "guard": type(self).__name__,
            "strength": self.strength,
            "settings": self._settings(),
            "tasks": self.tasks,
            "measured_mean": self.measured_mean,
            "left_out": self.left_out,
            "model": weights_digest(self.model),
        }
        write_tensors(Path(path), self.state(), about)

    @classmethod
    def load(
        cls: type[G],
        path: str | os.PathLike,
        model: nn.Module,
        *,
        anew: bool = False,
        left_out: Callable[[nn.Module], Mapping[str, str]] = left_out,
    ) -> G:
        """What `save` wrote, for `model`, which has the weights that it had then.

        anew: anchor at the weights that `model` has now, after edits or a rollback, whatever they
        were then. OSError or ValueError naming a file that is missing, damaged, or of another
        guard, and ValueError for a model with other weights.
        """
        state, about = read_described(path)
        if about.get("guard") != cls.__name__:
            raise unreadable(path, f"it is of {about.get('guard')!r}, not of {cls.__name__!r}")
        digest = weights_digest(model)
        if about["model"] != digest and not anew:
            raise ValueError(
                f"model must have the weights that {path} was saved with, of digest "
                f"{about['model'][:12]}, got {digest[:12]}"
            )
        guard = cls(model, about["strength"], left_out=left_out, **about["settings"])
        device = {name: p.device for name, p in model.named_parameters()}
        guard._load_state({key: x.to(device[key.partition("/")[2]]) for key, x in state.items()})
        for name in ("tasks", "measured_mean", "left_out"):
            setattr(guard, name, about[name])
        if anew:
            guard.anchor()
        return guard


class GuardCallback(TrainerCallback):
    """`guard` in transformers' Trainer, with DeepSpeed's ZeRO 1 and 2 as well."""

    def __init__(self, guard: Guard):
        self.guard = guard
        self._groups: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # DeepSpeed steps its schedule together with the optimizer, before anyone is told.
        self._groups = trained_groups(kwargs["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard.after_step(self._groups)


def trained_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The model's own parameters that `optimizer` trains, and at which `lr`, group by group.

    ZeRO 1 and 2 flatten those that their optimizer sees, and keep the model's in `bit16_groups`.
    """
    while hasattr(optimizer, "optimizer") and not hasattr(optimizer, "bit16_groups"):
        optimizer = optimizer.optimizer
    groups = optimizer.param_groups
    held = getattr(optimizer, "bit16_groups", [group["params"] for group in groups])
    return [
        {"params": list(params), "lr": group["lr"]}
        for params, group in zip(held, groups, strict=True)
    ]


def _mark(model: nn.Module) -> tuple[int, tuple[Hashable, ...]]:
    """What every edit, commit and rollback changes, and merging an adapter; training does not."""
    states = (adapter_state(module) for module in model.modules())
    return durable_version(model), tuple(state for state in states if state is not None)


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _pulled(p: Tensor, anchor: Tensor, pull: Tensor) -> Tensor:
    """The minimiser of `(theta - p)^2 / 2 + pull (theta - anchor)^2 / 2`, in the dtype of `p`."""
    pull = pull.nan_to_num().clamp_(max=STRONGEST_PULL)
    now = wide(p)
    pulled = torch.lerp(now, wide(anchor), (pull / (1 + pull)).to(now.dtype)).to(p.dtype)
    # A weight without importance keeps its bits, the sign of a zero among them.
    return torch.where(pull > 0, pulled, p)


def write_parameter(p: nn.Parameter, value: Tensor) -> None:
    """Set `p` to `value`, and the copy that DeepSpeed keeps of it."""
    p.copy_(value)
    # ZeRO 1 and 2 step a copy of their own, from which they overwrite the parameter.
    if getattr(p, "_hp_mapping", None) is not None:
        added_by_deepspeed: Any = p
        added_by_deepspeed.set_full_hp_param(value)


def _grown(name: str, value: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """`value` in the shape of `parameter`, on its device, with 0 where that has grown."""
    old, new = tuple(value.shape), None if parameter is None else tuple(parameter.shape)
    if (
        parameter is None
        or new is None
        or len(old) != len(new)
        or any(n < m for m, n in zip(old, new, strict=True))
    ):
        raise ValueError(f"model must have {name!r} of at least shape {old}, got {new}")
    value = value.to(parameter.device)
    if value.shape == parameter.shape:
        return value
    whole = torch.zeros_like(parameter, dtype=value.dtype)
    whole[tuple(slice(n) for n in value.shape)] = value
    return whole


def part_of(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of one kind of `Guard.state`, by the name of their parameter."""
    return {key.partition("/")[2]: x for key, x in state.items() if key.partition("/")[0] == kind}
