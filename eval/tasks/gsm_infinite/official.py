"""The published problems of GSM-Infinite, to ask pretrained models."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from hybrid_sleep.validation import check_count

FIELDS = ("problem", "question", "solution", "op", "template", "mode", "length", "d")
SYMBOLIC_FIELDS = (
    "problem", "question", "solution", "op", "n", "length", "d", "answer_q", "answer_list",
)  # fmt: skip
REACHED_WITHIN = 5.0  # seconds
_KEY = re.compile(r"Answer: (\d+)")
_NAME = re.compile(r"V\d+")


def official_problems(
    source: str | os.PathLike, op: int, limit: int | None = None
) -> list[dict[str, Any]]:
    """The split `ops_{op}` of a subset (symbolic, medium or hard), its first `limit` problems.

    source: a name on the hub, such as `InfiniAILab/gsm_infinite_medium_0`, or a folder that
    `datasets` reads; needs that package. Each problem has the published fields and `messages`:
    what to send a chat model (the question after the problem where the data has none).

    Medium and hard (problem, question, solution, op, template, mode, length, d) also have `answer`,
    an integer out of the solution, and `sound`: False where a second quantity is said to exist in
    place of its definition, a fault of the published generator that leaves the answer open. Compare
    replies by `parse_answer(reply) == problem["answer"]`. For symbolic ones (problem, question,
    solution, op, n, length, d, answer_q, answer_list) it is
    `parse_set(reply) == set(problem["answer_list"])`.

    Raises ValueError for what cannot be reached or loaded, for another data set, and for a problem
    without an answer, naming its place; FileNotFoundError for a folder that does not exist.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"source must be a name on the hub or a folder, got {source!r}")
    check_count("op", op)
    if limit is not None:
        check_count("limit", limit)
    rows = _load(source, f"ops_{op}")
    symbolic = "answer_list" in rows.column_names
    fields = SYMBOLIC_FIELDS if symbolic else FIELDS
    lacking = [field for field in fields if field not in rows.column_names]
    if lacking:
        raise ValueError(
            "source must be a symbolic, medium or hard subset of GSM-Infinite, "
            f"got {os.fspath(source)!r} without {', '.join(lacking)}"
        )
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    found = []
    for index, row in enumerate(rows):
        asked = [{"role": "user", "content": f"{row['problem']}\n{row['question']}"}]
        answer = _names(row) if symbolic else _integer(row)
        if answer is None:
            field, content = (
                ("answer_list", "be a list of names `V12`")
                if symbolic
                else ("solution", "have `Answer: ` and an integer")
            )
            raise ValueError(
                f"{field} must {content}, got {row[field]!r} in {os.fspath(source)!r}, ops_{op}, "
                f"row {index}"
            )
        problem = {field: row[field] for field in fields}
        found.append({**problem, "messages": row.get("messages") or asked, **answer})
    return found


def _integer(row: dict[str, Any]) -> dict[str, Any] | None:
    keys = _KEY.findall(row["solution"])
    sound = row["problem"].count("greater than 0") < 2
    return {"answer": int(keys[-1]), "sound": sound} if keys else None


def _names(row: dict[str, Any]) -> dict[str, Any] | None:
    names = row["answer_list"]
    named = isinstance(names, list) and all(_NAME.fullmatch(str(name)) for name in names)
    return {} if named else None


def _load(source: str | os.PathLike, split: str) -> Any:
    """The rows of a split; ValueError or FileNotFoundError at once if there is no way to them."""
    try:
        from datasets import config, load_dataset
    except ImportError as error:
        raise ValueError(
            "the package datasets must be installed (pip install 'hybrid-sleep[train]'), "
            f"got {error}"
        ) from error
    name = os.fspath(source)
    if not name or not Path(name).is_dir():
        if isinstance(source, os.PathLike) or not re.fullmatch(r"[\w.-]*\w/[\w.-]+", name):
            raise FileNotFoundError(
                "source must be a folder that datasets reads, or a name on the hub such as "
                f"InfiniAILab/gsm_infinite_medium_0, got {name!r}"
            )
        # The library itself tries again for half a minute or more.
        if not config.HF_HUB_OFFLINE and (reason := _unreachable(config.HF_ENDPOINT)):
            raise ValueError(
                "source must be a folder, or with HF_HUB_OFFLINE=1 what was loaded before, while "
                f"{config.HF_ENDPOINT} cannot be reached ({reason}), got {name!r}"
            )
    try:
        return load_dataset(name, split=split)
    except Exception as error:  # builders, file formats and the hub all raise their own
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            "source must be what datasets.load_dataset loads, with splits ops_1, ops_2 and so on, "
            f"got {name!r}, whose split {split!r} cannot be loaded ({reason})"
        ) from error


def _unreachable(endpoint: str) -> str:
    """Why `endpoint` does not answer; empty if it does, whatever it says."""
    try:
        urllib.request.urlopen(
            urllib.request.Request(endpoint, method="HEAD"), timeout=REACHED_WITHIN
        ).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        return str(getattr(error, "reason", error))
    return ""
