"""ZeRO 2 for a night: the optimizer's state whole, by parameter, and the model as it was after it.

In this form what was kept in one process can be gone on from in several, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

ZERO_2: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}
Moments = dict[str, dict[str, Tensor]]
MOMENTS = ("exp_avg", "exp_avg_sq")


def _sharded(optimizer: Any) -> Any:
    """DeepSpeed's optimizer, whatever it is wrapped in."""
    while not hasattr(optimizer, "single_partition_of_fp32_groups"):
        optimizer = optimizer.optimizer
    return optimizer


def full_moments(optimizer: Any, trained: Mapping[str, nn.Parameter]) -> Moments:
    """The state of AdamW by parameter, whole in every process; a collective call."""
    from deepspeed.utils import safe_get_full_optimizer_state

    step = next(iter(_sharded(optimizer).optimizer.state.values()))["step"]
    return {
        name: {"step": step, **{x: safe_get_full_optimizer_state(p, x) for x in MOMENTS}}
        for name, p in trained.items()
    }


def load_full_moments(
    optimizer: Any, trained: Mapping[str, nn.Parameter], moments: Moments
) -> None:
    """Give the optimizer, which has not stepped yet, what `full_moments` found."""
    from deepspeed.utils import safe_set_full_optimizer_state

    sharded = _sharded(optimizer)
    step = max(float(of["step"]) for of in moments.values() if of)
    for flat in sharded.single_partition_of_fp32_groups:
        zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
        sharded.optimizer.state[flat] = {"step": torch.tensor(step), **zeros}
    sharded._lazy_init_hp_params_optimizer_state()
    for name, p in trained.items():
        for key in MOMENTS:
            if key in moments[name]:
                value = moments[name][key].to(p.device, torch.float32)
                safe_set_full_optimizer_state(p, value, key)


def released(engine: Any, trained: Mapping[str, nn.Parameter]) -> None:
    """Let `trained` go from DeepSpeed, where that was the `engine`; their own values stay."""
    if not hasattr(engine, "destroy"):
        return
    engine.destroy()
    for p in trained.values():
        # They were parts of one buffer, which would be kept as long as any of them.
        p.data = p.data.clone()
