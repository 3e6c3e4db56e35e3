"""Costs of sleeping on a CPU and on a GPU: bookkeeping on made-up times, a tiny run of each."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from hybrid_sleep.eval import results
from hybrid_sleep.eval.costs import call as calls
from hybrid_sleep.eval.costs import sleep_cpu, sleep_gpu
from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.costs.models import untrained
from hybrid_sleep.eval.render import sleep_gpu as gpu_pages
from hybrid_sleep.support import resume

TINY = sleep_cpu.Shape(state_space="mamba2", batch=2, window=5, hidden=16, layers=2)


def time_sleeps(passes, repeats=2, least_seconds=0, **call):
    return sleep_cpu.run(
        Call(repeats=repeats, **call), shapes=[TINY], passes=passes, least_seconds=least_seconds
    )


def test_sleep_is_timed_at_the_depth_asked_for(tmp_path):
    result = time_sleeps((2, 3))
    assert [(row.passes, row.bound) for row in result.rows] == [(2, 0.5), (3, 2 / 3)]
    for row in result.rows:
        assert row.pairs >= 2
        assert row.quartiles[0] <= row.ratio <= row.quartiles[1]
    paths = results.save(result, tmp_path)
    assert results.read(paths[0], sleep_cpu.SleepCost) == result
    text = paths[1].read_text()
    assert text.count("| mamba2 |") == 2
    assert all(("yes" if row.ratio <= row.bound else "**no**") in text for row in result.rows)
    assert "Measured on a CPU; says nothing about a GPU" in text


def test_a_sleep_that_stops_early_is_not_timed(monkeypatch):
    model = untrained("mamba2", hidden=16, layers=2, window=5)
    asleep = model.sleep
    monkeypatch.setattr(model, "sleep", lambda cache, passes: asleep(cache, passes=passes - 1))
    with pytest.raises(RuntimeError, match="2 passes where 3"):
        sleep_cpu.time_pairs(model, 1, 3, 2, 0)


def test_interrupted_it_keeps_what_is_finished(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    result = time_sleeps((2, 3), progress=stop)
    assert result.ended == "interrupted" and [row.passes for row in result.rows] == [2]
    assert "Not complete (interrupted)" in results.save(result, tmp_path)[1].read_text()


def counting(monkeypatch) -> list:
    """The depths that are timed from now on; times are made up."""
    timed = []

    def time_pairs(model, batch, depth, *_):
        timed.append(depth)
        return [(1.0, 2.0), (1.0, 2.5)]

    monkeypatch.setattr(sleep_cpu, "time_pairs", time_pairs)
    return timed


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    timed = counting(monkeypatch)
    first = time_sleeps((2, 3), out=tmp_path)
    assert timed == [2, 3] and first.complete
    again = time_sleeps((4, 3, 2), out=tmp_path)
    assert timed == [2, 3, 4]
    assert [row.passes for row in again.rows] == [4, 3, 2]
    # Other code, versions or another device: nothing of it counts.
    now = calls.provenance("cpu")
    monkeypatch.setattr(calls, "provenance", lambda device: {**now, "torch": "1.0"})
    with pytest.warns(UserWarning, match="its 3 rows were measured with another torch; all rows"):
        time_sleeps((2,), out=tmp_path)
    assert timed == [2, 3, 4, 2]


def test_every_row_is_on_the_disk_before_the_next_one(tmp_path, monkeypatch):
    timed = counting(monkeypatch)

    def stop(done, total):
        written = results.read(tmp_path / "results.json", sleep_cpu.SleepCost)
        assert [row.passes for row in written.rows] == timed and not written.complete
        if done == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        time_sleeps((2, 3, 4), out=tmp_path, progress=stop)
    assert time_sleeps((2, 3, 4), out=tmp_path).complete
    assert timed == [2, 3, 4]


def test_it_stops_before_its_time_is_up_and_goes_on(tmp_path, monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(resume.time, "monotonic", lambda: now.seconds)
    timed = []

    def time_pairs(model, batch, depth, *_):
        timed.append(depth)
        now.seconds += 100
        return [(1.0, 2.0)] * 2

    monkeypatch.setattr(sleep_cpu, "time_pairs", time_pairs)
    part = time_sleeps((2, 3, 4, 5, 6), out=tmp_path, minutes=4)
    assert timed == [2, 3] and now.seconds <= 240
    assert (part.ended, part.complete) == ("time is up", False)
    assert "Not complete (time is up)" in results.save(part, tmp_path)[1].read_text()
    again = time_sleeps((2, 3, 4, 5, 6), out=tmp_path, minutes=60)
    assert again.ended == "done" and timed == [2, 3, 4, 5, 6]


def test_medians_of_pairs_whose_times_are_made_up(tmp_path, monkeypatch):
    pairs = [(1.0, 2.0), (3.0, 4.0), (2.0, 10.0)]
    monkeypatch.setattr(sleep_cpu, "time_pairs", lambda *_: pairs)
    (row,) = time_sleeps((4,)).rows
    assert (row.pairs, row.sleep_seconds, row.calls_seconds) == (3, 2.0, 4.0)
    # Of the ratios .5, .75 and .2, not of the medians.
    assert row.ratio == 0.5 and row.quartiles == [0.35, 0.625] and row.within


def test_every_shape_makes_a_model_that_sleeps(monkeypatch):
    """The kind of layers, eviction and looped blocks that a row names are those of its model."""
    models = {}

    def note(model, batch, depth, *_):
        models[len(models)] = (model.config, batch, depth)
        return [(1.0, 2.0)] * 2

    monkeypatch.setattr(sleep_cpu, "time_pairs", note)
    result = sleep_cpu.run(Call(repeats=2), passes=(3,))
    for row, (config, batch, depth) in zip(result.rows, models.values(), strict=True):
        assert (config.state_space, config.eviction) == (row.state_space, row.eviction)
        assert config.loop_range == (row.loop or (0, row.layers))
        assert (config.window, config.hidden_size, batch, depth) == (
            row.window, row.hidden, row.batch, 3,
        )  # fmt: skip
        assert "linear_attention" in config.layer_types[slice(*config.loop_range)]


SMALL = {"hidden": 16, "layers": 4, "window": 6, "head_dim": 8, "vocabulary": 32,
         "dtype": "float32"}  # fmt: skip


@pytest.fixture(scope="module")
def on_gpu():
    """A result as a GPU would give it, measured on this CPU without graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sleep_gpu, "SIZE", SMALL)
        patch.setattr(sleep_gpu, "WINDOWS", 3)
        bench = sleep_gpu.Bench("cpu", 2, least_seconds=0.0)
        planned = [key for key in sleep_gpu.planned_rows() if key["state_space"] != "mamba2"]
        return Call(repeats=2).measure(sleep_gpu.GpuSleepCost, planned, bench.measure)


