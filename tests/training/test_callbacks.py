"""What a run writes and shows while it goes on, in one process and in several."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import in_a_fork
from transformers import TrainerControl, TrainerState

from hybrid_sleep.training.callbacks import Display, RunLog, StopOnSignal, memory_in_use
from hybrid_sleep.training.loop import StepRecord
from hybrid_sleep.training.losses import LossByPosition
from hybrid_sleep.training.run import build_trainer


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def fake_trainer(folder):
    """What RunLog asks of a trainer."""
    return SimpleNamespace(args=SimpleNamespace(process_index=0, output_dir=str(folder)))


class Steps:
    """Calls the callbacks as Trainer does, for losses that are given."""

    def __init__(self, log, max_steps=100):
        self.log, self.control = log, TrainerControl()
        self.state = TrainerState(max_steps=max_steps)
        self.optimizer = SimpleNamespace(param_groups=[{"algorithm": "muon", "lr": 0.5}])

    def begin(self, step=0):
        self.state.global_step = step
        self.log.on_train_begin(None, self.state, self.control)

    def step(self, loss, depth=1):
        self.log.on_optimizer_step(None, self.state, self.control, optimizer=self.optimizer)
        record = StepRecord(self.state.global_step, depth, 10, torch.tensor(loss))
        self.log.trainer.last_step = record
        self.state.global_step += 1
        self.log.on_step_end(None, self.state, self.control)


def test_losses_by_position_and_depth_are_those_of_the_steps_since_the_last(tmp_path, tiny):
    run = tiny.run(tmp_path, steps=7, log_every=3)
    trainer = build_trainer(run)
    path = tmp_path / "metrics.jsonl"
    trainer.add_callback(RunLog(trainer, path, 3, losses=trainer.losses))
    trainer.train()
    steps = tiny.steps(tmp_path)
    found = [record for record in records(path) if "loss_by_depth" in record]
    labels = run.load_task().batch("train", 0, 1)["labels"][0].tolist()
    window, bins = trainer.model.config.window, trainer.losses.bins
    places = {i % window * bins // window for i, label in enumerate(labels) if label != -100}
    assert [record["step"] for record in found] == [3, 6, 7]
    for record, some in zip(found, (steps[:3], steps[3:6], steps[6:]), strict=True):
        for depth, loss in record["loss_by_depth"].items():
            # Every step has as many labels, so a mean over tokens is one over steps.
            losses = [step["loss"] for step in some if step["depth"] == int(depth)]
            if losses:
                assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
            else:
                assert loss is None
        empty = [value is None for value in record["loss_by_position"]]
        assert empty == [place not in places for place in range(bins)]


def test_what_a_log_writes_by_hand(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run = Steps(RunLog(fake_trainer(tmp_path), path, every=2), max_steps=5)
    run.begin()
    run.step(1.0, depth=2)
    assert records(path) == []
    run.step(0.5, depth=3)
    run.control.should_save = True
    run.step(0.25)
    run.control.should_save = False
    metrics = {"eval_exact_1": 0.5, "eval_exact_4": 1.0, "eval_loss_4": 3.0, "eval_time": 9}
    run.log.on_evaluate(None, run.state, run.control, metrics)
    found = records(path)
    rate = {"lr": {"muon": 0.5}}
    assert [record for record in found if "memory" not in record] == [
        {"step": 1, "depth": 2, "loss": 1.0, **rate},
        {"step": 2, "depth": 3, "loss": 0.5, **rate},
        {"step": 3, "depth": 1, "loss": 0.25, **rate},
        {"step": 3, "exact": {"1": 0.5, "4": 1.0}, "held_out_loss": {"4": 3.0}},
    ]
    timing = [record for record in found if "memory" in record]
    assert [record["step"] for record in timing] == [2, 3]
    assert set(timing[0]) == {"step", "seconds", "tokens_per_second", "memory"}
    assert 0 < timing[0]["seconds"] < timing[1]["seconds"]
    first = timing[0]["seconds"]
    assert timing[0]["tokens_per_second"] == pytest.approx(20 / first)
    run.begin(step=2)
    assert records(path) == found[:3]
    run.step(9.0)
    run.step(8.0)
    assert records(path)[-1]["seconds"] > first


def test_a_loss_that_is_not_finite_names_the_checkpoint_to_go_on_from(tmp_path):
    def diverge():
        run = Steps(RunLog(fake_trainer(tmp_path), tmp_path / "metrics.jsonl", every=2))
        run.begin()
        run.step(1.0)
        run.step(math.inf, depth=3)

    with pytest.raises(ValueError, match=r"inf at step 2 \(sleep_passes=3\); .* was saved yet$"):
        diverge()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    ending = r"good checkpoint is .*/checkpoint-10, --resume goes on from there$"
    with pytest.raises(ValueError, match=ending):
        diverge()
    assert records(tmp_path / "metrics.jsonl") == []


def test_memory_is_what_the_process_holds():
    before = memory_in_use(torch.device("cpu"))
    block = torch.ones(2**25)
    held = memory_in_use(torch.device("cpu"))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert held["of"] == "rss"
    assert held["current"] == pytest.approx(1024 * int(status["VmRSS"].split()[0]), rel=0.02)
    assert held["peak"] == pytest.approx(1024 * int(status["VmHWM"].split()[0]), rel=0.02)
    assert held["current"] - before["current"] == pytest.approx(block.nbytes, rel=0.1)
    del block
    after = memory_in_use(torch.device("cpu"))
    assert after["peak"] > 0.99 * held["current"] > after["current"]


@pytest.mark.parametrize("columns", [80, 140])
def test_the_live_line_has_everything_and_fits(monkeypatch, capfd, columns):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    memory = {"of": "rss", "current": 3 * 2**29, "peak": 2**31}
    with Display(2000) as display:
        assert display.live
        display.start(0)
        for step in (1000, 1001):
            display.update(step, 0.25, 4, 12_345.6, memory)
    line = capfd.readouterr().err.splitlines()[-2].rpartition("\r")[2]
    shown = "1001/2000  loss 0.250  depth 4  rss 1.5/2.0 GiB  12,346 tokens/s"
    assert shown in line
    assert "left" in line
    assert ("\u2501" in line) == (columns >= 100)


def test_a_signal_between_asking_and_answering_is_not_lost(monkeypatch):
    stop, control = StopOnSignal(), TrainerControl()

    def while_asking(values, how):
        stop.requested = True
        return values

    monkeypatch.setattr("hybrid_sleep.training.callbacks.over_ranks", while_asking)
    stop.on_step_end(None, None, control)
    assert not control.should_training_stop
    stop.on_step_end(None, None, control)
    assert control.should_training_stop and control.should_save


def two_ranks(folder: Path) -> None:
    """Log losses and stop in two processes, this one and a fork of it."""
    child = os.fork()
    rank = int(child == 0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    trainer = SimpleNamespace(args=SimpleNamespace(process_index=rank, output_dir=str(folder)))
    counted, stop = LossByPosition([1, 2], bins=2), StopOnSignal()
    log = RunLog(trainer, folder / f"metrics{rank}.jsonl", 2, losses=counted)
    state, control = TrainerState(max_steps=9), TrainerControl()
    log.on_train_begin(None, state, control)
    while not control.should_training_stop:
        logits = torch.zeros(1, 3, 4)
        logits[..., 0] = rank
        counted.add(logits, torch.zeros(1, 3).long(), 2, depth=1)
        loss = torch.tensor(float(state.global_step + 10 * rank))
        trainer.last_step = StepRecord(state.global_step, 1, 10 + rank, loss)
        state.global_step += 1
        stop.requested |= rank == 1 and state.global_step == 3
        stop.on_step_end(None, state, control)
        log.on_step_end(None, state, control)
    result = {"stopped": state.global_step, "requested": stop.requested}
    loss = torch.tensor(float("nan") if rank else 1.0)
    trainer.last_step = StepRecord(state.global_step, 2, 10, loss)
    state.global_step += 1
    try:
        log.on_step_end(None, state, control)
    except ValueError as error:
        result["error"] = str(error)
    (folder / f"result{rank}.json").write_text(json.dumps(result))
    if child:
        os.waitpid(child, 0)


def test_two_ranks_write_one_log_and_stop_together(tmp_path):
    said = tmp_path / "said"
    assert in_a_fork(lambda: two_ranks(tmp_path), said) == 0, said.read_text()
    for rank in range(2):
        result = json.loads((tmp_path / f"result{rank}.json").read_text())
        assert (result["stopped"], result["requested"]) == (3, True)
        assert result["error"].startswith("loss is nan at step 4 (sleep_passes=2); ")
    assert not (tmp_path / "metrics1.jsonl").exists()
    found = records(tmp_path / "metrics0.jsonl")
    assert [record["loss"] for record in found if "loss" in record] == [5.0, 6.0, 7.0]
    timing = [record for record in found if "memory" in record]
    # Two steps of 10 tokens on one rank and 11 on the other, then one.
    seconds = (timing[0]["seconds"], timing[1]["seconds"] - timing[0]["seconds"])
    for record, tokens, taken in zip(timing, (42, 21), seconds, strict=True):
        assert record["tokens_per_second"] * taken == pytest.approx(tokens)
    # Token 1 lies in the first window's second half, token 2 in the next one's first.
    one, other = (math.log(math.exp(r) + 3) - r for r in range(2))
    positions = [record["loss_by_position"] for record in found if "loss_by_position" in record]
    assert len(positions) == 2
    for position in positions:
        assert position == pytest.approx([(one + other) / 2] * 2, rel=1e-6)
