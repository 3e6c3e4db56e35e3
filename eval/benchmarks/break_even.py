"""How many questions a sleep must serve before it has paid for itself.

Sleeping costs reading the past and its sleeps, once, and then a question each time. Its rivals:

keeping: the past is read once, without sleep, with all its keys and values kept, and each question
    is answered behind all of them.
rereading: nothing is kept, and the past is read again, so, for each question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hybrid_sleep.kernels.benchmarks.timing import spread

RIVALS = ("keeping", "rereading")


def break_even(invested: float, saved: float) -> dict[str, Any]:
    """When a lead of `saved` a question makes up for what was `invested` (negative: gained).

    `pays` is "always", "never", "from" so many `questions` on, or only "up to" so many.
    """
    if invested <= 0 <= saved:
        return {"pays": "always", "questions": None}
    if invested > 0 >= saved:
        return {"pays": "never", "questions": None}
    count = invested / saved
    if invested > 0:
        return {"pays": "from", "questions": math.ceil(count)}
    return {"pays": "up to", "questions": math.floor(count)}


def against(rival: str, cost: dict[str, float]) -> dict[str, Any]:
    """`break_even` with a rival; cost: `read` and `ask` of the sleeper, `read_kept` and `ask_kept`
    of the model that keeps the past, in one unit."""
    if rival == "keeping":
        return break_even(cost["read"] - cost["read_kept"], cost["ask_kept"] - cost["ask"])
    return break_even(cost["read"], cost["read_kept"] + cost["ask_kept"] - cost["ask"])


def together(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The middle one of several verdicts, from what pays soonest to what does not pay for good.

    Of more than one also: `kinds` counts what they are, `quartiles` and `range` are of the numbers
    of those that pay from some question on (None if there are none).
    """
    soonest = sorted(verdicts, key=_waits)
    middle = dict(soonest[len(soonest) // 2])
    if len(verdicts) == 1:
        return middle
    numbers = [v["questions"] for v in soonest if v["pays"] == "from"]
    return {
        **middle,
        "kinds": dict(Counter(v["pays"] for v in verdicts)),
        "quartiles": spread(numbers)[1] if numbers else None,
        "range": [numbers[0], numbers[-1]] if numbers else None,
    }


def _waits(verdict: dict[str, Any]) -> float:
    return {"always": 0.0, "from": verdict["questions"]}.get(verdict["pays"], math.inf)


def judge(result: dict[str, Any]) -> None:
    """Set `break_even`: for each past, depth, unit and rival of the rows about waking, the verdicts
    of all repeats `together`."""
    result["break_even"] = [
        {
            "windows": row["windows"],
            "passes": int(depth),
            "unit": unit,
            "rival": rival,
            **_verdict(row, unit, depth, rival, result["answer"]),
        }
        for row in result["rows"]
        if row["what"] == "wake"
        for depth in row["flops"]["read"]
        for unit in ("flops", "seconds", "joules")
        if row[unit] is not None
        for rival in RIVALS
    ]


def _verdict(
    row: dict[str, Any], unit: str, depth: str, rival: str, answer: int
) -> dict[str, Any]:
    repeats = len(row[unit]["read_kept"]) if unit == "seconds" else 1
    costs = [costs_of(row, unit, depth, answer, number) for number in range(repeats)]
    return together([against(rival, cost) for cost in costs])


def costs_of(
    row: dict[str, Any], unit: str, depth: str, answer: int, repeat: int = 0
) -> dict[str, float]:
    """What `against` compares, of one repeat of a row about waking.

    A question is read in one forward and answered with `answer` tokens, one forward each. The time
    that goes into copying a kept cache to append to it is left out: it need not be.
    """

    def take(value: Any) -> float:
        return value[repeat] if isinstance(value, list) else value

    cost = row[unit]
    copying = {name: take(value) for name, value in cost.get("copying", {}).items()}
    tokens = {name: answer * take(value) for name, value in cost["token"].items()}
    return {
        "read": take(cost["read"][depth]),
        "read_kept": take(cost["read_kept"]),
        "ask": take(cost["ask"]) + tokens["slept"],
        "ask_kept": take(cost["ask_kept"])
        + tokens["kept"]
        - (1 + answer) * copying.get("kept", 0.0),
    }
