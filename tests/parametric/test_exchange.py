"""Facts as JSON Lines: they come back as they were, and a damaged line is refused whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.store import FactStore

LIVES = Relation("lives in", ("{} lives in", "The home of {} is"), held_out=("{} is found in",))
ADA = Fact("Ada Byron", "lives in", "Lisbon", source="Last week Ada Byron moved. She likes Lisbon.")


@pytest.fixture
def store(tmp_path):
    with FactStore.open(tmp_path / "facts", "0" * 64) as store:
        yield store


def test_facts_that_are_exported_come_back_as_they_were(store, tmp_path):
    store.add([ADA, Fact("Žofie", "works at", "Café „Nord“")], [LIVES])
    (one,) = store.add([Fact("Bo", "lives in", "Faro")])
    store.commit("wake", states={one: "active"}, digest="1")
    store.add([Fact("Bo", "lives in", "Porto")])
    store.add([Fact("Cy", "lives in", "Faro")])
    store.commit("forget", states={store.find("Cy")[0].id: "retired"})
    lines = list(store.export_lines())
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def shown(line):
        return {k: v for k, v in json.loads(line).items() if k not in ("version", "created")}

    with FactStore.open(tmp_path / "other", "1" * 64) as other:
        assert len(other.import_lines(path)) == 3
        assert list(map(shown, other.export_lines())) == list(map(shown, lines))
        assert [x.fact.object for x in other.facts()] == ["Lisbon", "Café „Nord“", "Porto"]
        assert other.relation("lives in") == LIVES
        assert other.facts()[0].span == store.facts()[0].span
        again = other.import_lines(path)
        assert again == [x.id for x in other.facts()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"subject": "Bo", "relation": "lives in"', "line 3: "),
        ('["Bo", "lives in", "Faro"]', "line 3: a fact must be a JSON object"),
        ('{"subject": "Bo", "relation": "lives in"}', "line 3: object must have words in it"),
        ('{"subject": "", "relation": "r", "object": "o"}', "line 3: subject must have words"),
        ('{"subject": "Ada", "relation": "lives in", "object": "Porto"}', "as line 1 does"),
        ('{"subject": "a", "relation": "b", "object": "c", "x": 1}', "line 3: fields must be"),
        ('{"subject": "a", "relation": "b", "object": "c", "source": 1}', "source must be a text"),
        ('{"subject": "a", "relation": "b", "object": "c", "span": [0, 2]}', "span must be"),
        ('{"subject": "a", "relation": "b", "object": "c", "words": [1]}', "words must be"),
        (
            '{"subject": "a", "relation": "b", "object": "c", "words": {"statements": ["no"]}}',
            "line 3: texts of 'b' must have",
        ),
        (
            '{"subject": "a", "relation": "b", "object": "c", "words": {"statements": [1]}}',
            "line 3: ",
        ),
    ],
)
def test_a_file_with_a_damaged_line_is_refused_whole(store, tmp_path, line, message):
    path = tmp_path / "facts.jsonl"
    good = '{"subject": "Ada", "relation": "lives in", "object": "Lisbon"}'
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError, match=message) as raised:
        store.import_lines(path)
    assert "facts.jsonl is damaged: line 3" in str(raised.value)
    assert store.facts() == []


def test_words_for_tests_are_not_words_for_edits():
    for taught in ({"statements": ("{} lives in", "{} is found in")}, {"denials": ("{} left",)}):
        held = {"held_out": ("{} is found in",), "negation": "{} left"}
        with pytest.raises(ValueError, match=r"must not be (used for edits|one of its denials)"):
            Relation("lives in", **{"statements": ("{} lives in",), **held, **taught})
    told = replace(LIVES, denials=("{} does not live in",), negation="{} left")
    assert Relation.from_dict(told.to_dict()) == told
