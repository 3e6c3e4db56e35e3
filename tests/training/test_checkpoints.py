"""Stopping, resuming, being killed: nothing finished is lost, and the rest goes on bit for bit."""

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import in_a_fork
from transformers import TrainerCallback

from hybrid_sleep.training import run as run_module
from hybrid_sleep.training.__main__ import main
from hybrid_sleep.training.callbacks import StopOnSignal
from hybrid_sleep.training.folder import checkpoints
from hybrid_sleep.training.run import build_trainer, train
from hybrid_sleep.training.trainer import SleepTrainer


class StopAt(TrainerCallback):
    """Asks for a stop as a signal would, after a given step."""

    def __init__(self, stop, step):
        self.stop, self.step = stop, step

    def on_step_begin(self, args, state, control, **kwargs):
        self.stop.requested |= state.global_step == self.step - 1


def interrupt_at(monkeypatch, step):
    build = run_module.build_trainer

    def build_and_interrupt(*arguments, **keywords):
        trainer = build(*arguments, **keywords)
        add = trainer.add_callback

        def watch(callback):
            add(callback)
            if isinstance(callback, StopOnSignal):
                add(StopAt(callback, step))

        trainer.add_callback = watch
        return trainer

    monkeypatch.setattr(run_module, "build_trainer", build_and_interrupt)


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({"schedule": "cosine"}, {}),
        ({"schedule": "trapezoid", "accumulate": 2, "eval_every": 4}, {"state_space": "mamba2"}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(
    tmp_path, monkeypatch, settings, model, tiny
):
    whole = train(tiny.run(tmp_path / "whole", model=model, **settings), progress=False)
    run = tiny.run(tmp_path / "parts", model=model, **settings)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step=3)
        with pytest.raises(KeyboardInterrupt, match="step 3 of 6 is saved in .*--resume"):
            train(run, progress=False)
    assert not list((tmp_path / "parts").glob("*.safetensors"))
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["checkpoint-3"]
    parts = train(run, resume=True, progress=False)
    tiny.assert_same(tiny.weights(parts.model_dir), tiny.weights(whole.model_dir))
    assert tiny.steps(parts.model_dir) == tiny.steps(whole.model_dir)
    assert parts.metrics == whole.metrics
    assert len({record["depth"] for record in tiny.steps(whole.model_dir)}) > 1


def test_killed_while_saving_leaves_the_old_checkpoint_to_resume_from(tmp_path, tiny):
    """A real kill, in the middle of writing the optimizer state of the second checkpoint."""
    out, save = tmp_path / "out", torch.save

    def half(content, place, *args, **kwargs):
        if "checkpoint-4" in str(place) and "optimizer" in str(place):
            Path(place).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return save(content, place, *args, **kwargs)

    def work():
        torch.save = half
        train(tiny.run(out, save_every=2), progress=False)

    said = tmp_path / "said"
    assert in_a_fork(work, said) == -signal.SIGKILL, said.read_text()
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert any(out.rglob("optimizer.pt"))
    resumed = train(tiny.run(out, save_every=2), resume=True, progress=False)
    whole = train(tiny.run(tmp_path / "whole", save_every=2), progress=False)
    tiny.assert_same(tiny.weights(resumed.model_dir), tiny.weights(whole.model_dir))
    assert tiny.steps(out) == tiny.steps(tmp_path / "whole")
    assert [path.name for path in checkpoints(out)] == ["checkpoint-6"]
    assert not (out / ".partial").exists()


def test_killed_while_saving_the_model_leaves_the_old_one_whole(tmp_path, monkeypatch, tiny):
    run = tiny.run(tmp_path, steps=2)
    result = train(run, progress=False)
    before = tiny.weights(result.model_dir)
    trainer = build_trainer(run)

    class Killed(BaseException):
        pass

    def half(folder, **kwargs):
        (Path(folder)).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(trainer.model, "save_pretrained", half)
    with pytest.raises(Killed):
        run_module.save_model(trainer, run, tmp_path)
    tiny.assert_same(tiny.weights(tmp_path), before)


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, tiny):
    usual = signal.getsignal(signal.SIGINT)
    run = tiny.run(tmp_path, steps=4000)
    me = threading.main_thread().ident

    def interrupt():
        while not tiny.steps(tmp_path) if (tmp_path / "metrics.jsonl").exists() else True:
            time.sleep(0.01)
        signal.pthread_kill(me, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="is saved in"):
        train(run, progress=False)
    (saved,) = checkpoints(tmp_path)
    state = json.loads((saved / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 4000
    assert tiny.steps(tmp_path)[-1]["step"] == state["global_step"]
    assert signal.getsignal(signal.SIGINT) is usual


def test_a_folder_with_a_run_is_not_overwritten_by_accident(tmp_path, tiny):
    run = tiny.run(tmp_path, steps=2, warmup=0, save_every=1)
    train(run, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        FileExistsError, match="must be a folder without a run, .* resume=True .* overwrite=True"
    ):
        train(run, progress=False)
    with pytest.raises(ValueError, match="one of resume and overwrite must be False, got True"):
        train(run, resume=True, overwrite=True, progress=False)
    other = tiny.run(tmp_path, steps=2, warmup=0, save_every=1, lr_muon=0.5)
    with pytest.raises(
        ValueError, match="train.lr_muon must be 0.02, as in the run that is resumed, .*, got 0.5"
    ):
        train(other, resume=True, progress=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        FileNotFoundError, match="output_dir must hold a checkpoint .* to resume from, got"
    ):
        train(tiny.run(tmp_path / "none"), resume=True, progress=False)
    train(other, overwrite=True, progress=False)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_diverging_runs_end_with_the_step_and_save_nothing(tmp_path, tiny):
    trainer = build_trainer(tiny.run(tmp_path))
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight lm_head.weight is not finite at step 0"):
        trainer._save_checkpoint(trainer.model, None)
    with pytest.raises(ValueError, match="weight lm_head.weight is not finite at the end"):
        run_module.save_model(trainer, tiny.run(tmp_path), tmp_path)
    assert not checkpoints(tmp_path) and not list(tmp_path.rglob("*.safetensors"))
    log = run_module.RunLog(trainer, tmp_path / "metrics.jsonl", every=2)
    trainer.add_callback(log)
    with pytest.raises(ValueError, match=r"loss is nan at step 1 \(sleep_passes=1\); try a lower"):
        trainer.train()


def test_a_full_disk_ends_the_run_and_names_the_last_good_checkpoint(tmp_path, tiny):
    """Files may not grow beyond a few bytes once the second checkpoint is due."""
    config = tmp_path / "run.yaml"
    config.write_text(tiny.run(tmp_path / "out", save_every=2).to_yaml())
    save = SleepTrainer._save_checkpoint

    def on_a_full_disk(self, *arguments):
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        save(self, *arguments)

    def work():
        SleepTrainer._save_checkpoint = on_a_full_disk
        return main([str(config), "--quiet"])

    code = in_a_fork(work, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert code == 2, said
    saved = tmp_path / "out" / "checkpoint-2"
    assert "error: the checkpoint of step 4 could not be written: " in said
    assert f"the last good checkpoint is {saved}, --resume goes on from there" in said
    assert checkpoints(tmp_path / "out") == [saved]
    assert not (tmp_path / "out" / ".partial").exists()
    train(tiny.run(tmp_path / "out", save_every=2), resume=True, progress=False)
