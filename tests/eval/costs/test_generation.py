"""Costs of generating: the bookkeeping on made-up times, and a tiny run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hybrid_sleep.eval import results
from hybrid_sleep.eval.costs import generation


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


def test_interrupted_it_keeps_the_repeats_that_are_finished():
    def stop(done, total):
        if done == limit:
            raise KeyboardInterrupt

    options = {"windows": 2, "window": 3, "passes": 1, "hidden": 16, "layers": 2}
    limit = 3  # of the second repeat
    result = generation.run(**options, repeats=2, progress=stop)
    assert result.ended == "interrupted" and result.repeats == 1
    limit = 1
    with pytest.raises(KeyboardInterrupt):
        generation.run(**options, repeats=2, progress=stop)


def test_bad_arguments_are_named():
    for name, least in (("windows", 2), ("window", 2), ("passes", 1), ("repeats", 1)):
        with pytest.raises(ValueError, match=f"{name} must be .* at least {least}, got 0"):
            generation.run(**{name: 0})
