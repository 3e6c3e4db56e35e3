"""Runs in several processes: one is what many are, with every ZeRO stage, killed or not."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from marks import slow
from safetensors.torch import load_file
from transformers import TrainingArguments

from hybrid_sleep.training import train
from hybrid_sleep.training.build import build_trainer, training_arguments
from hybrid_sleep.training.folder import checkpoints

ROOT = Path(__file__).parents[2]
# Torch's AdamW, whose steps carry a difference in the last bit on as it is; Muon orthogonalises in
# bf16, where such a difference may round another way.
RUN = {"steps": 12, "batch_size": 8, "lr_muon": None, "weight_decay": 0.1, "save_every": 4}
RUN |= {"activation_checkpointing": "block", "keep_checkpoints": 9}


def config_of(stage: int | None) -> str | None:
    if stage is None:
        return None
    pytest.importorskip("deepspeed")
    return str(ROOT / f"configs/deepspeed/zero{stage}.json")


def start(run, processes: int, *more: str, torchrun: bool = False) -> subprocess.Popen:
    """Train `run` in a session of its own, in processes that import each for itself (`torchrun`) or
    are forks of one that has."""
    folder = Path(run.output_dir).parent
    config = folder / f"{Path(run.output_dir).name}.yaml"
    config.write_text(run.to_yaml())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable]
    if torchrun:
        launch += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launch += [f"--master-port={port}", "-m", "hybrid_sleep.training"]
    else:
        launch += [str(ROOT / "tests/common/forked_ranks.py"), str(processes), port]
    launch += [str(config), *more]
    return subprocess.Popen(
        launch,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(started: subprocess.Popen, code: int = 0) -> str:
    try:
        said, _ = started.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        said = kill(started)
        raise AssertionError(f"hangs:\n{said}") from None
    assert started.returncode == code, said
    return said


def kill(running: subprocess.Popen) -> str:
    """SIGKILL to the launcher and to its workers, which are no members of its group."""
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    for process in (running.pid, *map(int, workers)):
        os.kill(process, signal.SIGKILL)
    return running.communicate()[0]


def losses(folder) -> dict[int, float]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "depth" in line}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_near(one: dict, other: dict, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key in one:
        difference = abs(one[key] - other[key])
        assert float(difference.max() if torch.is_tensor(difference) else difference) <= tolerance


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny):
    """The run in one process, without DeepSpeed."""
    run = tiny.run(tmp_path_factory.mktemp("alone") / "out", **RUN)
    train(run, progress=False)
    return Path(run.output_dir)


def train_in_two(run, alone) -> None:
    finish(start(run, 2))
    whole = Path(run.output_dir)
    assert_near(losses(whole), losses(alone), 1e-5)
    assert_near(weights(whole), weights(alone), 1e-5)
    lines = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    assert {line["depth"] for line in lines if "depth" in line} == {1, 2, 3}


@pytest.mark.parametrize("stage", [slow(0), slow(1), slow(2), 3])
def test_two_processes_are_one(tmp_path, tiny, alone, stage):
    train_in_two(tiny.run(tmp_path / "out", deepspeed=config_of(stage), **RUN), alone)


@pytest.mark.parametrize("stage", [None, *map(slow, range(4))])
def test_two_processes_killed_at_a_random_step_are_one(tmp_path, tiny, alone, stage):
    """After SIGKILL and --resume, losses and weights are those of the run that was not killed: to
    the bit on as many processes, to rounding on another number."""
    settings = {**RUN, "deepspeed": config_of(stage)}
    train_in_two(tiny.run(tmp_path / "whole", **settings), alone)
    killed, fewer = tmp_path / "killed", tmp_path / "fewer"
    last = random.Random(str(stage)).randrange(5, 9)
    running = start(tiny.run(killed, **settings), 2)
    while not (killed / "metrics.jsonl").exists() or max(losses(killed), default=0) < last:
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.02)
    kill(running)
    assert not (killed / "model.safetensors").exists(), "the run was over before it was killed"
    assert checkpoints(killed)
    shutil.copytree(killed, fewer)

    finish(start(tiny.run(killed, **settings), 2, "--resume"))
    assert losses(killed) == losses(tmp_path / "whole")
    assert_near(weights(killed), weights(tmp_path / "whole"), 0)
    if stage is None:
        train(tiny.run(fewer, **settings), resume=True, progress=False)
    else:
        finish(start(tiny.run(fewer, **settings), 1, "--resume"))
    assert_near(losses(fewer), losses(tmp_path / "whole"), 1e-5)
    assert_near(weights(fewer), weights(tmp_path / "whole"), 1e-5)


@pytest.mark.slow
def test_a_signal_ends_all_processes_after_the_same_step(tmp_path, tiny):
    out = tmp_path / "out"
    running = start(tiny.run(out, steps=4000), 2, torchrun=True)
    while not (out / "metrics.jsonl").exists() or not losses(out):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=120)[0]
    (saved,) = checkpoints(out)
    step = int(saved.name.removeprefix("checkpoint-"))
    assert f"interrupted: step {step} of 4000 is saved in {saved}" in said
    assert max(losses(out)) == step < 4000


def test_a_loss_that_is_no_number_on_one_rank_ends_all(tmp_path, tiny):
    """The second rank's weights turn nan before step 4; both stop, naming the last checkpoint."""
    script = tmp_path / "diverge.py"
    script.write_text(
        "import os\n"
        "from hybrid_sleep.training.trainer import SleepTrainer\n"
        "step = SleepTrainer.compute_loss\n"
        "def compute_loss(self, *arguments, **keywords):\n"
        "    loss = step(self, *arguments, **keywords)\n"
        "    bad = self.state.global_step == 3 and os.environ['RANK'] == '1'\n"
        "    return loss * float('nan') if bad else loss\n"
        "SleepTrainer.compute_loss = compute_loss\n"
    )
    run = tiny.run(tmp_path / "out", save_every=2)
    said = finish(start(run, 2, "--first", str(script)), code=1)
    saved = tmp_path / "out/checkpoint-2"
    assert "loss is nan at step 4 (sleep_passes=" in said
    assert f"the last good checkpoint is {saved}, --resume goes on from there" in said
    assert checkpoints(tmp_path / "out") == [saved]


