"""A part of what a night trained, where the gate passes no more of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from editable import tiny_hybrid, word_tokenizer
from memories import OPEN, bits, same

from hybrid_sleep.parametric import Memory, MemoryOptions, StudyOptions
from hybrid_sleep.parametric.experience.night import Made
from hybrid_sleep.parametric.mix import Shares

pytest.importorskip("cryptography")

TOKENIZER = word_tokenizer()
STUDY = StudyOptions(
    tokens=400, dreams=0, shares=Shares(1.0, 0.0, 0.0), foundation=64, measured=4, rate=2e-3,
    strength=0.01, band=(0, 100), share=1.0,
)  # fmt: skip
ORDINARY = [[1, *range(i, i + 10)] for i in range(3, 23)]
ROWS = {"corpus": [[1, 4, 5, 6, 7], [1, 9, 8, 7, 6]], "ordinary": ORDINARY}


@pytest.fixture
def night(tmp_path):
    """One night with `study` and `thresholds`, each over a folder and a model of its own."""

    def make(name, thresholds=OPEN, **study):
        model = tiny_hybrid()
        options = MemoryOptions(thresholds=thresholds, study=replace(STUDY, **study))
        with Memory.open(tmp_path / name, model, TOKENIZER, options=options, **ROWS) as memory:
            first = bits(model)
            memory.experience("Ada lives in Rome .", consent=True)
            record = memory.sleep(kind="experience")
            slept = bits(model)
            if record.outcome == "committed":
                memory.undo()
            assert same(first, bits(model))
        return record, first, slept

    return make


def test_a_part_of_the_change_is_added_below_the_edits():
    below = {"a": torch.tensor([1.0]), "other": torch.tensor([5.0])}
    made = Made(below, {"a": torch.tensor([2.0])}, {"a": torch.tensor([4.0])})
    assert [float(made.at(scale)["a"]) for scale in (1.0, 0.75, 0.5)] == [3.0, 2.5, 2.0]
    assert made.at(0.5)["other"] is below["other"] and float(below["a"]) == 1


def test_the_largest_part_that_the_gate_passes_stays(night):
    kept = {}
    for scale in (1.0, 0.5):
        record, first, slept = night(f"at {scale}", scales=(scale,))
        assert record.outcome == "committed"
        assert [x["scale"] for x in record.gate["tried"]] == [scale]
        kept[scale], at = record.gate["after"]["locality"], slept
        if scale == 1:
            assert record.why == ""
            whole = slept
    # Half of the change, parameter by parameter, to a rounding in fp32.
    for name, start in first.items():
        wanted = start.double() + 0.5 * (whole[name].double() - start.double())
        assert torch.allclose(at[name].double(), wanted, rtol=1e-6, atol=1e-8), name
    assert kept[1.0] < kept[0.5] < 1
    between = replace(OPEN, locality=(kept[0.5] + kept[1.0]) / 2)
    record, _, slept = night("between", between, scales=(1.0, 0.5, 0.25))
    assert record.outcome == "committed" and same(slept, at)
    assert record.ended == "committed: at 0.5 times the change"
    assert record.gate["after"]["locality"] == kept[0.5]
    assert [x["scale"] for x in record.gate["tried"]] == [1.0, 0.5]
    assert "failed at 1 times the change: locality" in str(record)
    none = replace(OPEN, locality=1.0)
    record, first, slept = night("none", none, scales=(1.0, 0.5))
    assert record.outcome == "rolled back" and same(first, slept)
    assert record.why.startswith("locality ")
    assert "; at 0.5 times the change locality " in record.why


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((), "must be one or more, falling, got ()"),
        ((0.5, 1.0), "must be one or more, falling, got (0.5, 1.0)"),
        ((1.0, 1.0), "must be one or more, falling"),
        ((1.5, 1.0), "scales must be at most 1, got 1.5"),
        ((1.0, 0.0), "scales must be a finite number above 0, got 0.0"),
    ],
)
def test_scales_that_cannot_be_are_refused(scales, message):
    with pytest.raises(ValueError) as error:
        StudyOptions(scales=scales)
    assert message in str(error.value)


def test_options_of_a_folder_from_before_try_as_many():
    data = StudyOptions().to_dict()
    assert StudyOptions.from_dict({**data, "scales": [1.0, 0.9]}).scales == (1.0, 0.9)
    del data["scales"]
    assert StudyOptions.from_dict(data) == StudyOptions()
