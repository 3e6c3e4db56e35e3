"""No dream without provenance or a check, none dreamed upon, all counted."""

from __future__ import annotations

import dataclasses
import json

import pytest
from dreaming import dream

from hybrid_sleep.parametric.dreams.dream import (
    MARK,
    REQUIRED,
    Check,
    Dream,
    Source,
    check_sources,
    counts,
)
from hybrid_sleep.parametric.facts import Fact


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "nightmare"}, "kind must be one of 'acquisition', 'retention'"),
        ({"sources": ()}, r"sources must be ids for acquisition .* got \(\)"),
        ({"kind": "retention", "sources": ("day-1",)}, "none for retention"),
        ({"sources": (MARK + "0123",)}, "sources must be experiences, got a dream"),
        ({"weights": ""}, "weights must be the digest"),
        ({"generation": 2}, "generation must be 1, as no dream is dreamed upon, got 2"),
        ({"generation": 0}, "generation must be 1"),
        ({"checks": ()}, "checks must be one or more"),
        ({"checks": (Check("form", True), Check("form", True))}, "each once"),
        ({"start": 5}, "start must be an integer of at least 0 and at most 4, got 5"),
        ({"number": -1}, "number must be"),
    ],
)
def test_what_is_no_dream(changes, message):
    with pytest.raises(ValueError, match=message):
        dream(**changes)


@pytest.mark.parametrize("kind", REQUIRED)
def test_kept_only_by_all_checks_of_its_kind(kind):
    whole = dream(kind=kind)
    assert whole.kept and whole.why == ""
    for left_out in REQUIRED[kind]:
        checks = tuple(c for c in whole.checks if c.name != left_out)
        if checks:
            part = dream(kind=kind, checks=checks)
            assert not part.kept and part.why == "not all checks were made"
        failed = tuple(Check(c.name, c.name != left_out, 1.0, "so it is") for c in whole.checks)
        assert not dream(kind=kind, checks=failed).kept
        assert dream(kind=kind, checks=failed).why == f"{left_out}: so it is"
    assert not whole.checked(Check("helps", False)).kept
    assert whole.checked(Check("helps", False)).why == "helps"
    assert whole.checked(Check("helps", True)).kept


def test_its_id_marks_it_and_tells_it_from_others():
    one = dream()
    assert one.id.startswith(MARK) and one.id == dream().id
    assert one.id == one.checked(Check("helps", False)).id
    others = [
        dream("another"), dream(seed=1), dream(number=1), dream(weights="x"), dream(sources=("b",)),
        dream(question="Who ?"), dream(form="reversal"), dream(ids=(1, 4)),
    ]  # fmt: skip
    assert len({one.id, *(other.id for other in others)}) == 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.text = "another"


def test_there_and_back_through_json():
    one = dream(question="Where ?", score=0.5).checked(Check("helps", False, 0.1, "no"))
    data = json.loads(json.dumps(one.to_dict()))
    assert data["kept"] is False and data["why"] == "helps: no" and data["kind"] == "acquisition"
    assert Dream.from_dict(data) == one
    with pytest.raises(ValueError, match="dream must be the one of its id"):
        Dream.from_dict({**data, "text": "another"})


def test_none_is_dreamed_upon():
    day = Source("day-1", "Ada lives in Lisbon.")
    one = dream()
    check_sources([day], [one])
    with pytest.raises(ValueError, match=f"each a Source, got the dream '{one.id}'"):
        check_sources([day, one])
    with pytest.raises(ValueError, match="each a Source, got 'text'"):
        check_sources(["text"])
    with pytest.raises(ValueError, match=f"sources must be experiences, got the dream '{one.id}'"):
        Source(one.id, one.text)
    with pytest.raises(ValueError, match="got the text of a dream as day-2"):
        check_sources([day, Source("day-2", " " + one.text.replace(" ", "\n"))], [one])
    with pytest.raises(ValueError, match="sources must have ids of their own"):
        check_sources([day, Source("day-1", "Bo.", (Fact("Bo", "is", "tall"),))])
    for given in (("", "text"), ("day", " \n")):
        with pytest.raises(ValueError, match="of a source must have words"):
            Source(*given)


def test_all_are_counted_once():
    failed = [Check("form", True), Check("words", False), Check("novel", False)]
    made = [
        dream(), dream(number=1), dream(number=2).checked(Check("helps", False)),
        dream(checks=tuple(failed)), dream(checks=tuple(failed[:1])),
        dream(kind="retention"), dream(kind="retention", checks=(Check("length", False),)),
    ]  # fmt: skip
    assert counts(made) == {
        "acquisition": {
            "made": 5, "kept": 2, "unfinished": 1, "rejected": {"helps": 1, "words": 1}
        },
        "retention": {"made": 2, "kept": 1, "unfinished": 0, "rejected": {"length": 1}},
    }  # fmt: skip
    assert counts([]) == {}
