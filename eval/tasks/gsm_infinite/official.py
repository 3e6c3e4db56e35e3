"""The published problems of GSM-Infinite, to ask pretrained models."""

from __future__ import annotations

import os
import re
from typing import Any

from hybrid_sleep.eval.tasks.base import check_int

FIELDS = ("problem", "question", "solution", "op", "template", "mode", "length", "d")
_KEY = re.compile(r"Answer: (\d+)")


def official_problems(
    source: str | os.PathLike, op: int, limit: int | None = None
) -> list[dict[str, Any]]:
    """The split `ops_{op}` of a realistic subset (medium or hard), its first `limit` problems.

    source: a name on the hub, such as `InfiniAILab/gsm_infinite_medium_0`, or a folder that
    `datasets` reads; needs that package. Each problem has the published fields (problem, question,
    solution, op, template, mode, length, d), `messages` (what to send a chat model; the question
    after the problem where the data has none), `answer` as an integer out of the solution, and
    `sound`: False where a second quantity is said to exist in place of its definition, a fault of
    the published generator that leaves the answer open.

    Compare replies by `parse_answer(reply) == problem["answer"]`. Raises ValueError for another
    subset, and for a solution without an answer, naming its place.
    """
    from datasets import load_dataset

    check_int("op", op, 1)
    rows = load_dataset(os.fspath(source), split=f"ops_{op}")
    lacking = [field for field in FIELDS if field not in rows.column_names]
    if lacking:
        raise ValueError(
            f"source={os.fspath(source)!r} lacks {', '.join(lacking)}; allowed: a medium or hard "
            "subset of GSM-Infinite"
        )
    if limit is not None:
        rows = rows.select(range(min(check_int("limit", limit, 1), len(rows))))
    found = []
    for index, row in enumerate(rows):
        keys = _KEY.findall(row["solution"])
        if not keys:
            raise ValueError(
                f"source={os.fspath(source)!r}, ops_{op}, row {index}: its solution has no "
                "`Answer: ` and an integer"
            )
        asked = [{"role": "user", "content": f"{row['problem']}\n{row['question']}"}]
        found.append(
            {
                **{field: row[field] for field in FIELDS},
                "messages": row.get("messages") or asked,
                "answer": int(keys[-1]),
                "sound": row["problem"].count("greater than 0") < 2,
            }
        )
    return found
