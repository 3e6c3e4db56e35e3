"""Costs of generating and of sleeping: the bookkeeping on made-up times, a tiny run of each."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from hybrid_sleep.eval import results
from hybrid_sleep.eval.costs import call as calls
from hybrid_sleep.eval.costs import generation, sleep_cpu, sleep_gpu
from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.costs.models import untrained
from hybrid_sleep.eval.render import sleep_gpu as gpu_pages
from hybrid_sleep.support import resume

TINY = sleep_cpu.Shape(state_space="mamba2", batch=2, window=5, hidden=16, layers=2)


def test_a_sleep_is_charged_to_the_window_that_slept():
    """Windows of 3: forwards 3 and 6 begin with a sleep, of windows 1 and 2."""
    clock = generation.Clock(None, 3, torch.device("cpu"), lambda: None)
    clock.forwards = [1.0, 2.0, 6.0, 5.0 + 10.0, 2.0, 9.0, 1.0 + 20.0]
    clock.cache_bytes, clock.process_bytes = [7, 8], [70, 80]
    costs = generation.Costs.of(clock, [10.0, 20.0])
    assert costs.steps == [[1.0, 2.0, 6.0], [5.0, 2.0, 9.0]]
    assert (costs.sleeps, costs.cache, costs.process) == ([10.0, 20.0], [7, 8], [70, 80])


def test_each_window_is_compared_with_its_fresh_one():
    long = generation.Costs([[1.0, 2.0, 6.0], [5.0, 2.0, 9.0]], [10.0, 20.0], [7, 8], [70, 80])
    fresh = [
        generation.Costs([[1.0, 1.0, 2.0]], [5.0], [7], [70]),
        generation.Costs([[10.0, 2.0, 3.0]], [40.0], [7], [70]),
    ]
    costs = generation.compare(long, fresh)
    assert costs["token"] == [2.0, 5.0] and costs["fresh_token"] == [1.0, 3.0]
    # Token by token: 1, 2, 3 and 0.5, 1, 3.
    assert costs["ratio_token"] == [2.0, 1.0]
    assert costs["ratio_sleep"] == [2.0, 0.5]
    assert costs["total"] == [pytest.approx(2 + 10 / 3), pytest.approx(5 + 20 / 3)]
    assert costs["ratio_total"][1] == pytest.approx((5 + 20 / 3) / (3 + 40 / 3))
    assert costs["cache"] == [7, 8] and costs["process"] == [70, 80]


def test_the_clock_reads_the_cache_when_a_window_is_full(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now.seconds)
    cache = SimpleNamespace(held=0, nbytes=lambda: cache.held)

    def off_the_clock():
        now.seconds += 1000.0

    clock = generation.Clock(cache, 3, torch.device("cpu"), off_the_clock)
    clock.put("prompt of one token")
    for read in range(1, 8):
        cache.held = read  # tokens read when the next one comes
        now.seconds += read
        clock.put("token")
    clock.end()
    assert clock.forwards == [1, 2, 3, 4, 5, 6, 7]
    assert clock.cache_bytes == [3, 6]


def test_work_in_steps_runs_only_when_told_to():
    done = []

    def work(pause):
        for number in range(2):
            done.append(number)
            pause()
        done.append("end")
        return "result"

    steps = generation.InSteps(work)
    assert done == []
    for expected in ([0], [0, 1], [0, 1, "end"]):
        steps.step()
        assert done == expected
    assert steps.result == "result"


def test_an_error_in_a_step_is_raised_by_it():
    def work(pause):
        pause()
        raise RuntimeError("from the thread")

    steps = generation.InSteps(work)
    steps.step()
    with pytest.raises(RuntimeError, match="from the thread"):
        steps.step()


def test_the_fresh_windows_keep_step_with_the_long_run(monkeypatch):
    """Forward by forward: each token of a window is followed by the same token of a fresh one."""
    order, real = [], generation.Clock.put

    def noting(clock, value):
        if clock.resumed is not None:
            order.append((id(clock), len(clock.forwards)))
        real(clock, value)

    monkeypatch.setattr(generation.Clock, "put", noting)
    generation.run(windows=2, window=3, passes=1, repeats=1, hidden=16, layers=2)
    clocks = list(dict.fromkeys(clock for clock, _ in order))
    warm, long, first, second = range(4)
    named = [(clocks.index(clock), forward) for clock, forward in order]
    assert [step for step in named if step[0] == warm] == [(warm, j) for j in range(7)]
    assert [step for step in named if step[0] != warm] == [
        (long, 0), (first, 0), (long, 1), (first, 1), (long, 2), (first, 2),
        (long, 3), (first, 3), (second, 0), (long, 4), (second, 1), (long, 5), (second, 2),
        (long, 6), (second, 3),
    ]  # fmt: skip


def test_trend_ignores_one_disturbed_window():
    values = [1.0 + 0.01 * index for index in range(11)]
    assert generation.trend(values) == pytest.approx(1.1)
    values[4] = 50.0
    assert generation.trend(values) == pytest.approx(1.1, rel=0.01)


def test_generation_runs_and_the_cache_does_not_grow(tmp_path):
    result = generation.run(windows=4, window=4, passes=2, repeats=1, hidden=16, layers=2)
    per_window = result.per_window
    assert all(len(values) == 4 for values in per_window.values())
    assert len(set(per_window["cache"])) == 1 and per_window["cache"][0] > 0
    assert result.ratio["cache"] == 1.0
    for name in ("sleep", "total"):
        ratio = per_window[name][-1] / per_window[f"fresh_{name}"][-1]
        assert result.ratio[name] == pytest.approx(ratio)
    paths = results.save(result, tmp_path)
    assert "window 4" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


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


def test_interrupted_they_keep_what_is_finished(tmp_path):
    def stop(done, total):
        if done == limit:
            raise KeyboardInterrupt

    limit = 1
    result = time_sleeps((2, 3), progress=stop)
    assert result.ended == "interrupted" and [row.passes for row in result.rows] == [2]
    assert "Not complete (interrupted)" in results.save(result, tmp_path)[1].read_text()

    options = {"windows": 2, "window": 3, "passes": 1, "hidden": 16, "layers": 2}
    limit = 3  # of the second repeat
    result = generation.run(**options, repeats=2, progress=stop)
    assert result.ended == "interrupted" and result.repeats == 1
    limit = 1
    with pytest.raises(KeyboardInterrupt):
        generation.run(**options, repeats=2, progress=stop)


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
        (lambda: generation.run(windows=1), r"windows must be .* at least 2, got 1"),
        (lambda: generation.run(repeats=0), r"repeats must be .* at least 1, got 0"),
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
