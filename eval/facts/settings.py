"""How facts are written into each model that they are measured on: one place to tune."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_sleep.parametric.edit import EditOptions
from hybrid_sleep.parametric.options import MemoryOptions
from hybrid_sleep.parametric.targets import TargetOptions


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was found for one model on facts that are not in the benchmark.

    memory: of weight edits. null_weight: of its null space, in the place of the weight, with which
    it has nothing in common. fine_tuning, lora: learning rates of these baselines. whole_replies:
    whether they are taught to reply by a statement.
    """

    memory: MemoryOptions
    null_weight: float
    fine_tuning: float
    lora: float
    whole_replies: bool


def _memory(layer: int, weight: float, position: str, target: TargetOptions) -> MemoryOptions:
    night = EditOptions(weight=weight, position=position, target=target)
    wake = EditOptions(weight=weight, position=position, target=target, statements=1, questions=1)
    return MemoryOptions(layers=(layer,), wake=wake, night=night)


SETTINGS = {
    "world": Settings(
        memory=_memory(2, 100.0, "prompt_last", TargetOptions(clamp=2.0, steps=30, kl=0.0)),
        fine_tuning=1e-3,
        lora=1e-2,
        null_weight=1.0,
        whole_replies=False,
    ),
    "real": Settings(
        memory=_memory(
            13, 1000.0, "subject_last", TargetOptions(clamp=1.5, steps=25, stop=0.3, kl=0.0)
        ),
        fine_tuning=2e-5,
        lora=1e-3,
        null_weight=1.0,
        whole_replies=True,
    ),
}
