"""The benchmark of facts: what it measures, that it goes on, that it shows what a file has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid_sleep.eval.facts import bench, course, subjects
from hybrid_sleep.eval.facts.settings import SETTINGS
from hybrid_sleep.eval.results import read, render, save
from hybrid_sleep.support.records import read_records, write_records

COMMITTED = Path(bench.__file__).parents[1] / "results" / "facts_world" / "results.json"
TIMES = ("seconds", "setup_seconds", "learn_seconds")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(subjects, "WORLD_KNOWN", 8)
    monkeypatch.setattr(subjects, "WORLD_LINES", 16)
    found = SETTINGS["world"]
    memory = found.memory
    wake = replace(memory.wake, target=replace(memory.wake.target, steps=8))
    night = replace(memory.night, target=replace(memory.night.target, steps=8))
    quick = replace(found, memory=replace(memory, wake=wake, night=night))
    monkeypatch.setitem(SETTINGS, "world", quick)
    monkeypatch.setattr(course, "WINDOWS", (0, 1))
    monkeypatch.setattr(course, "DEPTHS", (2,))


def _run(out, arms):
    return bench.run(facts=2, seeds=(0,), arms=arms, out=out, points=[2])


def _without_times(row):
    if isinstance(row, dict):
        return {k: _without_times(v) for k, v in row.items() if k not in TIMES}
    return [_without_times(x) for x in row] if isinstance(row, list) else row


def test_a_run_that_is_continued_is_the_same_and_shows_what_its_file_has(tmp_path, monkeypatch):
    first = _run(tmp_path, ["accumulate"])
    (row,) = first.rows
    assert [p.stage for p in row.wake] == ["before", "wake"]
    assert [p.facts for p in row.wake] == [0, 2]
    assert row.wake[0].recall == 0 and row.wake[0].locality == 1
    assert row.wake[0].perplexity_ratio == pytest.approx(1)
    assert row.wake[-1].changed > 0 and row.wake[-1].bytes > 0
    assert [p.stage for p in row.second] == ["second wave", "update and deletion", "second sleep"]
    assert [p.facts for p in row.second] == [3, 2, 2]
    assert row.reopened is True
    assert len(row.learn_seconds) == 2
    assert {(s.windows, s.passes) for s in row.slept} == {(0, 2), (1, 2)}
    assert {c.stage for c in row.changes} == {"update and deletion", "second sleep"}

    measured = []
    really = bench.measure_row
    monkeypatch.setattr(
        bench, "measure_row", lambda *args: measured.append(args[-1]["arm"]) or really(*args)
    )
    second = _run(tmp_path, ["accumulate", "prompt"])
    assert measured == ["prompt"]
    assert second.rows[0] == row
    assert second.complete

    paths = save(second, tmp_path)
    assert read(paths[0], bench.FactsResult) == second
    shown = [path.read_bytes() for path in paths[1:]]
    for path in paths[1:]:
        path.unlink()
    assert [path.read_bytes() for path in render(paths[0])] == shown
    text = paths[1].read_text(encoding="utf-8")
    for words in ("accumulation", "all facts in the prompt", "second sleep", "the same"):
        assert words in text
    assert json.loads(json.dumps(second.content())) == read_records(paths[0])


def test_arms_of_another_machine_are_named(tmp_path):
    content = read_records(COMMITTED)
    assert "Seconds of" not in COMMITTED.with_name("results.md").read_text()
    for row in content["rows"]:
        if row["arm"] == "lora":
            row["machine"] = "cpu B, 4 threads"
    write_records(tmp_path / "results.json", content)
    text = render(tmp_path / "results.json")[0].read_text()
    assert "Seconds of LoRA: on cpu B, 4 threads.\n" in text
    assert f"; 3 of {len(content['rows'])} rows on cpu B, 4 threads\n" in text
