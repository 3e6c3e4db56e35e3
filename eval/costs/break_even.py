"""From how many questions on it costs less to sleep than to do something else with the past.

Who sleeps pays once for the past, its prefill and its sleeps, and then for each question. Others:

keeping: prefills the past once, without sleep, and answers each question with all keys and values.
recomputing: keeps nothing, and prefills the past anew for each question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_sleep.kernels.benchmarks.timing import median_and_quartiles

ALTERNATIVES = ("keeping", "recomputing")


@dataclass
class Verdict:
    """When sleeping costs less: `always`, `never`, `from` so many `questions` on, or `up to` them.

    Of several verdicts together it is the middle one. Then `kinds` counts what they are, and
    `quartiles` and `range` are of the numbers of those that say `from` (None if none does).
    """

    pays: str
    questions: int | None = None
    kinds: dict[str, int] | None = None
    quartiles: list[float] | None = None
    range: list[int] | None = None

    def __str__(self) -> str:
        return self.pays if self.questions is None else f"{self.pays} {self.questions:,}"


@dataclass
class Price:
    """What is paid once and for each question, in one unit; `_kept`: by who keeps the KV cache."""

    once: float
    question: float
    once_kept: float
    question_kept: float

    def total(self, way: str, questions: float) -> float:
        """Cost of so many questions by `sleep` or one of ALTERNATIVES."""
        if way == "sleep":
            return self.once + questions * self.question
        if way == "keeping":
            return self.once_kept + questions * self.question_kept
        return questions * (self.once_kept + self.question_kept)

    def against(self, alternative: str) -> Verdict:
        """When sleeping costs less than one of ALTERNATIVES."""
        if alternative == "keeping":
            return break_even(self.once - self.once_kept, self.question_kept - self.question)
        return break_even(self.once, self.once_kept + self.question_kept - self.question)


def break_even(invested: float, saved: float) -> Verdict:
    """When `saved` on each question makes up for what was `invested` (negative: gained)."""
    if invested <= 0 <= saved:
        return Verdict("always")
    if invested > 0 >= saved:
        return Verdict("never")
    count = invested / saved
    if invested > 0:
        return Verdict("from", math.ceil(count))
    return Verdict("up to", math.floor(count))


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several verdicts the middle one, ordered from what pays soonest to what never does."""
    soonest = sorted(verdicts, key=_waits)
    middle = soonest[len(soonest) // 2]
    if len(verdicts) == 1:
        return middle
    numbers = [v.questions for v in soonest if v.pays == "from" and v.questions is not None]
    return Verdict(
        middle.pays,
        middle.questions,
        kinds=dict(Counter(v.pays for v in verdicts)),
        quartiles=median_and_quartiles([*map(float, numbers)])[1] if numbers else None,
        range=[numbers[0], numbers[-1]] if numbers else None,
    )


def _waits(verdict: Verdict) -> float:
    if verdict.pays == "always":
        return 0.0
    return math.inf if verdict.pays != "from" or verdict.questions is None else verdict.questions
