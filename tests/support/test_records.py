"""Files with a record a line: what is written comes back, and what is shared stands once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_sleep.support.records import read_records, write_records

COMMITTED = sorted((Path(__file__).parents[2] / "eval" / "results").glob("*/results.json"))

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a", "[\n{"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
CONFIGS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)
RECORDS = st.lists(
    st.fixed_dictionaries({"config": CONFIGS, "x": VALUES}) | st.fixed_dictionaries({"x": VALUES}),
    max_size=4,
)


def exact(value):
    """Types told apart as well, dicts whatever their order."""
    return json.dumps(value, sort_keys=True)


@given(rows=RECORDS, other=VALUES, runs=RECORDS)
def test_what_is_written_comes_back(tmp_path_factory, rows, other, runs):
    path = tmp_path_factory.mktemp("records") / "results.json"
    content = {"benchmark": "x", "rows": rows, "other": other, "runs": runs}
    write_records(path, content)
    assert exact(read_records(path)) == exact(content)


def test_a_record_a_line_and_once_what_configs_share(tmp_path):
    rows = [
        {"seed": seed, "config": {"model": {"window": 9, "layers": [1, 2]}, "seed": seed}}
        for seed in (0, 1)
    ]
    write_records(tmp_path / "results.json", {"rows": rows, "command": None})
    assert (tmp_path / "results.json").read_text().splitlines() == [
        "{",
        '"rows_config": {"model": {"window": 9, "layers": [1, 2]}},',
        '"rows": [',
        '{"seed": 0, "config": {"seed": 0}},',
        '{"seed": 1, "config": {"seed": 1}}',
        "],",
        '"command": null',
        "}",
    ]


def test_a_config_that_was_shared_needs_one_in_each_record(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"rows_config": {"a": 1}, "rows": [{"x": 1}]}')
    with pytest.raises(ValueError, match=r"results\.json is damaged: rows_config"):
        read_records(path)


def test_not_a_number_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "results.json"
    write_records(path, {"a": 1})
    with pytest.raises(ValueError):
        write_records(path, {"rows": [{"x": float("nan")}]})
    assert read_records(path) == {"a": 1}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_have_short_files(path):
    """As `write_records` writes them: nobody indents them again."""
    assert len(path.read_text().splitlines()) < 150
