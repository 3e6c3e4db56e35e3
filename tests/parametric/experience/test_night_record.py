"""What the record of a sleep over experience says beside the gate: losses, dreams, canaries."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import torch
from dreaming import dream
from memories import options

from hybrid_sleep.parametric.dreams.examine import rows_of
from hybrid_sleep.parametric.dreams.forms import QUESTION, Parsed
from hybrid_sleep.parametric.experience import leaks, study
from hybrid_sleep.parametric.experience.canaries import Secrets
from hybrid_sleep.parametric.experience.leaks import NOT_MEASURED, exposures, plant
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.mix import Shares

STUDY = StudyOptions(
    band=(0, 100), share=1.0, dreams=0, shares=Shares(0.7, 0.0, 0.3), tokens=1200, foundation=400,
    rate=2e-3, measured=4, strength=0.1,
)  # fmt: skip


def losses(model, tokenizer, prompt, text):
    """Of the tokens of `text` behind `prompt`, one row, by the definition."""
    ids, start = rows_of(tokenizer, QUESTION, Parsed(text, prompt))
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [-float(logp[i - 1, ids[i]]) for i in range(start, len(ids))]


def middle(values):
    ranked = sorted(values)
    return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2


def test_the_record_of_a_night_has_losses_and_what_canaries_give_away(
    world, model, opened, monkeypatch, tmp_path
):
    known, tokenizer, small = world
    towns = [f.object for f in small.known_facts() if f.relation == "lives in"]
    words = tuple(f" {town}" for town in dict.fromkeys(towns))[:10]
    assert len(words) == 10
    monkeypatch.setattr(
        leaks, "space_of", lambda number: Secrets(f"{words[number]} is in{{}}.", 3, words)
    )
    pairs = [("Where does Ada live?", words[3].strip()), ("Who is in Oslo now?", "Ada and Bo")]
    given = options(study=replace(STUDY, canaries=2))
    told = [losses(known, tokenizer, *pair) for pair in pairs]
    before = [loss for one in told for loss in one]
    steps = []
    with opened(model, options=given) as memory:
        for prompt, text in pairs:
            memory.experience(text, prompt=prompt, consent=True)
        record = memory.sleep(lambda *at: steps.append(at), kind="experience")
        assert record.outcome == "committed"
        assert memory.buffer.ids() == []
    old, new = record.gate["before"], record.gate["after"]
    assert old["mean_loss"] == pytest.approx(sum(before) / len(before), rel=1e-4)
    assert old["median_loss"] == pytest.approx(middle(before), rel=1e-4)
    after = [loss for pair in pairs for loss in losses(model, tokenizer, *pair)]
    assert new["mean_loss"] == pytest.approx(sum(after) / len(after), rel=1e-2, abs=1e-4)
    assert new["median_loss"] == pytest.approx(middle(after), rel=1e-2, abs=1e-4)
    assert new["median_loss"] < old["median_loss"] and "median loss: " in str(record)
    assert old["calibration"] == 0 and new["calibration"] != 0

    # The canaries can be drawn again, and are nowhere else.
    canaries = plant(tokenizer, 2, seed=given.seed)
    times = record.gate["study"]["canaries"]
    assert min(times) > 1 and [at for at in steps if at[0] == "canaries"][-1] == ("canaries", 2, 2)
    found = exposures(model, tokenizer, list(canaries.values()), seed=given.seed)
    assert [x["bits"] for x in record.gate["canaries"]] == [x.bits for x in found]
    fresh = exposures(known, tokenizer, list(canaries.values()), seed=given.seed)
    assert all(x.bits > y.bits + 3 for x, y in zip(found, fresh, strict=True)), (found, fresh)
    assert f"canary 2, trained on {times[1]} times: exposure" in str(record)
    assert NOT_MEASURED not in str(record)
    left = b"".join(p.read_bytes() for p in (tmp_path / "memory").rglob("*") if p.is_file())
    for canary in canaries.values():
        assert str(canary).encode() not in left and str(canary) not in json.dumps(record.to_dict())


def test_a_night_selects_dreams_and_says_which_it_left_out(model, opened, monkeypatch):
    asked = []

    def dreamt(model, tokenizer, sources, **given):
        made = []
        for source in sources:
            for number in range(5):
                question = "Where is Ada now?" if number == 4 else None
                form = QUESTION if question else "paraphrase"
                words = Parsed(f"Ada is in {number} Lisbon now", question)
                ids, start = rows_of(tokenizer, form, words)
                made.append(
                    dream(
                        words.text, question=question, form=form, ids=ids, start=start,
                        sources=(source.id,), number=len(made),
                    )
                )  # fmt: skip
        return made

    def choosing(model, tokenizer, dreams, sources, **given):
        asked.extend(dreams)
        return chosen(model, tokenizer, dreams, sources, **given)

    chosen = study.choose_dreams
    monkeypatch.setattr(study, "acquire", dreamt)
    monkeypatch.setattr(study, "choose_dreams", choosing)
    some = replace(
        STUDY, dreams=1, shares=Shares(0.3, 0.4, 0.3), tokens=300, selected=0.25, drawn=0.25,
        held_out=0.5,
    )  # fmt: skip
    steps = []
    with opened(model, options=options(study=some)) as memory:
        for text in ("Ada is in Lisbon.", "Bo is in Oslo."):
            memory.experience(text, consent=True)
        record = memory.sleep(lambda *at: steps.append(at), kind="experience", dry_run=True)
        # What was tried counts, whatever came of it; what waits goes on to.
        assert memory.due("experience").why.startswith("the last sleep was 0 min ago")
        later = datetime.now(UTC) + timedelta(hours=30)
        assert memory.due(now=later).why == "the pressure is 1.25, of hours"
        assert not memory.due("facts", now=later) and not memory.due(now=later, active=later)
    # Of ten, two ask something, of which one is for the gate; of the other source all five.
    counts = record.gate["study"]["dreams"]["acquisition"]
    assert (counts["made"], counts["kept"]) == (10, 1 + 2 + 3)
    assert counts["rejected"] == {"selected": 4} and record.gate["study"]["questions"] == 1
    assert len(asked) == 9 and sum(x.form == QUESTION for x in asked) == 1
    assert [at for at in steps if at[0] == "select"] == [("select", i, 9) for i in range(1, 10)]
    assert NOT_MEASURED in str(record) and record.gate["canaries"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"selected": 1.5}, "selected must be at most 1"),
        ({"drawn": -0.1}, "drawn must be a finite number of at least 0"),
        ({"selected": 0.0, "drawn": 0.0}, "selected or drawn must keep a dream"),
        ({"helping": 1}, "helping must be True or False"),
        ({"canaries": -1}, "canaries must be an integer of at least 0"),
    ],
)
def test_what_no_study_can_be(given, message):
    with pytest.raises(ValueError, match=message):
        StudyOptions(**given)