@pytest.fixture
def text(tmp_path):
    """Documents of all lengths, most of them longer than the window, packed into rows."""
    words = random.Random(0)
    documents = [
        "".join(words.choice("abcd efgh") for _ in range(words.randrange(3, 60)))
        for _ in range(200)
    ]
    (tmp_path / "corpus.txt").write_text("|".join(documents))
    return {"files": [str(tmp_path / "corpus.txt")], "separator": "|", "length": 24}


@pytest.mark.slow
def test_text_in_two_processes_goes_on_where_it_was(tmp_path, tiny, text):
    """One process is two, and a run of two goes on in one from its first checkpoint."""
    settings = {"lr_muon": None, "model": {"window": 8}, "text": text}
    settings |= {"steps": 12, "save_every": 5, "keep_checkpoints": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = train(tiny.run(whole, **settings), progress=False)
    finish(start(tiny.run(parts, **settings), 2))
    assert_near(losses(parts), losses(whole), 1e-5)
    (parts / "model.safetensors").unlink()
    for late in checkpoints(parts)[1:]:
        shutil.rmtree(late)
    train(tiny.run(parts, **settings), resume=True, progress=False)
    assert_near(losses(parts), losses(whole), 1e-5)
    assert_near(weights(parts), weights(whole), 1e-5)
    assert len(done.samples) == 2


@pytest.mark.parametrize("processes", ["said to be two", slow("two")])
def test_zero_3_refuses_rows_with_boundaries_of_their_own(
    tmp_path, tiny, text, monkeypatch, processes
):
    refusal = "must be ZeRO stage 0, 1 or 2 for text, whose rows have boundaries of their own"
    settings = {"model": {"window": 8}, "text": text, "lr_muon": None}
    run = tiny.run(tmp_path / "out", deepspeed=config_of(3), **settings)
    if processes == "two":
        assert refusal in finish(start(run, 2), code=1)
        return
    arguments = training_arguments(tiny.run(tmp_path / "out", **settings))
    with pytest.raises(ValueError, match=refusal):
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
        build_trainer(run, arguments)


MUON = {"lr_muon": 0.02, "grad_clip": None}
TORCH = {"zero_force_ds_cpu_optimizer": False}  # torch's AdamW, which nothing has to compile for


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "change", "tolerance"),
    [
        ("zero2_offload", {}, TORCH, 1e-5),
        ("zero3_offload", {}, TORCH, 1e-5),
        ("zero2", {"dtype": "bfloat16"}, {}, 2e-3),
        ("zero3", {"dtype": "bfloat16"}, {}, 2e-3),
        # Newton-Schulz runs in bf16: a last bit of the gradient is a percent of an update.
        ("zero1", MUON, {}, 1e-2),
        ("zero2", MUON, {}, 1e-2),
        ("zero3", MUON, {}, 1e-2),
    ],
)
def test_other_ways_of_zero_are_one_process(tmp_path, tiny, name, settings, change, tolerance):
    pytest.importorskip("deepspeed")
    config = json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps(config | change))
    settings = {"lr_muon": None, "steps": 10, **settings}
    train(tiny.run(tmp_path / "one", **settings), progress=False)
    many = tiny.run(tmp_path / "many", deepspeed=str(tmp_path / "ds.json"), **settings)
    finish(start(many, 2))
    assert_near(losses(tmp_path / "many"), losses(tmp_path / "one"), tolerance)
