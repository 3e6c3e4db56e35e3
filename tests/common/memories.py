"""Options of memories that are quick to make, and the bits of a model."""

from __future__ import annotations

from dataclasses import replace

import torch

from hybrid_sleep.parametric.edit import EditOptions
from hybrid_sleep.parametric.gate import Thresholds
from hybrid_sleep.parametric.memory import Memory
from hybrid_sleep.parametric.options import MemoryOptions
from hybrid_sleep.parametric.refine import Refinement
from hybrid_sleep.parametric.targets import TargetOptions

# Two steps towards v*: what is written is then not right, but written all the same.
HASTY = TargetOptions(steps=2, kl=0.0)
SURE = TargetOptions(steps=30, clamp=2.0, rate=0.1, kl=0.0)
BRIEF = Refinement(steps=1, rows=1)
OPEN = Thresholds(
    recall=None, paraphrase=None, negation=None, locality=None, perplexity_ratio=None,
    calibration=None,
)  # fmt: skip


def options(target=HASTY, **changes):
    edit = EditOptions(
        weight=100.0, position="prompt_last", reply="object", target=target, hopeless=1e3
    )
    wake = edit if target is SURE else replace(edit, statements=1, questions=1)
    return MemoryOptions(
        **{
            "layers": (2,), "wake": wake, "night": edit, "refine": BRIEF, "thresholds": OPEN,
            **changes,
        }
    )  # fmt: skip


def opener(folder, tokenizer, study, **texts):
    """`open(model, **changes)`: the memory in `folder`, of nights of `study` with the changes and a
    gate that asks for nothing."""

    def make(model, **changes):
        chosen = MemoryOptions(thresholds=OPEN, study=replace(study, **changes))
        return Memory.open(folder, model, tokenizer, options=chosen, **texts)

    return make


def bits(model):
    """Copies of all weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)
