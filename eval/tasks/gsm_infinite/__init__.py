"""Word problems after GSM-Infinite: `load("gsm_infinite", ops=[2, 4], length=512, windows=4)`.

`gsm_symbolic` is its subset of assignments; `official_problems` reads the published problems.
"""

from __future__ import annotations

from hybrid_sleep.eval.tasks.gsm_infinite.answers import parse_answer, parse_set
from hybrid_sleep.eval.tasks.gsm_infinite.official import official_problems
from hybrid_sleep.eval.tasks.gsm_infinite.symbolic import GsmSymbolic
from hybrid_sleep.eval.tasks.gsm_infinite.task import GsmInfinite

__all__ = ["GsmInfinite", "GsmSymbolic", "official_problems", "parse_answer", "parse_set"]
