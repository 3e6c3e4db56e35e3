"""The files of configs/sleep/ are options of a memory, and change what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid_sleep.parametric.options import MemoryOptions, changed_options
from hybrid_sleep.training.parsing import parse_yaml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "sleep"
FILES = sorted(FOLDER.glob("*.yaml"))


def leaves(part: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in part.items():
        if isinstance(value, dict):
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name), value


def test_there_are_files():
    assert [path.stem for path in FILES] == ["brief", "careful", "nightly"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_of_a_file_is_one_of_an_option(path):
    content = parse_yaml(path.read_text())
    options = changed_options(MemoryOptions(), content)
    plain = options.to_dict()
    for keys, value in leaves(content):
        at: Any = plain
        for key in keys:
            at = at[key]
        assert at == (tuple(value) if isinstance(value, list) else value), keys
    # Nothing else has moved.
    given = {keys for keys, _ in leaves(content)}
    for keys, value in leaves(MemoryOptions().to_dict()):
        assert keys in given or dict(leaves(plain))[keys] == value
    assert MemoryOptions.from_dict(plain) == options
