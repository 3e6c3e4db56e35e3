"""Cost benchmarks: the bookkeeping on made-up times, and one tiny run of each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hybrid_sleep.eval import results
from hybrid_sleep.eval.benchmarks import generation, sleep, sleep_on_gpu
from hybrid_sleep.eval.benchmarks.models import untrained
from hybrid_sleep.support import provenance, resume

TINY = sleep.Shape(state_space="mamba2", batch=2, window=5, hidden=16, layers=2)


def idle():
    pass


def test_a_sleep_is_charged_to_the_window_that_slept():
    """Windows of 3: forwards 3 and 6 begin with a sleep, of windows 1 and 2."""
    clock = generation.Clock(None, 3, torch.device("cpu"), idle)
    clock.forwards = [1.0, 2.0, 6.0, 5.0 + 10.0, 2.0, 9.0, 1.0 + 20.0]
    clock.cache_bytes, clock.process_bytes = [7, 8], [70, 80]
    costs = generation.Costs.of(clock, [10.0, 20.0])
    assert costs.awake == [[1.0, 2.0, 6.0], [5.0, 2.0, 9.0]]
    assert (costs.sleeps, costs.cache, costs.process) == ([10.0, 20.0], [7, 8], [70, 80])


def test_each_window_is_compared_with_the_fresh_one_beside_it():
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
        (long, 0), (first, 0), (first, 1), (long, 1), (long, 2), (first, 2),
        (first, 3), (long, 3), (second, 0), (long, 4), (second, 1), (second, 2), (long, 5),
        (long, 6), (second, 3),
    ]  # fmt: skip


def test_trend_ignores_one_disturbed_window():
    values = [1.0 + 0.01 * index for index in range(11)]
    assert generation.trend(values) == pytest.approx(1.1)
    values[4] = 50.0
    assert generation.trend(values) == pytest.approx(1.1, rel=0.01)


def test_generation_runs_and_the_cache_does_not_grow(tmp_path):
    result = generation.run(windows=4, window=4, passes=2, repeats=1, hidden=16, layers=2)
    per_window = result["per_window"]
    assert all(len(values) == 4 for values in per_window.values())
    assert len(set(per_window["cache"])) == 1 and per_window["cache"][0] > 0
    assert result["ratio"]["cache"] == 1.0
    for name in ("sleep", "total"):
        ratio = per_window[name][-1] / per_window[f"fresh_{name}"][-1]
        assert result["ratio"][name] == pytest.approx(ratio)
    paths = results.save(result, tmp_path)
    assert "window 4" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_sleep_is_timed_at_the_depth_asked_for(tmp_path):
    result = sleep.run(shapes=[TINY], passes=(2, 3), repeats=2, least_seconds=0)
    assert [(row["passes"], row["bound"]) for row in result["rows"]] == [(2, 0.5), (3, 2 / 3)]
    for row in result["rows"]:
        assert row["pairs"] >= 2
        assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
    paths = results.save(result, tmp_path)
    text = paths[1].read_text()
    assert text.count("| mamba2 |") == 2
    assert all(("yes" if row["ratio"] <= row["bound"] else "**no**") in text
               for row in result["rows"])  # fmt: skip


def test_a_sleep_that_stops_early_is_not_timed(monkeypatch):
    model = untrained("mamba2", hidden=16, layers=2, window=5)
    asleep = model.sleep
    monkeypatch.setattr(model, "sleep", lambda cache, passes: asleep(cache, passes=passes - 1))
    with pytest.raises(RuntimeError, match="2 passes where 3"):
        sleep.time_pairs(model, 1, 3, 2, 0)


def test_interrupted_they_keep_what_is_finished(tmp_path):
    def stop(done, total):
        if done == limit:
            raise KeyboardInterrupt

    limit = 1
    result = sleep.run(shapes=[TINY], passes=(2, 3), repeats=2, least_seconds=0, progress=stop)
    assert not result["complete"] and [row["passes"] for row in result["rows"]] == [2]
    assert "Interrupted" in results.save(result, tmp_path)[1].read_text()

    options = {"windows": 2, "window": 3, "passes": 1, "hidden": 16, "layers": 2}
    limit = 3  # of the second repeat
    result = generation.run(**options, repeats=2, progress=stop)
    assert not result["complete"] and result["repeats"] == 1
    limit = 1
    with pytest.raises(KeyboardInterrupt):
        generation.run(**options, repeats=2, progress=stop)


def counting(monkeypatch) -> list:
    """The depths that are timed from now on; times are made up."""
    timed = []

    def time_pairs(model, batch, depth, *_):
        timed.append(depth)
        return [(1.0, 2.0), (1.0, 2.5)]

    monkeypatch.setattr(sleep, "time_pairs", time_pairs)
    return timed


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    timed = counting(monkeypatch)
    first = sleep.run(shapes=[TINY], passes=(2, 3), repeats=2, out=tmp_path)
    assert timed == [2, 3] and first["complete"] and first["ended"] == "done"
    again = sleep.run(shapes=[TINY], passes=(4, 3, 2), repeats=2, out=tmp_path)
    assert timed == [2, 3, 4]
    assert [row["passes"] for row in again["rows"]] == [4, 3, 2]
    # Other code, versions or another device: nothing of it counts.
    now = provenance.provenance("cpu")
    monkeypatch.setattr(sleep, "provenance", lambda device: {**now, "torch": "1.0"})
    with pytest.warns(UserWarning, match="its 3 rows were measured with another torch; all rows"):
        sleep.run(shapes=[TINY], passes=(2,), repeats=2, out=tmp_path)
    assert timed == [2, 3, 4, 2]


def test_every_row_is_on_the_disk_before_the_next_one(tmp_path, monkeypatch):
    timed = counting(monkeypatch)

    def stop(done, total):
        written = json.loads((tmp_path / "results.json").read_text())
        assert [row["passes"] for row in written["rows"]] == timed and not written["complete"]
        if done == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        sleep.run(shapes=[TINY], passes=(2, 3, 4), repeats=2, out=tmp_path, progress=stop)
    assert sleep.run(shapes=[TINY], passes=(2, 3, 4), repeats=2, out=tmp_path)["complete"]
    assert timed == [2, 3, 4]


def test_it_stops_before_its_time_is_up_and_goes_on(tmp_path, monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(resume.time, "monotonic", lambda: now.seconds)
    timed = []

    def time_pairs(model, batch, depth, *_):
        timed.append(depth)
        now.seconds += 100
        return [(1.0, 2.0)] * 2

    monkeypatch.setattr(sleep, "time_pairs", time_pairs)
    how = {"shapes": [TINY], "passes": (2, 3, 4, 5, 6), "repeats": 2, "out": tmp_path}
    part = sleep.run(**how, minutes=4)
    assert timed == [2, 3] and now.seconds <= 240
    assert (part["ended"], part["complete"]) == ("time is up", False)
    assert "Time is up" in results.save(part, tmp_path)[1].read_text()
    assert sleep.run(**how, minutes=60)["ended"] == "done" and timed == [2, 3, 4, 5, 6]


def test_a_cpu_has_nothing_to_say_about_a_gpu(tmp_path, monkeypatch):
    counting(monkeypatch)
    result = sleep.run(shapes=[TINY], passes=(2,), repeats=2)
    assert result["measured_on"] == "cpu" and "target" not in result
    text = results.save(result, tmp_path)[1].read_text()
    assert "Measured on a CPU; says nothing about a GPU" in text
    assert "cuda" not in json.dumps(result["rows"])


def test_results_from_before_graphs_are_still_rendered(tmp_path):
    committed = Path(sleep.__file__).parents[1] / "results" / "sleep"
    (tmp_path / "results.json").write_bytes((committed / "results.json").read_bytes())
    table, _ = results.render(tmp_path / "results.json")
    assert table.read_text() == (committed / "results.md").read_text()


SMALL = {"hidden": 16, "layers": 4, "window": 6, "head_dim": 8, "vocabulary": 32,
         "dtype": "float32"}  # fmt: skip


@pytest.fixture
def on_gpu(monkeypatch):
    """A result as a GPU would give it, measured on this CPU without graphs."""
    monkeypatch.setattr(sleep_on_gpu, "SIZE", SMALL)
    monkeypatch.setattr(sleep_on_gpu, "WINDOWS", 3)
    bench = sleep_on_gpu.Bench("cpu", 2)
    rounds = bench._rounds
    bench._rounds = lambda works, **how: rounds(works, **{**how, "least_seconds": 0.0})
    result = {"benchmark": "sleep", "measured_on": "cuda", "command": None,
              "provenance": provenance.provenance("cpu")}  # fmt: skip
    wanted = [row for row in sleep_on_gpu.wanted_rows() if row["state_space"] == "gated_deltanet"]
    return resume.collect(result, wanted, bench.measure, finish=sleep_on_gpu.judge)


def test_gpu_rows_are_measured_and_shown(on_gpu, tmp_path):
    sleeps = [row for row in on_gpu["rows"] if row["kind"] == "sleep"]
    assert [(row["batch"], row["passes"]) for row in sleeps] == [
        (batch, passes) for batch in (1, 16) for passes in (4, 2, 8, 1)
    ]
    for row in sleeps:
        assert row["rounds"] == 2 and row["path"].startswith("eager: ")
    for row in on_gpu["rows"]:
        if row["kind"] == "wake":
            assert row["cache_bytes"]["before"] == row["cache_bytes"]["after"]
    text = results.save(on_gpu, tmp_path)[1].read_text()
    assert text.count("| gated_deltanet |") == 10 and "after 64 windows" in text


def test_the_target_is_met_from_graphs_alone_and_silent_without_its_row(on_gpu):
    row = next(r for r in on_gpu["rows"] if (r["batch"], r["passes"]) == (1, 4))
    row["speedup"]["graph"]["median"] = 9.0
    sleep_on_gpu.judge(on_gpu)
    assert on_gpu["target"]["met"] is False
    row["path"] = "cuda graph: replayed"
    sleep_on_gpu.judge(on_gpu)
    assert on_gpu["target"]["met"] is True and ": met." in sleep_on_gpu.markdown(on_gpu)
    row["speedup"]["graph"]["median"] = 2.9
    sleep_on_gpu.judge(on_gpu)
    assert on_gpu["target"]["met"] is False and "**missed**" in sleep_on_gpu.markdown(on_gpu)
    on_gpu["rows"].remove(row)
    sleep_on_gpu.judge(on_gpu)
    assert "target" not in on_gpu and "Target" not in sleep_on_gpu.markdown(on_gpu)


def test_shapes_cover_both_state_spaces_evictions_and_a_loop_range():
    assert {shape.state_space for shape in sleep.SHAPES} == {"gated_deltanet", "mamba2"}
    assert {shape.eviction for shape in sleep.SHAPES} == {"hard", "sliding"}
    assert any(shape.loop for shape in sleep.SHAPES)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: generation.run(windows=1), r"windows=1.*at least 2"),
        (lambda: generation.run(repeats=0), r"repeats=0.*at least 1"),
        (lambda: sleep.run(repeats=1), r"repeats=1.*at least 2"),
        (lambda: sleep.run(passes=(1,)), r"passes=1.*at least 2"),
        (lambda: sleep.run(minutes=0), r"minutes must be a finite number above 0, got 0"),
        (lambda: sleep_on_gpu.run(device="cpu"), r"device='cpu'.*GPU.*allowed: cuda"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
