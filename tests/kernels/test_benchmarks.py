"""The kernel benchmarks: what they compare, what they refuse to say, and what they write."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from hybrid_sleep.cli.app import app
from hybrid_sleep.eval import results
from hybrid_sleep.kernels.benchmarks import (
    cases,
    check,
    fallback,
    ops,
    report,
    suite,
)
from hybrid_sleep.kernels.benchmarks.cases import BOTH, FORWARD, STATE, Shape
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.short_conv import short_conv
from hybrid_sleep.kernels.ssd import ssd
from hybrid_sleep.support import resume

SHAPES = (fallback.Shape(5, 2, 2, 4), fallback.Shape(70, 1, 2, 4))


def test_it_compares_equal_results_and_writes_them(tmp_path):
    done = []
    result = fallback.run(
        SHAPES, repeats=3, least_seconds=0, progress=lambda *counts: done.append(counts)
    )
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(result["rows"]) == len(SHAPES) * len(fallback.TARGETS)
    for row in result["rows"]:
        assert len(row["ours_seconds"]) == len(row["fallback_seconds"]) == 3
        assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        # Different algorithms in float32: equal, but not to the last bit.
        assert 0 < row["error"] < 1e-4
    paths = results.save(result, tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.md", "fallback.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert json.loads(paths[0].read_text()) == result
    assert paths[1].read_text().count("\n| 70 | 1 | 2 | 4 |") == 1


def test_the_summary_is_a_geometric_mean_that_one_slow_shape_fails():
    rows = [{"direction": "forward", "ratio": ratio} for ratio in (2.0, 4.5)]
    assert fallback._summary(rows, "forward") == {
        "geometric_mean": pytest.approx(3.0),
        "least": 2.0,
        "target": 2.0,
        "reached": True,
    }
    rows.append({"direction": "forward", "ratio": 0.99})
    assert not fallback._summary(rows, "forward")["reached"]


def test_a_row_is_measured_once_and_the_next_call_goes_on(tmp_path, monkeypatch):
    measure = partial(fallback.run, SHAPES, repeats=2, least_seconds=0, out=tmp_path)
    over = iter([False, False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(resume.Budget, "over", lambda budget: next(over))
        first = measure()
    assert not first["complete"] and [row["T"] for row in first["rows"]] == [5, 5, 70]
    results.save(first, tmp_path)
    assert "Not complete (time is up)" in (tmp_path / "results.md").read_text()
    second = measure()
    assert second["complete"] and second["rows"][:3] == first["rows"]
    assert "Not complete" not in report.markdown(second)
    assert measure()["rows"] == second["rows"]
    empty = {**second, "rows": []}
    fallback._summarise(empty)
    assert "Nothing was measured" in report.markdown(empty) and report.figure(empty)


# Not the two heads of a check, which every implementation goes through first.
SMALL = Shape(T=9, B=2, H=3, d=4)
WITH_BASELINES = [op for op in ops.OPS if op.baselines]
FP32 = {"device": "cpu", "dtype": torch.float32}


def small(op=1, **changes):
    """An entry of OPS (by default ssd) at a small shape, forward alone."""
    return replace(ops.OPS[op], **{"shapes": (SMALL,), "directions": (FORWARD,), **changes})


def run(*entries, **options):
    return suite.run(entries, **{**FP32, "repeats": 2, "least_seconds": 0, **options})


class TestBaselines:
    @pytest.mark.parametrize("op", WITH_BASELINES, ids=lambda op: op.name)
    def test_the_fallbacks_inside_transformers_compute_our_ops(self, op):
        for direction in (FORWARD, BOTH):
            call = check.expected(op, SMALL, direction, torch.float32, "cpu")
            fallback_ = next(x for x in op.baselines if x.name == "transformers")
            own = fallback_.prepare and fallback_.prepare(call.given)
            # Far below what a baseline is allowed.
            found = check.wrong_baseline(call, fallback_.load(), own)
            assert found is None
            call.results[0].mul_(1.1)
            assert "output is off by 9" in check.wrong_baseline(call, fallback_.load(), own)

    def test_packages_are_called_for_what_our_ops_compute(self, monkeypatch):
        """Each by a stand-in with the package's names and layout."""

        def delta_rule(q, k, v, g, beta, initial_state=None, output_final_state=False):
            assert output_final_state
            return gated_delta_rule(q, k, v, g, beta, initial_state=initial_state)

        def convolution(
            x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
            activation=None,
        ):  # fmt: skip
            assert x.stride(1) == initial_states.stride(1) == 1 and return_final_states
            given = (x.mT, weight, bias)
            y, S = short_conv(*given, initial_state=initial_states.mT, activation=activation)
            return y.mT, S.mT

        def scan(
            x, dt, A, B, C, chunk_size, initial_states=None, return_final_states=False
        ):  # fmt: skip
            assert return_final_states and A.shape == x.shape[2:3]
            state = initial_states.mT
            o, S = ssd(C, B, x * dt[..., None], dt * A, initial_state=state)
            return o, S.mT

        modules = {
            "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": delta_rule},
            "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": scan},
            "causal_conv1d": {"causal_conv1d_fn": convolution},
        }
        for name, functions in modules.items():
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))
        for op in WITH_BASELINES:
            call = check.expected(op, SMALL, FORWARD, torch.float32, "cpu")
            baseline = op.baselines[0]
            own = baseline.prepare and baseline.prepare(call.given)
            assert check.wrong_baseline(call, baseline.load(), own) is None

    def test_what_is_not_installed_or_does_not_import_is_missing(self, monkeypatch, tmp_path):
        (tmp_path / "broken_package.py").write_text("raise RuntimeError('0 active drivers')\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ops.Unavailable, match="not installed: No module named 'no_such"):
            ops._load("no_such_package", "name")
        with pytest.raises(ops.Unavailable, match="RuntimeError: 0 active drivers"):
            ops._load("broken_package", "name")
        with pytest.raises(ops.Unavailable, match="has no attribute 'name'"):
            ops._load("json", "name")

    @pytest.mark.parametrize("direction", [FORWARD, STATE, BOTH])
    @pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
    def test_every_op_can_be_checked_in_each_of_its_directions(self, op, direction):
        if direction not in op.directions:
            pytest.skip("not a direction of this op")
        call = check.expected(op, SMALL, direction, torch.float32, "cpu")
        assert len(call.names) == len(call.results) == len(call.tolerances)
        assert call.names[0] == ("state" if direction == STATE else "output")
        assert check.wrong(call, cases.ours(op.op, "chunked")) is None

    def test_ops_are_chosen_by_name(self):
        assert ops.chosen(None) == ops.OPS
        assert [op.name for op in ops.chosen("short_conv, ssd")] == ["ssd", "short_conv"]
        with pytest.raises(ValueError, match="ops must be one of .*'ssd', .*got 'conv'"):
            ops.chosen("ssd,conv")


class TestSuite:
    def test_rows_hold_every_implementation_and_refuse_to_speak_of_a_gpu(self, tmp_path):
        entries = [small(index, directions=ops.OPS[index].directions) for index in range(3)]
        result = run(*entries, out=tmp_path)
        assert json.loads((tmp_path / "results.json").read_text()) == result
        assert result["complete"] and len(result["rows"]) == 3 + 3 + 2
        for row in result["rows"]:
            assert row["limits"] is row["floor_seconds"] is None
            assert "interpreter" in row["implementations"]["triton"]["reason"]
            ours = row["implementations"]["chunked"]
            assert len(ours["seconds"]) == 2 and ours["share"] is None
            assert ours["quartiles"][0] <= ours["median"] <= ours["quartiles"][1]
            assert ours["tokens_per_second"] == 18 / ours["median"]
            theirs = row["implementations"]["transformers"]
            if row["direction"] == STATE:
                assert "computes the output even" in theirs["reason"]
                assert not row["speedups"]
            else:
                assert row["speedups"]["transformers"]["of"] == "chunked"
                assert list(row["implementations"].values())[2]["reason"] == "runs on a GPU alone"
        assert all("measured on a CPU" in target["reason"] for target in result["targets"])
        assert all(target["reached"] is None for target in result["targets"])
        paths = results.save(result, tmp_path)
        assert [path.name for path in paths] == ["results.json", "results.md", "kernels.png"]
        assert "nothing here says how fast a GPU is" in paths[1].read_text()

    def test_a_kernel_that_computes_something_else_gets_a_warning_and_no_figure(self, monkeypatch):
        def slightly_off(op, impl):
            right = cases.ours(op, impl)

            def compute(given, output):
                *rest, S = right(given, output)
                return [*rest, S * 1.001]

            return compute

        monkeypatch.setattr(suite, "ours", slightly_off)
        (row,) = run(small())["rows"]
        entry = row["implementations"]["chunked"]
        assert entry["warning"].startswith("state is off by 1.0e-03, where")
        assert "median" not in entry and not row["speedups"]
        assert "**wrong here**: state is off" in report.markdown(run(small()))

    @pytest.mark.parametrize("factor", [float("nan"), 1.01])
    def test_a_wrong_gradient_is_found(self, factor):
        call = check.expected(ops.OPS[0], SMALL, BOTH, torch.float32, "cpu")
        right = cases.ours("gated_delta_rule", "chunked")
        assert check.wrong(call, right) is None

        def compute(given, output):
            # The same value with another gradient.
            v = given["v"]
            return right({**given, "v": v * factor - (v * factor - v).detach()}, output)

        if factor == factor:
            assert check.wrong(call, compute).startswith("gradient of v is off by 1.0e-02")
        else:
            assert check.wrong(call, compute).startswith("output is off by inf")

    def test_a_failure_is_an_entry_and_the_others_are_measured(self):
        calls = []

        def late(given, output):
            calls.append(1)
            if len(calls) > 2 + suite.WARM_UPS:
                raise RuntimeError("out of luck\nand more")
            return cases.ours("ssd", "chunked")(given, output)

        def missing():
            raise ops.Unavailable("not here")

        def broken():
            raise OSError("no driver")

        def full():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        loads = {"late": lambda: late, "missing": missing, "broken": broken, "full": full}
        entries = tuple(ops.Baseline(name, load, gpu=False) for name, load in loads.items())
        (row,) = run(small(baselines=entries))["rows"]
        reasons = {name: entry["reason"] for name, entry in row["implementations"].items()}
        assert reasons["late"] == "RuntimeError: out of luck"
        assert reasons["missing"] == "not here"
        assert reasons["broken"] == "OSError: no driver"
        assert reasons["full"] == "needs more memory than the device has left"
        assert reasons["chunked"] is None and len(row["implementations"]["chunked"]["seconds"]) == 2

    def test_a_row_without_any_figure_is_tried_again(self, tmp_path, monkeypatch):
        def broken(*arguments):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        with monkeypatch.context() as patch:
            patch.setattr(check, "expected", broken)
            (row,) = run(small(), out=tmp_path)["rows"]
        reasons = {entry["reason"] for entry in row["implementations"].values()}
        assert len(reasons) == 1 and "illegal memory access" in reasons.pop()
        (row,) = run(small(), out=tmp_path)["rows"]
        assert "median" in row["implementations"]["chunked"]

    def test_single_tokens_are_one_more_entry(self):
        shape, ours = Shape(T=1, B=2, H=3, d=4), ("triton", "reference")
        entry = small(0, name="a token", shapes=(shape,), ours=ours)
        (row,) = run(entry)["rows"]
        assert row["op"] == "a token" and row["speedups"]["transformers"]["of"] == "reference"

    def test_an_implementation_that_is_too_slow_is_left_out(self, monkeypatch):
        monkeypatch.setattr(suite, "SLOWEST_SECONDS", 0.0)
        (row,) = run(small())["rows"]
        assert row["implementations"]["chunked"]["reason"].startswith("one call takes 0.0 s")

    def test_work_is_sliced_and_nothing_is_measured_twice(self, tmp_path, monkeypatch):
        entries = (small(0), small(1))
        first = run(*entries, out=tmp_path, minutes=1e-9)
        assert not first["complete"] and len(first["rows"]) == 1
        assert "Not complete (time is up)" in report.markdown(first)
        second = run(*entries, out=tmp_path)
        assert second["complete"] and second["rows"][0] == first["rows"][0]
        # Another op joins what is there.
        third = run(small(2), out=tmp_path)
        assert [row["op"] for row in third["rows"]] == ["short_conv", "gated_delta_rule", "ssd"]
        monkeypatch.setattr(suite, "_row", None)
        assert run(*entries, out=tmp_path)["complete"]

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"device": "abacus"}, "device='abacus'"),
            ({"repeats": 1}, "repeats must be an integer of at least 2, got 1"),
            ({"minutes": 0}, "minutes must be a finite number above 0, got 0"),
        ],
    )
    def test_bad_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            run(small(), **options)

    def test_targets_are_read_off_a_gpus_rows_alone(self):
        def row(direction, **timed):
            found = {
                name: {"seconds": seconds, "reason": None, "warning": None}
                if isinstance(seconds, list)
                else {"reason": seconds, "warning": None}
                for name, seconds in timed.items()
            }
            shape = ops.SHAPES[0]._asdict()
            speedups = suite.speedups(found)
            return {
                "op": "gated_delta_rule", **shape, "direction": direction, "implementations": found,
                "speedups": speedups,
            }  # fmt: skip

        rows = [
            row(FORWARD, triton=[1.0, 2.0, 1.0], fla=[3.0, 6.0, 2.0]),
            row(BOTH, triton=[1.0, 1.0], fla="not installed"),
        ]
        forward, both = suite.targets(rows, "cuda")
        assert (forward["ratio"], forward["reached"], forward["reason"]) == (3.0, True, None)
        assert (both["ratio"], both["reached"]) == (None, None)
        assert both["reason"] == "fla has no figure: not installed"
        assert {x["reached"] for x in suite.targets(rows, "cpu")} == {None}
        assert {x["reason"] for x in suite.targets([], "cuda")} == {"not measured yet"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ops", "ssd"], "ops must be gated_delta_rule on a CPU without --base, got 'ssd'"),
        (["--ops", "gdn"], "ops must be one of 'gated_delta_rule', 'ssd', 'short_conv'"),
        (["--device", "abacus"], "device='abacus'"),
        (["--minutes", "0"], "minutes must be a finite number above 0, got 0.0"),
        (["--base", "no-such-branch"], "base"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(options, message, tmp_path):
    command = ["bench", "kernels", "--out", str(tmp_path), *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
