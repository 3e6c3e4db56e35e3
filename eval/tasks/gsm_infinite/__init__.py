"""Word problems after GSM-Infinite: `load("gsm_infinite", ops=[2, 4], length=512, windows=4)`."""

from __future__ import annotations

from hybrid_sleep.eval.tasks.gsm_infinite.answers import parse_answer
from hybrid_sleep.eval.tasks.gsm_infinite.official import official_problems
from hybrid_sleep.eval.tasks.gsm_infinite.task import GsmInfinite

__all__ = ["GsmInfinite", "official_problems", "parse_answer"]
