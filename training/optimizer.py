"""Muon for the matrices, AdamW for everything else, in one torch optimizer."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.validation import check_choice, check_count, check_number

ADJUSTMENTS = ("original", "match_rms_adamw")
ALGORITHMS = ("muon", "adamw")
PRECISIONS = ("float32", "bfloat16")
# Up to here a CPU takes longer to start an operation for each matrix than to stack them in float32.
SMALL = 128


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon on matrices and torch.optim.AdamW on the rest, as one optimizer.

    One set of `param_groups` and one state, as Trainer, accelerate and learning-rate schedules
    expect; every step is torch's own, but for Muon's on a CPU where matrices are small or there are
    no bfloat16 instructions: the same update is computed in float32, which is faster there.

    Args:
        params: parameters or parameter groups. A group says which algorithm it is for
            (`algorithm`: `muon` or `adamw`, default `adamw`) and may override any option below.
        lr: learning rate of groups that bring none, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        momentum: of Muon, in [0, 1).
        ns_steps: Newton-Schulz steps, 1 to 99.
        adjust_lr: how Muon scales its rate with a matrix's shape, `original` (Keller Jordan) or
            `match_rms_adamw` (Moonshot); see torch.optim.Muon.
        precision: what Muon orthogonalises in, `float32` or, as torch does, `bfloat16`. None:
            what the device of a group's first parameter is faster at, for matrices as large as the
            group's largest. It is saved with the state, so that a run that is resumed on another
            machine goes on as it began.
        betas, eps: of AdamW.

    Raises ValueError, before anything is added, for an unknown algorithm, a value out of range, or
    a Muon parameter that is not a real matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust_lr: str = "original",
        precision: str | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        # Both are made with a parameter of their own; they get the real ones at every step.
        self._muon = torch.optim.Muon([nn.Parameter(torch.zeros(1, 1))])
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
        defaults = {
            **self._muon.defaults,
            **self._adamw.defaults,
            "algorithm": "adamw",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
            "precision": precision,
            "muon_eps": self._muon.defaults["eps"],
            "betas": tuple(betas),
            "eps": eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group (see the class); raises ValueError naming what is wrong with it."""
        group = {**self.defaults, **param_group}
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        group["params"] = list(group["params"])
        if group["precision"] is None:
            group["precision"] = _faster_precision(group["params"])
        _check_group(group)
        super().add_param_group(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; ValueError if it belongs to other groups. Nothing changes on an error."""
        saved = [group.get("algorithm") for group in state_dict["param_groups"]]
        own = [group["algorithm"] for group in self.param_groups]
        if saved != own:
            raise ValueError(
                f"state_dict must have this optimizer's parameter groups, for {own}, got groups "
                f"for {saved}"
            )
        # States from before there was a choice are from torch's own steps.
        groups = [{"precision": "bfloat16", **group} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every group; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for algorithm, optimizer in (("muon", self._muon), ("adamw", self._adamw)):
            groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            if algorithm == "muon":
                for group in groups:
                    if group["precision"] == "float32":
                        self._muon_step(group)
                groups = [group for group in groups if group["precision"] != "float32"]
                # The two optimizers give these names other meanings, or other names.
                groups = [
                    {**group, "adjust_lr_fn": group["adjust_lr"], "eps": group["muon_eps"]}
                    for group in groups
                ]
            # Groups and state are replaced when a state is loaded, hence linked anew every time.
            optimizer.param_groups, optimizer.state = groups, self.state
            if groups:
                optimizer.step()
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        """torch.optim.Muon's update in float32, matrices of one shape together."""
        shapes: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes.setdefault(parameter.shape, []).append((parameter, parameter.grad))
        momentum, nesterov = group["momentum"], group["nesterov"]
        for (rows, columns), pairs in shapes.items():
            updates = []
            for parameter, gradient in pairs:
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                updates.append(gradient.lerp(buffer, momentum) if nesterov else buffer)
            stacked = orthogonalised(
                torch.stack(updates).float(),
                group["ns_coefficients"],
                group["ns_steps"],
                group["muon_eps"],
            )
            scale = math.sqrt(max(1, rows / columns))
            if group["adjust_lr"] == "match_rms_adamw":
                scale = 0.2 * math.sqrt(max(rows, columns))
            for (parameter, _), update in zip(pairs, stacked, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonalised(
    updates: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Matrices `[n, R, C]` with all singular values brought near 1, in the dtype of `updates`.

    Newton-Schulz, `X <- a X + (b A + c A A) X` with `A = X X^T`, from X of Frobenius norm 1 (Keller
    Jordan, "Muon", 2024).
    """
    a, b, c = coefficients
    tall = updates.shape[1] > updates.shape[2]
    x = updates.mT if tall else updates
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _faster_precision(parameters: list[Tensor]) -> str:
    if not parameters:
        return "bfloat16"
    device = parameters[0].device
    largest = max(max(parameter.shape, default=0) for parameter in parameters)
    small = device.type == "cpu" and largest <= SMALL
    return "bfloat16" if bfloat16_is_native(device) and not small else "float32"


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware; a CPU without it imitates it, slowly."""
    if device.type != "cpu":
        return True
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def parameter_groups(
    model: nn.Module, lr_muon: float | None, lr_adamw: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into groups for `MuonAdamW`.

    Muon gets the weights of linear layers (none if `lr_muon` is None). AdamW gets the rest:
    embeddings and the output head (also when tied), norms, biases, gates (`A_log`, `dt_bias`),
    convolutions. Weight decay applies to what has at least two dimensions. Empty groups are left
    out. Raises ValueError if nothing is trainable.
    """
    ends = ("get_input_embeddings", "get_output_embeddings")
    tokens = {id(getattr(model, end)()) for end in ends if hasattr(model, end)}
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module) not in tokens
    }
    tokens_shared = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or id(module) in tokens
    }
    split: dict[str, list[nn.Parameter]] = {"muon": [], "decayed": [], "rest": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if lr_muon is not None and id(parameter) in matrices - tokens_shared:
            split["muon"].append(parameter)
        else:
            split["decayed" if parameter.ndim >= 2 else "rest"].append(parameter)
    groups: list[dict[str, Any]] = [
        {"algorithm": "muon", "params": split["muon"], "lr": lr_muon, "weight_decay": weight_decay},
        {"params": split["decayed"], "lr": lr_adamw, "weight_decay": weight_decay},
        {"params": split["rest"], "lr": lr_adamw, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model must have a parameter with requires_grad=True, got none")
    return groups


def optimizer_for(
    model: nn.Module,
    lr_muon: float | None = 2e-3,
    lr_adamw: float = 5e-5,
    weight_decay: float = 0.0,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Muon and AdamW over the `parameter_groups` of `model`; lr_muon None: AdamW over all of them.

    The defaults are those of a run config. Raises ValueError if nothing is trainable.
    """
    groups = parameter_groups(model, lr_muon, lr_adamw, weight_decay)
    kind = torch.optim.AdamW if lr_muon is None else MuonAdamW
    return kind(groups, betas=betas, eps=eps)


def _check_group(group: dict[str, Any]) -> None:
    check_choice("algorithm", group["algorithm"], ALGORITHMS)
    for name in ("lr", "weight_decay", "eps"):
        check_number(name, group[name], least=0)
    check_number("momentum", group["momentum"], least=0, below=1)
    if check_count("ns_steps", group["ns_steps"]) > 99:
        raise ValueError(f"ns_steps must be an integer of at most 99, got {group['ns_steps']}")
    check_choice("adjust_lr", group["adjust_lr"], ADJUSTMENTS)
    check_choice("precision", group["precision"], PRECISIONS)
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {group['betas']!r}")
    for beta in group["betas"]:
        check_number("betas", beta, least=0, below=1)
    if group["algorithm"] == "muon":
        for parameter in group["params"]:
            if parameter.ndim != 2 or parameter.is_complex():
                raise ValueError(
                    "params of Muon must be real matrices, AdamW takes the rest; got shape "
                    f"{list(parameter.shape)}, dtype {parameter.dtype}"
                )
