"""The training benchmark: memory against counts by hand, options in order, verdicts, files."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from hybrid_sleep.cli.app import app
from hybrid_sleep.eval import results
from hybrid_sleep.eval.costs import call as calls
from hybrid_sleep.eval.costs import training
from hybrid_sleep.eval.costs.call import Call
from hybrid_sleep.eval.costs.timing import Spread
from hybrid_sleep.eval.costs.training import TrainingCost, TrainingRow
from hybrid_sleep.eval.render import training as pages

CPU = torch.device("cpu")
TINY = {"batch": 2, "hidden": 16, "layers": 2, "head_dim": 8, "vocabulary": 32, "autocast": None,
        "window": 4, "windows": 2, "passes": 2}  # fmt: skip


def tiny(checkpointing=None, truncation=None, **changes):
    return {**TINY, **changes, "checkpointing": checkpointing, "truncation": truncation}


def test_memory_of_a_matrix_product_by_hand():
    x, w = torch.ones(8, 16), torch.ones(16, 32, requires_grad=True)
    xw, dw, scalar = 8 * 32 * 4, 16 * 32 * 4, 4
    found = training.memory_of(lambda: (x @ w).relu().sum(), CPU)
    assert found == {
        # The rectified product and the loss; the product itself is gone.
        "held_bytes": xw + scalar,
        # Two gradients, of the product and of w, beside the loss and the gradient of the loss.
        "peak_bytes": xw + dw + 2 * scalar,
        "left_bytes": dw,
    }


def test_memory_of_a_chain_by_hand():
    """Each exp keeps its result, and the first gradient comes while all three are there."""
    x = torch.zeros(1000, requires_grad=True)
    found = training.memory_of(lambda: x.exp().exp().exp().sum(), CPU)
    assert found == {"held_bytes": 12_004, "peak_bytes": 16_008, "left_bytes": 4_000}


def test_gradients_that_are_there_already_are_added_to():
    x = torch.zeros(1000, requires_grad=True)
    x.grad = torch.zeros(1000)
    found = training.memory_of(lambda: x.exp().sum(), CPU)
    assert found == {"held_bytes": 4_004, "peak_bytes": 8_008, "left_bytes": 0}


class Live(TorchDispatchMode):
    """The storages that operations made, by weak reference."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.made or self.made[storage._cdata][0].expired():
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def now(self, given):
        return sum(
            size
            for key, (reference, size) in self.made.items()
            if key not in given and not reference.expired()
        )


@pytest.mark.parametrize("checkpointing", [None, "block"])
def test_what_a_step_holds_is_what_weak_references_count(checkpointing):
    names = tiny(checkpointing, layers=4)
    bench = training.Bench("cpu", 2)
    bench._prepare(names)
    step = training.Step(bench._model, names)
    found = step.memory(names)
    given = {x.untyped_storage()._cdata for x in (*bench._model.parameters(), step.ids)}
    step._begin(names)
    gc.disable()
    try:
        with Live() as live:
            loss = step._forward(names)
            counted = live.now(given)
    finally:
        gc.enable()
    # Two windows of four blocks, and a pass that ends with the third, the last that writes: each
    # keeps the state of the generator, which no operation makes.
    blocks = 0 if checkpointing is None else 2 * 4 + 3
    counted += blocks * torch.get_rng_state().nbytes
    assert found["held_bytes"] == pytest.approx(counted, rel=0.01)
    loss.backward()
    gradients = [p.grad for p in bench._model.parameters() if p.grad is not None]
    assert found["gradient_bytes"] == sum(x.nbytes for x in gradients) > 0


@pytest.mark.slow
def test_options_in_order_of_what_they_need():
    sizes = {"batch": 64, "window": 8, "windows": 4, "layers": 4}
    bench, peak, held = training.Bench("cpu", 2), {}, {}
    for option in (None, "window", "pass", "block", ["window", "block"]):
        names = tiny(option, **sizes)
        bench._prepare(names)
        memory = training.Step(bench._model, names).memory(names)
        name = pages.label(option)
        peak[name], held[name] = memory["peak_bytes"], memory["held_bytes"]
    assert peak["none"] > 2 * peak["window"] > 2 * peak["pass"]
    assert peak["window"] > peak["window + block"]
    assert held["none"] > held["block"] > held["pass"] > held["window"]
    names = tiny(None, 1, **sizes)
    assert training.Step(bench._model, names).memory(names)["peak_bytes"] < peak["none"]


@pytest.fixture
def base(monkeypatch):
    """The tiny setting is the one with the target; nothing is collected before its short steps."""
    monkeypatch.setattr(training.gc, "collect", lambda: 0)
    setting = {name: TINY[name] for name in ("window", "windows", "passes")}
    monkeypatch.setitem(training.BASE, "cpu", setting)


def test_rows_are_measured_shown_and_rebuilt(tmp_path, base):
    rows = [tiny(), tiny("pass"), tiny(["window", 1]), tiny(None, 1), tiny(passes=1)]
    threads = torch.get_num_threads()
    result = training.run(Call(repeats=2, out=tmp_path), rows=rows)
    assert torch.get_num_threads() == threads and result.provenance["threads"] == 1
    assert result.complete and result.measured_on == "cpu"
    plain, by_pass, nested, cut, awake = result.rows
    assert plain.time_ratio is None and result.memory_ratio(plain) == 1.0
    assert result.memory_ratio(awake) == 1.0 and awake.peak_bytes < plain.peak_bytes
    for row in (by_pass, nested, cut):
        assert result.memory_ratio(row) == row.peak_bytes / plain.peak_bytes < 1
        low, high = row.time_ratio.quartiles
        assert low <= row.time_ratio.median <= high
    for row in result.rows:
        assert row.rounds == 2 and not row.out_of_memory
        tokens = row.batch * row.windows * row.window
        assert row.tokens_per_second == pytest.approx(tokens / row.cpu_seconds.median)
    path, table, figure = results.save(result, tmp_path)
    assert results.read(path, TrainingCost) == result
    first, picture = table.read_text(), figure.read_bytes()
    assert "| window + 1 layer | all passes |" in first and "| none | last 1 |" in first
    assert picture.startswith(b"\x89PNG")
    table.unlink()
    figure.unlink()
    results.render(path)
    assert table.read_text() == first and figure.read_bytes() == picture


