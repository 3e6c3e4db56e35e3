"""A token of every model, measured in lockstep, and what becomes of the numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hybrid_sleep import SleepCache
from hybrid_sleep.eval.costs import decoding
from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.costs.models import untrained
from hybrid_sleep.eval.results import read, save

SIZES = {"hidden": 64, "layers": 2, "window": 20}


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile gives back what it gets."""
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)


def test_each_model_takes_its_tokens_behind_each_past(uncompiled, tmp_path):
    result = decoding.run(Call(repeats=6, out=tmp_path), batches=(1, 2), windows=(0, 2), **SIZES)
    assert [(row.batch, row.windows) for row in result.rows] == [(1, 0), (2, 0), (1, 2), (2, 2)]
    kinds = ("hybrid_sleep", "olmo_hybrid", "qwen3_next")
    for row in result.rows:
        assert sorted(row.costs) == sorted([*kinds, *(f"{kind}, compiled" for kind in kinds)])
        assert row.costs["hybrid_sleep"].path == "in place"
        assert row.costs["hybrid_sleep, compiled"].path.startswith("in place, compiled")
        assert row.times_as_fast(decoding.REFERENCE) == 1
        for cost in row.costs.values():
            assert cost.token.median > 0 and cost.prompt_seconds > 0 and cost.cache_bytes > 0
    held = {(row.batch, row.windows): row.costs for row in result.rows}
    # Ours holds fast weights and one window, theirs the whole past.
    for name, grows in (("hybrid_sleep", False), ("olmo_hybrid", True), ("qwen3_next", True)):
        before, after = (held[1, past][name].cache_bytes for past in (0, 2))
        assert (after > before) == grows, name
        assert held[2, 0][name].cache_bytes == 2 * before
    # Dims are the same but for what a family has of its own.
    sizes = [result.parameters[kind] for kind in kinds]
    assert max(sizes) < 1.02 * min(sizes)
    again = decoding.run(Call(repeats=6, out=tmp_path), batches=(1, 2), windows=(0, 2), **SIZES)
    assert again.rows == result.rows


def test_tokens_are_those_that_each_model_says_alone(uncompiled):
    models = {"hybrid_sleep": untrained("gated_deltanet", head_dim=64, vocabulary=90, **SIZES)}
    ids = torch.randint(1, 90, (2, 48), generator=torch.Generator().manual_seed(0))
    for make in decoding.variants(models, 3).values():
        runner = make()
        with torch.no_grad():
            runner.read(ids)
            said = [runner.tokens]
            for _ in range(6):
                runner.step()
                said.append(runner.tokens)
            model, cache = models["hybrid_sleep"], SleepCache(runner.model.config)
            wanted = model.generate(
                ids, cache=cache, max_new_tokens=7, do_sample=False, sleep_passes=3,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert torch.equal(torch.cat(said, 1), wanted[:, 48:])


def test_ratios_are_token_by_token(uncompiled, monkeypatch):
    """The median of ratios, not the ratio of medians."""
    times = {"hybrid_sleep, compiled": [1.0, 4.0, 2.0], "peer": [3.0, 4.0, 8.0]}
    now = [0.0]

    class Timed:
        path = "timed"
        cache = SimpleNamespace(layers=[])

        def __init__(self, name):
            self.left = [0.0, 0.0, 0.0, *times[name]]

        def read(self, ids):
            now[0] += 10.0

        def step(self):
            now[0] += self.left.pop(0)

    monkeypatch.setattr(
        decoding, "variants", lambda *_: {name: lambda name=name: Timed(name) for name in times}
    )
    costs = decoding.compare({}, torch.zeros(1, 1), 3, 1, lambda: now[0])
    assert costs["peer"]["ratio"]["median"] == 3.0
    assert costs["peer"]["token"]["median"] == 4.0
    assert costs["peer"]["prompt_seconds"] == 10.0
    assert costs["hybrid_sleep, compiled"]["ratio"]["median"] == 1.0


def test_what_does_not_run_says_why(uncompiled, monkeypatch, tmp_path):
    real = decoding.variants

    def broken():
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(decoding, "variants", lambda *args: {**real(*args), "other": broken})
    result = decoding.run(Call(repeats=2), batches=(1,), windows=(0,), **SIZES)
    (row,) = result.rows
    assert row.costs["other"].path == "does not run: RuntimeError: no such kernel"
    assert row.times_as_fast("other") is None
    save(result, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "- other with 1 rows does not run: RuntimeError: no such kernel." in text
    assert read(tmp_path / "results.json", decoding.DecodingCost) == result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (-1,)}, "windows must be"),
        ({"batches": (0,)}, "batches must be"),
        ({"window": 13}, "window must be"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decoding.run(Call(repeats=2), **{**SIZES, **changes})
