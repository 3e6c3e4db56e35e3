"""Results as data: read as they were written, whole or refused by name."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar

import pytest

from hybrid_sleep.eval import results
from hybrid_sleep.support.plots import new_figure
from hybrid_sleep.support.records import write_records

PROVENANCE = {
    "hybrid_sleep": "0", "commit": "c", "python": "3", "torch": "2", "transformers": "5",
    "numpy": "2", "device": "cpu", "threads": 1, "date": "today",
}  # fmt: skip


@dataclass
class Row:
    passes: int
    seconds: float
    by_depth: dict[int, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Example(results.Result):
    benchmark: ClassVar[str] = "example"
    rows: list[Row]
    floor: float | None = None


MADE = Example(
    provenance=PROVENANCE, command="hybrid-sleep bench", rows=[Row(2, 0.1 + 0.2, {1: 0.5, 10: 1.0})]
)


@pytest.fixture
def shown(monkeypatch):
    """A renderer that keeps what it was asked to show."""
    seen = []
    renderer = ModuleType("made_up")
    renderer.Example = Example
    renderer.markdown = lambda result: (seen.append(result), "\n".join(result.footer()))[1]
    renderer.figure = lambda result: new_figure("example", 1, 1)[0]
    monkeypatch.setitem(sys.modules, "made_up", renderer)
    kind = results.Kind("made_up", "e.png", "made_up:Example")
    monkeypatch.setitem(results.KINDS, "example", kind)
    return seen


def test_saved_and_rendered_from_the_file_alone(shown, tmp_path):
    paths = results.save(MADE, tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.md", "e.png"]
    assert shown == [MADE] and results.read(paths[0], Example) == MADE
    text = paths[1].read_text()
    assert "hybrid_sleep 0 (c); Python 3" in text and "`hybrid-sleep bench`" in text
    assert "Not complete" not in text
    before = [path.read_bytes() for path in paths]
    assert results.render(paths[0]) == paths[1:]
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    ("entry", "ended"),
    [({"ended": "time is up"}, "time is up"), ({"complete": False}, "interrupted"), ({}, "done")],
)
def test_what_is_not_complete_says_why_and_earlier_files_are_read(entry, ended):
    content = {**MADE.content(), "ended": None, "energy": None} | {"complete": True} | entry
    if "ended" not in entry:
        del content["ended"]
    result = Example.from_content(content)
    assert (result.ended, result.complete) == (ended, ended == "done")
    assert (f"Not complete ({ended})" in "\n".join(result.footer())) == (ended != "done")


def test_only_what_continues_says_that_it_does(monkeypatch):
    result = Example(provenance=PROVENANCE, rows=[], ended="interrupted")
    assert "Not complete (interrupted); the same call goes on." in result.footer()
    monkeypatch.setattr(Example, "continues", False)
    assert "Not complete (interrupted)." in result.footer()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "damaged: it holds a list"),
        ('{"rows": []}', "benchmark must be one of .*example, got None"),
        ('{"benchmark": "example", "rows": []}', r"can show \(provenance: Field required\)"),
        (
            '{"benchmark": "example", "provenance": {}, "rows": [{"passes": 2}]}',
            r"no result that this version can show \(rows\.0\.seconds: Field required\)",
        ),
        (
            '{"benchmark": "example", "provenance": {}, "rows": [{"passes": "x", "seconds": 1}]}',
            r"no result that this version can show \(rows\.0\.passes: .*integer",
        ),
        ('{"benchmark": "example", "provenance": {}, "rows": []}', r"show \(KeyError: 'commit'"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(shown, tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        results.render(path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_an_earlier_form_is_refused_with_the_version_that_wrote_it(shown, tmp_path):
    path = tmp_path / "results.json"
    for changes in ({"rows": [{"passes": 2}]}, {"benchmark": "ablation"}):
        write_records(path, MADE.content() | changes)
        with pytest.raises(ValueError, match=r"it was written by hybrid_sleep 0 \(c\)"):
            results.render(path)


def test_a_result_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"benchmark": "depth"}')
    with pytest.raises(ValueError, match="benchmark must be 'example', got 'depth'"):
        results.read(path, Example)


def test_every_kind_has_a_renderer():
    for name, kind in results.KINDS.items():
        renderer = importlib.import_module(kind.renderer)
        assert callable(renderer.markdown) and callable(renderer.figure), name
        if kind.result is not None:
            assert pkgutil.resolve_name(kind.result).benchmark == name


def test_render_refuses_what_is_no_result(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="results.json is damaged: no JSON"):
        results.render(path)
    path.write_text('{"benchmark": "speed"}')
    with pytest.raises(ValueError, match="benchmark must be one of depth.*got 'speed'"):
        results.render(path)
