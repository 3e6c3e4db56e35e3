"""Results as JSON that can be read and compared line by line: one record a line.

    {
    "benchmark": "map",
    "rows_config": {"model": {"hidden_size": 64}},
    "rows": [
    {"variant": "N1", "seed": 0, "config": {"train": {"seed": 0}}, "exact": 0.94},
    {"variant": "N1", "seed": 1, "config": {"train": {"seed": 1}}, "exact": 0.96}
    ],
    "command": null
    }

Each record of a list may have a `config`. What all of them share stands once, in front of the list
as `<list>_config`; reading puts it back. Any other JSON object is read as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from hybrid_sleep.support.io import read_json, unreadable, write_text_atomic

SHARED = "_config"
WIDTH = 100  # a longer dict of lists or dicts has a line for each of them


def write_records(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically; ValueError or TypeError on what JSON lacks."""
    entries = []
    for name, value in content.items():
        if _are_records(value) and all(isinstance(record.get("config"), dict) for record in value):
            shared = _common([record["config"] for record in value])
            entries.append((name + SHARED, shared))
            value = [{**r, "config": _without(r["config"], shared)} for r in value]
        entries.append((name, value))
    lines = ",\n".join(f"{json.dumps(name)}: {_text(value)}" for name, value in entries)
    write_text_atomic(path, f"{{\n{lines}\n}}\n")


def read_records(path: str | os.PathLike) -> dict[str, Any]:
    """What `write_records` wrote; OSError or ValueError naming the file if it cannot be read."""
    content = read_json(path)
    for name in [name for name in content if name.endswith(SHARED)]:
        records = content.get(name.removesuffix(SHARED))
        if not _are_records(records):
            continue
        shared = content.pop(name)
        for record in records:
            if not (isinstance(shared, dict) and isinstance(record.get("config"), dict)):
                raise unreadable(path, f"{name} and the config of each record must be objects")
            record["config"] = _merged(shared, record["config"])
    return content


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def _text(value: Any) -> str:
    line = json.dumps(value, allow_nan=False)
    if _are_records(value):
        return "[\n" + ",\n".join(json.dumps(record) for record in value) + "\n]"
    if isinstance(value, dict) and len(line) > WIDTH:
        if all(isinstance(part, dict | list) for part in value.values()):
            parts = (f"{json.dumps(str(k))}: {json.dumps(part)}" for k, part in value.items())
            return "{\n" + ",\n".join(parts) + "\n}"
    return line


def _common(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Entries that all have, down to the entries of dicts inside."""
    shared = {}
    for name, value in configs[0].items():
        values: list[Any] = [config.get(name) for config in configs]
        # As text, since 1 == 1.0 == True.
        if all(name in config for config in configs) and len(set(map(json.dumps, values))) == 1:
            shared[name] = value
        elif all(isinstance(x, dict) for x in values) and (inner := _common(values)):
            shared[name] = inner
    return shared


def _without(config: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    left = {}
    for name, value in config.items():
        if name not in shared:
            left[name] = value
        elif isinstance(value, dict) and (inner := _without(value, shared[name])):
            left[name] = inner
    return left


def _merged(shared: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    merged = dict(shared)
    for name, value in config.items():
        inside = isinstance(shared.get(name), dict) and isinstance(value, dict)
        merged[name] = _merged(shared[name], value) if inside else value
    return merged
