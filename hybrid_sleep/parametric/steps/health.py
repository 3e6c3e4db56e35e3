"""Step 1: how the model is before anything is done, on what it knew and on ordinary text."""

from __future__ import annotations

from dataclasses import replace

from hybrid_sleep.parametric.probes import measure
from hybrid_sleep.parametric.steps.night import Night


def health(night: Night) -> None:
    """Measure locality, perplexity and calibration of the weights as they are."""
    memory = night.memory
    found = measure(memory.model, memory.tokenizer, [], memory.probes, memory.baseline)
    night.before = replace(
        night.before,
        locality=found.locality,
        perplexity_ratio=found.perplexity_ratio,
        calibration=found.calibration,
    )
