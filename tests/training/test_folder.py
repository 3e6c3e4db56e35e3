"""A run's folder: what is finished stays so, checkpoints are whole or refused, one run writes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_sleep.support import io
from hybrid_sleep.training import __main__ as command
from hybrid_sleep.training import folder
from hybrid_sleep.training import run as run_module
from hybrid_sleep.training.callbacks import StopOnSignal
from hybrid_sleep.training.config import run_config
from hybrid_sleep.training.run import train


def contents(out):
    """Every file below `out`."""
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, tiny):
    """A finished run of text with checkpoints at steps 2 and 4, the last one; and its folder."""
    place = tmp_path_factory.mktemp("text")
    (place / "text.txt").write_text("".join(f"line {i} says {i * 7919 % 100}\n" for i in range(90)))
    text = {"files": [str(place / "text.txt")], "length": 24, "held_out": 0}
    settings = {"steps": 4, "batch_size": 2, "save_every": 2, "keep_checkpoints": 9}

    def run(out):
        return tiny.run(out, text=text, model={"window": 8}, **settings)

    train(run(place / "out"), progress=False)
    return run, place / "out"


@pytest.fixture
def copied(text_run, tmp_path):
    run, out = text_run
    shutil.copytree(out, tmp_path / "out")
    return run(tmp_path / "out"), tmp_path / "out"


def test_a_finished_run_says_so_and_changes_nothing(copied):
    run, out = copied
    before = contents(out)
    result = train(run, resume=True, progress=False)
    assert result.finished_before and result.steps == 4
    assert "is finished (4 steps) and nothing was changed" in result.report()
    assert contents(out) == before
    os.truncate(out / "model.safetensors", 100)
    with pytest.raises(ValueError, match="is finished, but .*safetensors is damaged: .*remove it"):
        train(run, resume=True, progress=False)
    (out / "model.safetensors").write_bytes(before[Path("model.safetensors")])
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "checkpoint-2")
    assert train(run, resume=True, progress=False).finished_before


def test_killed_behind_the_last_step_no_step_is_added(copied):
    """All steps are in a checkpoint, but the model was not saved: text has no end to stop at."""
    run, out = copied
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    result = train(run, resume=True, progress=False)
    assert not result.finished_before and result.steps == 4
    assert (out / "model.safetensors").read_bytes() == weights
    assert [path.name for path in folder.checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def as_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "gone": (Path.unlink, "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 2), "is not as it|no JSON"),
    "flipped": (flip, "is not as it was written"),
    "pointer": (lambda path: path.write_bytes(io.LFS_POINTER + b"/spec/v1"), "pointer of Git LFS"),
    "folder": (as_folder, "is a folder"),
}
PARTS = ("optimizer.pt", "scheduler.pt", "sleep_state.json", "rng_state.pth", "trainer_state.json")
PARTS += ("model.safetensors",)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in (*PARTS, folder.LIST_FILE) for kind in DAMAGES][
        # What is flipped in the list is the name or the fingerprint of another file.
        :-3
    ]
    + [(folder.LIST_FILE, "pointer"), (folder.LIST_FILE, "folder")],
)
def test_a_checkpoint_without_a_part_is_refused_and_a_whole_one_named(copied, name, kind):
    (_, out), (damage, message) = copied, DAMAGES[kind]
    folder.check_checkpoint(out / "checkpoint-4")
    damage(out / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=f"checkpoint-4/{name} .*({message})") as refused:
        folder.check_checkpoint(out / "checkpoint-4")
    assert f"{out / 'checkpoint-2'} is whole: remove" in str(refused.value)
    damage(out / "checkpoint-2" / name)
    with pytest.raises(ValueError, match="; no other one is whole; --overwrite starts anew"):
        folder.check_checkpoint(out / "checkpoint-4")


def test_a_run_goes_on_from_no_damaged_checkpoint_and_changes_nothing(copied, capsys):
    run, out = copied
    (out / "model.safetensors").unlink()
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    before = contents(out)
    config = out.parent / "config.yaml"
    config.write_text(run.to_yaml())
    assert command.main([str(config), "--quiet", "--resume"]) == 2
    assert "optimizer.pt is damaged: it is empty; " in capsys.readouterr().err
    assert contents(out) == before
    trainer = run_module.build_trainer(run)
    with pytest.raises(ValueError, match="optimizer.pt is damaged"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    shutil.rmtree(out / "checkpoint-4")
    lines = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text("not\n" + lines)
    with pytest.raises(ValueError, match="metrics.jsonl is damaged: line 1"):
        train(run, resume=True, progress=False)
    (out / "metrics.jsonl").write_text(lines)
    (out / "run.yaml").write_text("{")
    with pytest.raises(ValueError, match="run.yaml"):
        train(run, resume=True, progress=False)


def test_only_one_writes_into_a_folder(copied, tmp_path):
    run, out = copied
    before = contents(out)
    with io.sole_writer(out):
        me = f"process {os.getpid()} on "
        with pytest.raises(BlockingIOError, match=f"is being written into by {me}.*; allowed"):
            train(run, overwrite=True, progress=False)
        with pytest.raises(BlockingIOError):
            train(run, resume=True, progress=False)
    assert contents(out) == before
    with io.sole_writer(tmp_path / "new" / "below"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="is a file|leads through a file"):
            with io.sole_writer(path):
                pass


def test_a_writer_that_is_killed_lets_go(tmp_path):
    script = (
        "import importlib.util, sys, time\n"
        "spec = importlib.util.spec_from_file_location('io_', sys.argv[1])\n"
        "io = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(io)\n"
        "with io.sole_writer(sys.argv[2]):\n"
        "    print('mine', flush=True)\n"
        "    time.sleep(600)\n"
    )
    program = [sys.executable, "-c", script, io.__file__, str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "mine\n"
        with pytest.raises(BlockingIOError, match=f"by process {holder.pid} on "):
            with io.sole_writer(tmp_path):
                pass
        holder.send_signal(signal.SIGKILL)
    with io.sole_writer(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [io.LOCK_FILE]
    assert not list(tmp_path.iterdir())


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step):
    """End a run without any farewell, as a kill would."""

    def die(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Stopped

    monkeypatch.setattr(StopOnSignal, "on_step_begin", die, raising=False)


def test_an_earlier_model_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, tiny):
    """Fine-tuning in place: the run starts from the very model that it replaces."""
    out = tmp_path / "out"
    base = tiny.run(out, steps=2, warmup=0, save_every=1)
    train(base, progress=False)
    mine = {"memory.safetensors": "x", "checkpoint-best/y": "y", "tensorboard/notes": "z"}
    for name, text in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    shutil.copytree(out, tmp_path / "base")
    before = contents(out)

    def tuned(start, place):
        content = tiny.run(place, save_every=2).to_dict()
        return run_config({**content, "model": {}, "init": {"checkpoint": str(start)}})

    run = tuned(out, out)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            train(run, overwrite=True, progress=False)
    new = {path for path in contents(out) if path.parts[0] == folder.UNFINISHED}
    assert new and {path: x for path, x in contents(out).items() if path not in new} == before
    result = train(run, resume=True, progress=False)
    whole = train(tuned(tmp_path / "base", tmp_path / "whole"), progress=False)
    tiny.assert_same(tiny.weights(result.model_dir), tiny.weights(whole.model_dir))
    assert tiny.steps(out) == tiny.steps(tmp_path / "whole")
    assert {name: (out / name).read_text() for name in mine} == mine
    assert [path.name for path in folder.checkpoints(out)] == ["checkpoint-6"]
    assert not (out / folder.UNFINISHED).exists() and not (out / io.LOCK_FILE).exists()
    assert train(run, resume=True, progress=False).finished_before


def test_what_no_run_wrote_is_not_replaced(tmp_path, tiny):
    run = tiny.run(tmp_path / "out", steps=1, warmup=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    with pytest.raises(
        FileExistsError,
        match="output_dir must be the folder of a run .* with model.safetensors but no run.yaml",
    ):
        train(run, overwrite=True, progress=False)
    assert contents(tmp_path / "out") == {Path("model.safetensors"): b"mine"}


OLD = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "run.yaml"}
OLD |= {"model.safetensors.index.json", "tokenizer.json", "config.json", "samples.txt"}
OLD |= {"checkpoint-3/optimizer.pt"}
NEW = {"model.safetensors", "run.yaml", "config.json", "checkpoint-3/optimizer.pt", "run.png"}


def replaced(tmp_path, monkeypatch, kill_at):
    """`settle`, killed at its operation number `kill_at`, and called again."""
    out = tmp_path / str(kill_at)
    for name in OLD:
        io.write_text_atomic(out / name, f"old {name}")
    io.write_text_atomic(out / "mine.safetensors", "mine")
    io.write_json_atomic(out / folder.LIST_FILE, ["tokenizer.json", "../victim", "..", "run.yaml"])
    for name in NEW:
        io.write_text_atomic(out / folder.UNFINISHED / name, f"new {name}")
    left = kill_at

    def watched(work):
        def operation(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Stopped
            left -= 1
            return work(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched(os.replace))
        patch.setattr(Path, "unlink", watched(Path.unlink))
        patch.setattr(shutil, "rmtree", watched(shutil.rmtree))
        try:
            folder.settle(out)
            killed = False
        except Stopped:
            killed = True
    weights = {path.read_text()[:3] for path in folder.weights_in(out)}
    config = (out / "config.json").read_text()[:3] if (out / "config.json").exists() else None
    run = (out / "run.yaml").read_text()[:3]
    assert len(weights) <= 1 and (weights != {"new"} or config == run == "new")
    folder.settle(out)
    assert {path.as_posix(): text.decode() for path, text in contents(out).items()} == {
        **{name: f"new {name}" for name in NEW}, "mine.safetensors": "mine"
    }  # fmt: skip
    return killed


def test_a_kill_while_the_new_run_takes_its_place_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("mine")
    kill_at = 0
    while replaced(tmp_path, monkeypatch, kill_at):
        kill_at += 1
    assert kill_at > len(OLD)
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_reason_is_said_by_whichever_process_refuses(tmp_path, monkeypatch, capsys):
    """The first one at once, another one when the first has had its time."""
    monkeypatch.setattr(command, "GRACE", 0)
    for rank, begins in (("0", "error: "), ("1", "rank 1: error: ")):
        monkeypatch.setenv("RANK", rank)
        assert command.main([str(tmp_path / "none.yaml")]) == 2
        assert capsys.readouterr().err.startswith(begins + "config ")


def test_files_are_read_or_named(tmp_path):
    path = tmp_path / "x.json"
    for content, message in (
        (b"", "is damaged: it is empty"),
        (b"{", "is damaged: no JSON"),
        (b"[]", "is damaged: it holds a list where a dict is expected"),
        (b"\xff\xfe{}", "is damaged: "),
        (b"[" * 100_000, "is damaged: no JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"x.json {message}"):
            io.read_json(path)
    with pytest.raises(FileNotFoundError, match="y.json is missing"):
        io.read_json(tmp_path / "y.json")
    for error, message in (
        (PermissionError(13, "denied"), "x.json may not be read by this user"),
        (OSError(5, "EIO"), "x.json cannot be read: Input/output error"),
    ):
        assert message in str(io.unreadable(path, error))
    records = [{"step": 1}, {"step": 2}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(lines + '{"step": 3')
    assert io.read_json_lines(path) == records
    for wrong in ('{"step"\n', "[]\n", "\n"):
        path.write_text(wrong + lines)
        with pytest.raises(ValueError, match="x.json is damaged: line 1 is no JSON object"):
            io.read_json_lines(path)
