"""Training end to end on a tiny model: exact resume, whole checkpoints, clean stops."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.eval import tasks
from hybrid_sleep.training import run as run_module
from hybrid_sleep.training.callbacks import StopOnSignal
from hybrid_sleep.training.config import load_run_config, run_config
from hybrid_sleep.training.data import HeldOut, TaskBatches
from hybrid_sleep.training.depth import Uniform
from hybrid_sleep.training.run import build_trainer, train
from hybrid_sleep.training.trainer import SleepTrainer, accuracy_by_depth, checkpoints

ROOT = Path(__file__).parents[2]
MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def small_run(out, task=None, model=None, **settings):
    defaults = {"steps": 6, "batch_size": 8, "lr_muon": 0.02, "lr_adamw": 0.003, "warmup": 2}
    return run_config(
        {
            "model": {**MODEL, **(model or {})},
            "task": {"name": "rule110", "params": task or {"width": 4, "states": 2, "steps": 1}},
            "train": {**defaults, "device": "cpu", "log_every": 2, **settings},
            "sleep_passes": {"uniform": [1, 3]},
            "output_dir": str(out),
        }
    )


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_records(folder):
    return [record for record in records(folder) if "loss" in record]


def weights(folder):
    return HybridSleepForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class StopAt(TrainerCallback):
    """Asks for a stop as a signal would, after a given step."""

    def __init__(self, stop, step):
        self.stop, self.step = stop, step

    def on_step_begin(self, args, state, control, **kwargs):
        self.stop.requested |= state.global_step == self.step - 1


def interrupt_at(monkeypatch, step):
    build = run_module.build_trainer

    def build_and_interrupt(*arguments):
        trainer = build(*arguments)
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
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(tmp_path, monkeypatch, settings, model):
    whole = train(small_run(tmp_path / "whole", model=model, **settings), progress=False)
    run = small_run(tmp_path / "parts", model=model, **settings)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step=3)
        with pytest.raises(KeyboardInterrupt, match="step 3 of 6 is saved in .*--resume"):
            train(run, progress=False)
    assert not list((tmp_path / "parts").glob("*.safetensors"))
    assert [path.name for path in checkpoints(tmp_path / "parts")] == ["checkpoint-3"]
    parts = train(run, resume=True, progress=False)
    assert_same_weights(weights(parts.model_dir), weights(whole.model_dir))
    assert step_records(parts.model_dir) == step_records(whole.model_dir)
    assert parts.metrics == whole.metrics
    assert len({record["depth"] for record in step_records(whole.model_dir)}) > 1


def test_a_step_trains_at_the_depth_of_its_seed_and_number(tmp_path):
    run = small_run(tmp_path, seed=3)
    seen = []
    trainer = build_trainer(run)
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: (
        seen.append((kwargs["sleep_passes"], kwargs["input_ids"].clone())) or forward(**kwargs)
    )
    trainer.train()
    assert [depth for depth, _ in seen] == [Uniform(1, 3).draw(3, step) for step in range(6)]
    batches = TaskBatches(run.load_task(), length=6, size=8, seed=3)
    assert all(torch.equal(ids, batches[i]["input_ids"]) for i, (_, ids) in enumerate(seen))


def test_micro_batches_of_a_step_are_one_batch(tmp_path):
    """Same examples, same depth: accumulating in two parts gives the gradient of the whole."""
    task = tasks.load("rule110", width=4, states=2, steps=1)
    whole = TaskBatches(task, length=2, size=8, seed=0)

    class Halves(TaskBatches):
        def __getitem__(self, index):
            half = slice(4) if index % 2 == 0 else slice(4, 8)
            return {name: rows[half] for name, rows in whole[index // 2].items()}

    states = []
    for accumulate, data in ((1, whole), (2, Halves(task, length=4, size=4))):
        trainer = build_trainer(
            small_run(tmp_path / str(accumulate), steps=2, accumulate=accumulate, warmup=0)
        )
        trainer.train_dataset = data
        trainer.train()
        states.append(trainer.model.state_dict())
        assert trainer.last_step.tokens == 8 * task.length
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_of_transformers_is_refused(tmp_path, name):
    model = build_trainer(small_run(tmp_path)).model
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    setattr(arguments, name, True)
    with pytest.raises(ValueError, match=f"{name}=True; allowed: False, .* fast weights"):
        SleepTrainer(model, arguments)


def test_own_checkpointing_changes_nothing(tmp_path):
    plain = train(small_run(tmp_path / "plain"), progress=False)
    for granularity in ("block", "pass"):
        run = small_run(tmp_path / granularity, activation_checkpointing=granularity)
        recomputed = train(run, progress=False)
        assert_same_weights(weights(recomputed.model_dir), weights(plain.model_dir))


def test_killed_while_saving_leaves_the_old_checkpoint_to_resume_from(tmp_path):
    """A real kill, in the middle of writing the optimizer state of the second checkpoint."""
    out = tmp_path / "out"
    config = tmp_path / "run.yaml"
    config.write_text(small_run(out, save_every=2).to_yaml())
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys, torch\n"
        "from hybrid_sleep.training import load_run_config, train\n"
        "save = torch.save\n"
        "def half(content, place, *args, **kwargs):\n"
        "    if 'checkpoint-4' in str(place) and 'optimizer' in str(place):\n"
        "        open(place, 'wb').write(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return save(content, place, *args, **kwargs)\n"
        "torch.save = half\n"
        "train(load_run_config(sys.argv[1]), progress=False)\n"
    )
    killed = subprocess.run(
        [sys.executable, str(script), str(config)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert any(out.rglob("optimizer.pt"))
    resumed = train(small_run(out, save_every=2), resume=True, progress=False)
    whole = train(small_run(tmp_path / "whole", save_every=2), progress=False)
    assert_same_weights(weights(resumed.model_dir), weights(whole.model_dir))
    assert step_records(out) == step_records(tmp_path / "whole")
    assert [path.name for path in checkpoints(out)] == ["checkpoint-6"]
    assert not (out / ".partial").exists()


def test_killed_while_saving_the_model_leaves_the_old_one_whole(tmp_path, monkeypatch):
    run = small_run(tmp_path, steps=2)
    result = train(run, progress=False)
    before = weights(result.model_dir)
    trainer = build_trainer(run)

    class Killed(BaseException):
        pass

    def half(folder, **kwargs):
        (Path(folder)).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(trainer.model, "save_pretrained", half)
    with pytest.raises(Killed):
        run_module.save_model(trainer.model, run, tmp_path)
    assert_same_weights(weights(tmp_path), before)


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path):
    usual = signal.getsignal(signal.SIGINT)
    run = small_run(tmp_path, steps=4000)
    me = threading.main_thread().ident

    def interrupt():
        while not step_records(tmp_path) if (tmp_path / "metrics.jsonl").exists() else True:
            time.sleep(0.01)
        signal.pthread_kill(me, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="is saved in"):
        train(run, progress=False)
    (saved,) = checkpoints(tmp_path)
    state = json.loads((saved / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 4000
    assert step_records(tmp_path)[-1]["step"] == state["global_step"]
    assert signal.getsignal(signal.SIGINT) is usual


def test_a_folder_with_a_run_is_not_overwritten_by_accident(tmp_path):
    run = small_run(tmp_path, steps=2, warmup=0, save_every=1)
    train(run, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="resume=True .* overwrite=True"):
        train(run, progress=False)
    with pytest.raises(ValueError, match="resume=True and overwrite=True"):
        train(run, resume=True, overwrite=True, progress=False)
    other = small_run(tmp_path, steps=2, warmup=0, save_every=1, lr_muon=0.5)
    with pytest.raises(ValueError, match="train.lr_muon=0.5 to resume a run with .*=0.02"):
        train(other, resume=True, progress=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        train(small_run(tmp_path / "none"), resume=True, progress=False)
    train(other, overwrite=True, progress=False)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_diverging_runs_end_with_the_step_and_save_nothing(tmp_path):
    trainer = build_trainer(small_run(tmp_path))
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight lm_head.weight is not finite at step 0"):
        trainer._save_checkpoint(trainer.model, None)
    with pytest.raises(ValueError, match="weight lm_head.weight is not finite at the end"):
        run_module.save_model(trainer.model, small_run(tmp_path), tmp_path)
    assert not checkpoints(tmp_path) and not list(tmp_path.rglob("*.safetensors"))
    log = run_module.RunLog(trainer, tmp_path / "metrics.jsonl", every=2)
    trainer.add_callback(log)
    with pytest.raises(ValueError, match=r"loss is nan at step 1 \(sleep_passes=1\); try a lower"):
        trainer.train()


def test_training_improves_on_the_floor_and_saves_what_it_measured(tmp_path):
    task = {"width": 3, "states": 1, "steps": 1}
    settings = {"batch_size": 64, "eval_every": 50, "lr_muon": 0.05, "lr_adamw": 0.01}
    run = small_run(tmp_path, task=task, steps=150, **settings)
    result = train(run, progress=False)
    floor = run.load_task().floor()["exact"]
    assert min(result.metrics["exact"].values()) > floor + 0.2
    assert result.steps == 150
    model = HybridSleepForCausalLM.from_pretrained(result.model_dir)
    held_out = HeldOut(task=run.load_task(), depths=(1, 2, 3), count=1000, seed=0)
    again = accuracy_by_depth(model, held_out)
    assert {depth: score["exact"] for depth, score in again.items()} == result.metrics["exact"]
    assert load_run_config(result.model_dir / "run.yaml") == run


def test_accuracy_by_depth_asks_what_a_user_would(tmp_path):
    """Against generating the answers one by one, through a cache, at each depth."""
    run = small_run(tmp_path)
    trainer = build_trainer(run)
    trainer.train()
    task = run.load_task()
    held_out = HeldOut(task=task, depths=(1, 3), count=40, seed=1, batch_size=16)
    scores = accuracy_by_depth(trainer.model, held_out)
    trainer.model.eval()
    batches = list(held_out.batches())
    assert [len(batch["labels"]) for batch in batches] == [16, 16, 8]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    for depth, score in scores.items():
        answered = trainer.model.generate(
            ids[:, : -task.states], max_new_tokens=task.states, do_sample=False, sleep_passes=depth
        )
        exact = (answered == ids).all(1).float().mean().item()
        assert score["exact"] == pytest.approx(exact)


def test_held_out_examples_are_in_no_training_batch():
    task = tasks.load("rule110", width=24, states=4, steps=1)
    held_out = HeldOut(task=task, depths=(1,), count=1000)
    held = {tuple(row) for b in held_out.batches() for row in b["input_ids"].tolist()}
    batches = TaskBatches(task, length=40, size=64, seed=0)
    rows = [tuple(row) for i in range(40) for row in batches[i]["input_ids"].tolist()]
    assert len(held) == 1000
    assert not held & set(rows)
    assert len(set(rows)) == len(rows)
    other_rank = TaskBatches(task, length=40, size=64, seed=0, rank=1)
    assert not torch.equal(other_rank[0]["input_ids"], batches[0]["input_ids"])
    with pytest.raises(IndexError, match="allowed: 0..39"):
        batches[40]


class Rows(Dataset):
    """An ordinary dataset of single examples."""

    def __init__(self, task):
        batch = task.batch("train", 0, 32)
        self.rows = [{name: rows[i] for name, rows in batch.items()} for i in range(32)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_the_trainer_takes_ordinary_datasets_and_keeps_the_best_checkpoint(tmp_path):
    run = small_run(tmp_path)
    model = build_trainer(run).model
    rows = Rows(run.load_task())
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        max_steps=6,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        remove_unused_columns=False,
        use_cpu=True,
        use_cache=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = SleepTrainer(model, arguments, sleep_passes=2, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best in checkpoints(tmp_path / "plain")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert best.name == f"checkpoint-{2 * (1 + losses.index(min(losses)))}"
    shutil.rmtree(best)
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW"