def test_gpu_rows_are_measured_and_shown(on_gpu, tmp_path):
    assert [(row.batch, row.passes) for row in on_gpu.sleeps] == [
        (batch, passes) for batch in (1, 16) for passes in (4, 2, 8, 1)
    ]
    for row in on_gpu.sleeps:
        assert row.rounds == 2 and row.path.startswith("eager: ")
        middle = [row.seconds[name].median for name in ("calls", "eager")]
        assert all(x > 0 for x in middle) and row.peak_bytes["graph"] is None
    assert [row.batch for row in on_gpu.decoding] == [1, 16]
    for row in on_gpu.decoding:
        assert row.cache_bytes["before"] == row.cache_bytes["after"]
    paths = results.save(on_gpu, tmp_path)
    assert results.read(paths[0], sleep_gpu.GpuSleepCost) == on_gpu
    text = paths[1].read_text()
    assert text.count("| gated_deltanet |") == 10 and "after 3 windows" in text


def test_the_target_is_met_from_graphs_alone_and_silent_without_its_row(on_gpu):
    on_gpu = copy.deepcopy(on_gpu)
    row = next(row for row in on_gpu.sleeps if (row.batch, row.passes) == (1, 4))
    row.speedup["graph"].median = 9.0
    assert on_gpu.target_met is False
    row.path = "cuda graph: replayed"
    assert on_gpu.target_met is True and ": met." in gpu_pages.markdown(on_gpu)
    row.speedup["graph"].median = 2.9
    assert on_gpu.target_met is False and "**missed**" in gpu_pages.markdown(on_gpu)
    on_gpu.rows.remove(row)
    assert on_gpu.target_met is None and "Target" not in gpu_pages.markdown(on_gpu)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Call(repeats=1), r"repeats must be .* at least 2, got 1"),
        (lambda: Call(repeats=2, device="abacus"), r"device.*abacus"),
        (lambda: time_sleeps((1,)), r"passes must be .* at least 2, got 1"),
        (lambda: time_sleeps((2,), minutes=0), r"minutes must be a finite number above 0, got 0"),
        (lambda: sleep_gpu.run(Call(repeats=2)), r"device must be a GPU.*got 'cpu'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
