"""Muon for the matrices, AdamW for everything else, in one torch optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of Keller Jordan's Muon; the same in torch.optim.Muon.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ADJUSTMENTS = ("original", "match_rms_adamw")
ALGORITHMS = ("muon", "adamw")
STACK_ELEMENTS = 1 << 26


class MuonAdamW(torch.optim.Optimizer):
    """Muon on matrices and AdamW on the rest, with one set of `param_groups` and one state.

    Muon (torch.optim.Muon, the same update and hyperparameters):
        B <- momentum B + (1 - momentum) G;  U = (1 - momentum) G + momentum B
        W <- (1 - lr weight_decay) W - lr s NS(U),
    with NS the Newton-Schulz orthogonalisation and s = sqrt(max(1, rows / columns)) (`original`)
    or 0.2 sqrt(max(rows, columns)) (`match_rms_adamw`). Two things differ from torch.optim.Muon:
    matrices of one shape are orthogonalised together, and NS runs in fp32 on a CPU, where bf16
    matrix products are slow (16 matrices of width 64: 5 ms a step in torch.optim.Muon with the
    processor's bf16 instructions, 33 ms without them, 1.4 ms here). AdamW is torch's own.

    Args:
        params: parameters or parameter groups. A group says which algorithm it is for
            (`algorithm`: `muon` or `adamw`, default `adamw`) and may override any option below.
        lr: learning rate of groups that bring none, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        momentum: of Muon, in [0, 1).
        ns_steps: Newton-Schulz steps, 1 to 99.
        adjust_lr: s above, `original` or `match_rms_adamw`.
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
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        # AdamW is made with a parameter of its own; it gets the real ones at every step.
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
        defaults = {
            **self._adamw.defaults,
            "algorithm": "adamw",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ns_steps": ns_steps,
            "adjust_lr": adjust_lr,
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
        _check_group(group)
        super().add_param_group(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; ValueError if it belongs to other groups. Nothing changes on an error."""
        saved = [group.get("algorithm") for group in state_dict["param_groups"]]
        own = [group["algorithm"] for group in self.param_groups]
        if saved != own:
            raise ValueError(
                f"state_dict has parameter groups for {saved}, this optimizer for {own}; allowed: "
                "a state saved by an optimizer over the same groups"
            )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every group; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        adamw = []
        for group in self.param_groups:
            if group["algorithm"] == "muon":
                self._muon(group)
            else:
                adamw.append(group)
        # Groups and state are replaced when a state is loaded, hence linked anew every time.
        self._adamw.param_groups, self._adamw.state = adamw, self.state
        self._adamw.step()
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        alike: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is None:
                continue
            if weight.grad.is_sparse:
                raise ValueError("params: Muon takes dense gradients only, got a sparse one")
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            buffer = state["momentum_buffer"]
            buffer.lerp_(weight.grad, 1 - momentum)
            update = weight.grad.lerp(buffer, momentum)
            # Newton-Schulz multiplies by the smaller Gram matrix, that of the wide orientation.
            update = update.mT if update.shape[0] > update.shape[1] else update
            alike[update.shape, update.device].append((weight, update))
        for (shape, _), pairs in alike.items():
            at_once = max(1, STACK_ELEMENTS // shape.numel())
            for start in range(0, len(pairs), at_once):
                some = pairs[start : start + at_once]
                updates = orthogonalise(torch.stack([update for _, update in some]), group)
                for (weight, _), update in zip(some, updates, strict=True):
                    rows, columns = weight.shape
                    weight.mul_(1 - lr * group["weight_decay"])
                    weight.add_(
                        update.mT if rows > columns else update,
                        alpha=-lr * _adjustment(group["adjust_lr"], rows, columns),
                    )


def orthogonalise(matrices: Tensor, options: dict[str, Any] | None = None) -> Tensor:
    """Replace the singular values of `matrices: [n, rows, columns]` by values near 1.

    `ns_steps` (default 5) quintic Newton-Schulz steps, X <- a X + b (X X^T) X + c (X X^T)^2 X from
    X / |X|_F: singular values end between about 0.7 and 1.2. In bf16 on a GPU, which has fast
    bf16 products, and in at least fp32 elsewhere; the result has the dtype of `matrices`.
    """
    a, b, c = NEWTON_SCHULZ
    on_gpu = matrices.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.promote_types(matrices.dtype, torch.float32)
    x = matrices.to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range((options or {}).get("ns_steps", 5)):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def parameter_groups(
    model: nn.Module, lr_muon: float, lr_adamw: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into groups for `MuonAdamW`.

    Muon gets the weights of linear layers. AdamW gets the rest: embeddings and the output head
    (also when tied), norms, biases, gates (`A_log`, `dt_bias`), convolutions. Weight decay applies
    to what has at least two dimensions. Empty groups are left out. Raises ValueError if nothing is
    trainable.
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
        if id(parameter) in matrices - tokens_shared:
            split["muon"].append(parameter)
        else:
            split["decayed" if parameter.ndim >= 2 else "rest"].append(parameter)
    groups = [
        {"algorithm": "muon", "params": split["muon"], "lr": lr_muon, "weight_decay": weight_decay},
        {"params": split["decayed"], "lr": lr_adamw, "weight_decay": weight_decay},
        {"params": split["rest"], "lr": lr_adamw, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model has no parameter with requires_grad=True; allowed: at least one")
    return groups


def _adjustment(rule: str, rows: int, columns: int) -> float:
    if rule == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def _check_group(group: dict[str, Any]) -> None:
    def demand(holds: bool, name: str, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={group[name]!r}; allowed: {allowed}")

    demand(group["algorithm"] in ALGORITHMS, "algorithm", ", ".join(ALGORITHMS))
    for name in ("lr", "weight_decay", "eps"):
        demand(math.isfinite(group[name]) and group[name] >= 0, name, "a finite number >= 0")
    demand(0 <= group["momentum"] < 1, "momentum", "0 <= momentum < 1")
    ns_steps = group["ns_steps"]
    demand(isinstance(ns_steps, int) and 1 <= ns_steps < 100, "ns_steps", "an integer in 1..99")
    demand(group["adjust_lr"] in ADJUSTMENTS, "adjust_lr", ", ".join(ADJUSTMENTS))
    betas = group["betas"]
    pair = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    demand(pair, "betas", "two numbers in [0, 1)")
    if group["algorithm"] == "muon":
        for parameter in group["params"]:
            if parameter.ndim != 2 or parameter.is_complex():
                raise ValueError(
                    f"params: Muon got shape {list(parameter.shape)}, dtype {parameter.dtype}; "
                    "allowed: real matrices (2 dimensions), AdamW takes the rest"
                )
