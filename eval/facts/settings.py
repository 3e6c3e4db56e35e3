"""How facts are written into each model that they are measured on: one place to tune."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_sleep.parametric.edit import EditOptions
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.gate import Thresholds
from hybrid_sleep.parametric.mix import Shares
from hybrid_sleep.parametric.options import MemoryOptions
from hybrid_sleep.parametric.refine import Refinement
from hybrid_sleep.parametric.targets import TargetOptions


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was found for one model on facts that are not in the benchmark.

    memory: of weight edits. alike_weight: in the place of its weight where directions are not told
    apart, in the null space and without statistics. fine_tuning, lora: learning rates of these
    baselines. whole_replies: whether they are taught to reply by a statement. page: how a sleep
    studies a page of facts.
    """

    memory: MemoryOptions
    alike_weight: float
    fine_tuning: float
    lora: float
    whole_replies: bool
    page: StudyOptions


# What is tried by a gate after the settings' own weight: a little more of it costs little recall.
STRENGTHS = (1.0, 1.25, 1.5, 2.0, 4.0)
HASTY = TargetOptions(clamp=1.5, rate=0.05, steps=30, stop=0.25, kl=0.0)
CAREFUL = TargetOptions(clamp=1.5, rate=0.02, steps=80, stop=0.18, kl=0.0)
REAL = TargetOptions(clamp=1.5, rate=0.1, steps=20, stop=0.05, kl=0.0)

SETTINGS = {
    "world": Settings(
        memory=MemoryOptions(
            layers=(3,),
            wake=EditOptions(
                weight=70.0, position="prompt_last", target=HASTY, statements=1, questions=1
            ),
            night=EditOptions(weight=100.0, position="prompt_last", target=CAREFUL),
            strengths=STRENGTHS,
        ),
        fine_tuning=1e-3,
        lora=1e-2,
        alike_weight=4.0,
        whole_replies=False,
        # These models write nothing that parses as a dream.
        page=StudyOptions(
            band=(0, 100),
            dreams=0,
            shares=Shares(0.3, 0.0, 0.7),
            tokens=16384,
            rate=1e-3,
            strength=0.1,
        ),
    ),
    "real": Settings(
        memory=MemoryOptions(
            layers=(10, 11, 12),
            # A third of the night's contexts, and so of the keys that preserved ones weigh against.
            wake=EditOptions(weight=4000.0, target=REAL, statements=1, questions=2),
            night=EditOptions(weight=12000.0, target=REAL, statements=2, about=1),
            refine=Refinement(steps=20, energy=5.0, kl=40.0),
            thresholds=Thresholds(recall=0.8, paraphrase=0.8, locality=0.95),
            strengths=(1.0, 2.0),
        ),
        fine_tuning=1e-5,
        lora=1e-3,
        alike_weight=300.0,
        whole_replies=True,
        # Nearly all that so small a model dreams fails a check. What it answers is learned as it
        # answers it first, three times over.
        page=StudyOptions(
            band=(0, 100),
            share=1.0,
            dreams=1,
            length=32,
            samples=1,
            shares=Shares(0.5, 0.1, 0.4),
            tokens=20000,
            passes=3.0,
            rate=3e-5,
        ),
    ),
}
