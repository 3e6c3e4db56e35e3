"""Streams by their names, and the command that learns one."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hybrid_sleep.cli.app import app
from hybrid_sleep.eval.continual.automata import RuleStream
from hybrid_sleep.eval.continual.facts import FactStream
from hybrid_sleep.eval.continual.streams import STREAMS, new_stream


def test_a_stream_has_the_settings_that_are_given():
    assert list(STREAMS) == ["rules", "facts", "clinc150", "banking77"]
    assert new_stream("rules", {"rules": (1, 2), "width": 5}) == RuleStream((1, 2), 5)
    assert new_stream("facts", {}) == FactStream()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("luck", {}, "stream must be one of 'rules', 'facts', 'clinc150', 'banking77', got 'luck'"),
        ("facts", {"width": 4}, "settings of stream facts must be of sessions, .*, got 'width'"),
        ("rules", {"data": "x"}, "stream rules must be of rules, width, tags, got 'data'"),
        ("clinc150", {"scope": "task"}, "data must be given for stream clinc150"),
        ("rules", {"rules": 5}, "rules must be a tuple of integers, got 5"),
        ("rules", {"tags": "no"}, "tags must be True or False, got 'no'"),
        ("clinc150", {"data": 5}, "data must be the path of a folder, got 5"),
        ("banking77", {"data": "x", "tokenizer": 5}, "tokenizer must be a name, got 5"),
        ("banking77", {"data": "x", "intents": None}, "intents must be an integer .*, got None"),
    ],
)
def test_what_a_stream_does_not_have_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        new_stream(name, settings)


def call(*words):
    return CliRunner().invoke(app, ["bench", "continual", *words])


def test_the_command_learns_facts(tmp_path):
    done = call(
        "--stream", "facts", "--set", "subjects=3", "--set", "controls=1", "--set", "sessions=2",
        "--set", "updates=1", "--set", "contradictions=1", "--set", "objects=3", "--seeds", "0",
        "--methods", "none,fine-tuning", "--steps", "2", "--out", str(tmp_path),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["stream"], result["tasks"]) == ("facts", ["session 1", "session 2"])
    for row in result["rows"]:
        assert row["stream"] == "facts" and row["stream_settings"]["subjects"] == 3
        assert len(row["apart"]) == 3 and row["apart"][0]["controls"] is None
    text = (tmp_path / "results.md").read_text()
    assert "| at the end | updates: new | updates: former |" in text
    assert "2 sessions of 6 new facts" in text
    assert (tmp_path / "continual.png").stat().st_size > 10_000


def test_what_is_of_another_stream_is_refused_before_anything_is_learned(tmp_path):
    done = call("--stream", "facts", "--width", "4", "--out", str(tmp_path))
    assert done.exit_code == 2 and "got 'width'" in done.output
    done = call("--stream", "clinc150", "--out", str(tmp_path))
    assert done.exit_code == 2 and "data must be given for stream clinc150" in done.output
    done = call("--stream", "clinc150", "--data", str(tmp_path / "none"), "--out", str(tmp_path))
    assert done.exit_code == 2 and "data must be a folder that is there" in done.output