def made_up(memory, time, checkpointing=None, truncation=None, **changes):
    ratio = None if time is None else Spread(time, [time, time])
    key = tiny(checkpointing, truncation, **changes)
    return TrainingRow(**key, out_of_memory=memory is None, peak_bytes=memory, time_ratio=ratio)


def result_of(rows):
    how = {"measured_on": "cpu", "clock": "cpu_seconds", "repeats": 2}
    return TrainingCost(**how, rows=rows, provenance={})


@pytest.mark.parametrize(
    ("memory", "time", "met"), [(10, 1.4, True), (11, 1.0, False), (5, 1.41, False)]
)
def test_the_target_needs_both(base, memory, time, met):
    rows = [made_up(100, None), made_up(memory, time, "pass"), made_up(1, 1.0, None, 1)]
    assert result_of(rows).target_met_by == (["pass"] if met else [])
    # Nothing is said of another setting, or without the row to compare with.
    for unlike in ([made_up(x, y, z, windows=5) for x, y, z in ((9, None, None), (1, 1, "pass"))],
                   rows[1:], [made_up(None, None), rows[1]]):  # fmt: skip
        assert result_of(unlike).target_met_by is None


def no_room(monkeypatch, method, refused):
    real = getattr(training.Step, method)

    def refuse(step, names):
        if refused(names):
            raise torch.OutOfMemoryError("no room")
        return real(step, names)

    monkeypatch.setattr(training.Step, method, refuse)


@pytest.mark.parametrize("method", ["memory", "seconds"])
def test_what_does_not_fit_is_a_row_and_not_the_end(monkeypatch, base, method):
    no_room(monkeypatch, method, lambda key: key["checkpointing"] is None)
    result = training.run(Call(repeats=2), rows=[tiny("block"), tiny(), tiny("pass")])
    block, plain, by_pass = result.rows
    assert result.complete and plain.out_of_memory and plain.peak_bytes is None
    for row in (block, by_pass):
        assert not row.out_of_memory and row.tokens_per_second > 0
        assert result.memory_ratio(row) is None
    assert by_pass.time_ratio is None and result.target_met_by is None
    assert pages.markdown(result).count("out of memory") == 1
    pages.figure(result)


def test_pairs_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(
        training.Step, "seconds",
        lambda step, key: order.append(key["checkpointing"]) or
        {"wall_seconds": 9.0, "cpu_seconds": 3.0 if key["checkpointing"] else 2.0},
    )  # fmt: skip
    row = training.Bench("cpu", 3).measure(tiny("block"))
    assert order == ["block", None, None, "block", "block", None]
    assert row["time_ratio"]["median"] == 1.5 and row["wall_seconds"]["median"] == 9.0
    assert row["tokens_per_second"] == 2 * 2 * 4 / 3.0


def test_finished_rows_are_kept(tmp_path, monkeypatch):
    # Others may be at work on the code.
    monkeypatch.setattr(calls, "provenance", lambda device: {"source": "this"})
    asked = []
    monkeypatch.setattr(
        training.Bench, "measure",
        lambda bench, key: asked.append(key["checkpointing"]) or
        {"peak_bytes": 1, "time_ratio": None, "out_of_memory": False},
    )  # fmt: skip
    first = [tiny(), tiny(["window", 2])]
    training.run(Call(repeats=2, out=tmp_path), rows=first)
    training.run(Call(repeats=2, out=tmp_path), rows=[*first, tiny("block")])
    assert asked == [None, ["window", 2], "block"]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_way_is_asked_for_where_the_target_is(kind):
    rows = [TrainingRow(**key, out_of_memory=False) for key in training.planned_rows(kind)]
    assert all(row not in rows[:index] for index, row in enumerate(rows))
    first = [row for row in rows if row.at(training.BASE[kind])]
    assert first == rows[: len(first)] and rows[0].keeps_everything
    assert (rows[0].windows, rows[0].passes) == (8, 4)
    shown = set(map(pages.option, first))
    assert {"none", "block", "pass", "window", "window + block", "none, last 2 of N"} <= shown
    assert all(row.truncation is None or row.truncation < row.passes for row in rows)
    for name in ("passes", "windows", "window"):
        assert len({getattr(row, name) for row in rows}) > 1


@pytest.mark.parametrize(
    ("call", "rows", "message"),
    [
        ({"minutes": 0}, [tiny()], r"minutes must be a finite number above 0, got 0"),
        ({}, [tiny("layer")], r"granularity must be None, 'block'"),
        ({}, [tiny(None, 0)], r"passes must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, rows, message):
    with pytest.raises(ValueError, match=message):
        training.run(Call(repeats=2, **call), rows=rows)


def test_the_command_says_what_is_wrong():
    said = CliRunner().invoke(app, ["bench", "train", "--repeats", "1"])
    assert said.exit_code == 2 and "repeats must be an integer of at least 2, got 1" in said.stderr
