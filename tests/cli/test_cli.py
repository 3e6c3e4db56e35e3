"""The command: what it does, what it refuses in one line, and that asking for help is cheap."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
import yaml
from small import TINY
from typer.testing import CliRunner

from hybrid_sleep.cli import app as cli
from hybrid_sleep.eval import tasks
from hybrid_sleep.support.records import read_records

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "model": {**TINY, "intermediate_size": 32},
    "task": {"name": "rule110", "params": {"width": 4, "states": 2, "steps": 1}},
    "sleep_passes": {"uniform": [1, 2]},
    "train": {"steps": 2, "batch_size": 4, "device": "cpu"},
}


def call(*words, code=0):
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    "words",
    [
        ["tasks", "show", "rule110", "steps=[1"],
        ["bench", "map", "CONFIG", "--vary", "task.params.steps=[1"],
        ["bench", "map", "CONFIG", "train.steps=["],
        ["bench", "ablate", "CONFIG", "--variant", "a:train.steps={5"],
        ["train", "CONFIG", "train.steps=["],
        ["eval", ".", "--tasks", "x", "--sleep", "window=[1"],
        ["eval", ".", "--tasks", "x", "--task-params", "rule110: [1"],
    ],
    ids=" ".join,
)
def test_values_that_are_no_yaml_end_in_one_line(words, config):
    result = call(*[config if word == "CONFIG" else word for word in words], code=2)
    assert result.output.startswith("error: ") and result.output.count("\n") == 1


def test_terminals_that_lack_characters(monkeypatch):
    from hybrid_sleep.eval.tasks import show

    monkeypatch.setattr(show, "listing", lambda: "snow \u2603 and half a pair \ud83d")
    for charset, half in (("ascii", "?"), ("cp1252", r"\ud83d"), ("utf-8", r"\ud83d")):
        done = CliRunner(charset=charset).invoke(cli.app, ["tasks", "list"])
        assert done.exit_code == 0 and f"half a pair {half}" in done.output


def test_a_path_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path / 'none.yaml'}" in call("train", "~/none.yaml", code=2).output


def test_silence_is_explained(monkeypatch):
    from hybrid_sleep.cli import commands

    monkeypatch.setattr(commands, "PATIENCE", 0.01)

    def slowly():
        yield "at once"
        assert said.wait(10)
        yield "late"

    said = threading.Event()
    echo = lambda text, err: said.set() if err else None  # noqa: E731
    monkeypatch.setattr(commands.typer, "echo", echo)
    assert list(commands.patiently(slowly(), "still at it")) == ["at once", "late"]
    assert said.is_set()


def test_too_large_for_the_memory(monkeypatch):
    import torch

    from hybrid_sleep.eval.tasks import show

    monkeypatch.setattr(show, "listing", lambda: torch.empty(2**58))
    assert call("tasks", "list", code=2).output.startswith("error: out of memory")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN | {"output_dir": str(tmp_path / "model")}))
    return path


@pytest.fixture
def argv(monkeypatch):
    """Set what the result files record as the command."""
    return lambda *words: monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])


def test_help_imports_no_torch():
    script = (
        "import sys\n"
        "from hybrid_sleep.cli.app import app\n"
        "for words in (['--help'], ['bench', 'depth', '--help']):\n"
        "    try: app(words)\n"
        "    except SystemExit as end: assert end.code in (0, None)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def commands(group, *path):
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, *path, name)
        else:
            yield (*path, name), found


def committed() -> list[str]:
    """The call that made each committed result."""
    files = sorted(ROOT.glob("*/**/results/**/results.json"))
    return [json.loads(path.read_text())["command"] for path in files]


def test_every_command_is_told_what_each_option_means():
    for path, found in commands(typer.main.get_command(cli.app)):
        text = call(*path, "--help").output
        for parameter in found.params:
            told = getattr(parameter, "help", "") or ""
            assert len(told) > 5, (path, parameter.name)
            flag = parameter.opts[0] if parameter.opts[0].startswith("-") else ""
            assert flag in text, (path, flag)


def test_calls_of_committed_results_are_what_the_command_takes():
    lines = committed()
    assert len(lines) > 12
    for line in lines:
        found, (program, *words) = typer.main.get_command(cli.app), shlex.split(line)
        assert program == "hybrid-sleep"
        while hasattr(found, "commands") and words:
            assert words[0] in found.commands, line
            name, *words = words
            found = found.commands[name]
        if not hasattr(found, "commands"):
            try:
                found.make_context(name, words)
            except Exception as error:
                pytest.fail(f"{line}: {error}")


def test_train_then_measure_two_seeds(config, tmp_path, argv):
    said = call("train", config, "--quiet").output
    assert "trained 2 steps" in said and str(tmp_path / "model") in said
    second = tmp_path / "second"
    call("train", config, f"output_dir={second}", "train.seed=1", "--quiet")

    words = ["bench", "depth", tmp_path / "model", second, "--depths", "1,3", "--count", "30"]
    argv(*words, "--out", tmp_path / "bench")
    said = call(*words, "--out", tmp_path / "bench").output
    result = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert (tmp_path / "bench" / "results.md").read_text() in said
    assert [list(run["accuracy"]) for run in result["runs"]] == [["1", "3"]] * 2
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert [run["trained_depths"] for run in result["runs"]] == [[1, 2], [1, 2]]
    assert RUN["task"].items() <= result["task"].items()
    # What is recorded can be repeated elsewhere: nothing of this machine's folders is in it.
    text = (tmp_path / "bench" / "results.json").read_text()
    assert "bench depth model second --depths 1,3 --count 30 --out bench" in result["command"]
    assert str(tmp_path) not in text.replace(str(tmp_path / "model"), "").replace(str(second), "")

    (tmp_path / "bench" / "results.md").unlink()
    call("bench", "render", tmp_path / "bench" / "results.json")
    assert (tmp_path / "bench" / "results.md").read_text() in said

    again = call("train", config, code=2)
    assert "overwrite=True" in again.output
    call("train", config, "--overwrite", "--quiet")


def test_a_checkpoint_taken_on_the_way_can_be_measured(config, tmp_path):
    call("train", config, "train.save_every=1", "train.keep_checkpoints=2", "--quiet")
    out = tmp_path / "bench"
    checkpoint = tmp_path / "model" / "checkpoint-1"
    call("bench", "depth", checkpoint, "--depths", "1", "--count", "5", "--out", out)
    (run,) = read_records(out / "results.json")["runs"]
    assert run["checkpoint"] == "checkpoint-1"
    assert run["config"]["task"] == {**RUN["task"], "repeats": 1}


def test_only_seeds_of_one_recipe_are_averaged(config, tmp_path):
    call("train", config, "--quiet")
    model, other = tmp_path / "model", tmp_path / "other"
    call("train", config, f"output_dir={other}", "train.seed=1", "train.steps=3", "--quiet")
    said = call("bench", "depth", model, other, code=2).stderr
    assert "must be seeds of one recipe, got train.steps=2 in" in said and "and 3 in" in said
    said = call("bench", "depth", model, model, code=2).stderr
    assert "must be of different seeds, got train.seed=0 in both" in said


def test_an_interrupted_benchmark_keeps_the_checkpoints_it_finished(config, tmp_path, monkeypatch):
    from hybrid_sleep.eval.measure import checkpoints

    call("train", config, "--quiet")
    call("train", config, f"output_dir={tmp_path / 'second'}", "train.seed=1", "--quiet")
    measure, calls = checkpoints.measure_depth, []

    def second_is_stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "measure_depth", second_is_stopped)
    words = ["bench", "depth", tmp_path / "model", tmp_path / "second", "--depths", "1"]
    said = call(*words, "--count", 5, "--out", tmp_path / "b", code=130)
    assert "these files hold what was finished" in said.stderr
    result = json.loads((tmp_path / "b" / "results.json").read_text())
    assert result["ended"] == "interrupted" and [run["seed"] for run in result["runs"]] == [0]
    assert "Not complete (interrupted)." in (tmp_path / "b" / "results.md").read_text()


AT = ("bench", "depth", ".", "--depths")


@pytest.mark.parametrize(
    "words, says",
    [
        (["bench", "depth", "nowhere"], "checkpoint must be the folder of a trained model, got"),
        (["bench", "depth", "."], "got '.' without run.yaml"),
        ([*AT, "4-1"], "depths must be integers of at least 1, such as 1-4 or 1,2,4, each once"),
        ([*AT, "0-2"], "depths must be integers of at least 1"),
        ([*AT, "two"], "depths must be integers of at least 1, such as 1-4 or 1,2,4, each once"),
        (["bench", "depth", ".", "--seeds", "0"], "--seeds must come with a run's YAML file, got"),
        (["bench", "depth", "x.yaml", "--seed", "1"], "--seed must come with trained models, got"),
        (["bench", "depth", "x.yaml"], "config must be the YAML file of a run, got 'x.yaml'"),
        (["bench", "depth", "x.yaml", "--seeds", "0"], "seeds must be at least 3"),
        (["bench", "map", "x.yaml", "--compute", "no"], "compute must be numbers above 0"),
        (["tasks", "show", "chess"], "name must be one of '"),
        (["tasks", "show", "depo", "hops=0"], "hops must be an integer of at least 1"),
        (["eval", "nowhere", "--tasks", "hybrid_sleep_depo"], "checkpoint 'nowhere' must be"),
        (["bench", "generation", "--windows", "1"], "windows must be an integer of at least 2"),
        (["bench", "generation", "--state-space", "s4"], "state_space must be one of"),
        (["bench", "sleep", "--device", "abacus"], "device='abacus'; allowed here: cpu"),
        (["bench", "sleep", "--repeats", "0"], "repeats must be an integer of at least 2, got 0"),
        (["bench", "kernels", "--repeats", "1"], "repeats must be an integer of at least 2, got 1"),
        (["bench", "render", "nowhere.json"], "nowhere.json"),
        (["demo", "--seed", "-1"], "seed must be an integer of at least 0, got -1"),
        (["train", "nowhere.yaml"], "config must be the YAML file of a run, got 'nowhere.yaml'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*words, code=2)
    assert says in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_tasks_are_listed_and_shown():
    listed = call("tasks", "list").output
    assert all(f"\n{name}\n" in f"\n{listed}" for name in tasks.TASKS)
    shown = call("tasks", "show", "rule110", "width=5", "steps=[1, 2]", "--count", 2).output
    assert "width=5" in shown and "test example 2, seed 0" in shown


def test_an_unknown_command_or_option_is_refused():
    assert "dream" in call("dream", code=2).output
    assert "--deep" in call("demo", "--deep", code=2).output


def test_traceback_is_shown_when_asked_for():
    result = CliRunner().invoke(cli.app, ["--traceback", "demo", "--seed", "-1"])
    assert isinstance(result.exception, ValueError)
    assert isinstance(CliRunner().invoke(cli.app, ["demo", "--seed", "-1"]).exception, SystemExit)


def test_interrupt_is_130_and_says_what_is_kept(monkeypatch, config):
    from hybrid_sleep import training

    def stop(run, **options):
        raise KeyboardInterrupt("step 7 is saved")

    monkeypatch.setattr(training, "train", stop, raising=False)
    assert "interrupted: step 7 is saved" in call("train", config, code=130).stderr
    assert "--resume goes on" in call("demo", code=130).stderr


def test_kernels_are_measured_and_rendered(tmp_path, monkeypatch):
    from hybrid_sleep.kernels.benchmarks import fallback

    monkeypatch.setattr(fallback, "SHAPES", [fallback.Shape(T=4, B=1, H=1, d=8)])
    measure = fallback.run
    monkeypatch.setattr(fallback, "run", lambda **options: measure(least_seconds=0, **options))
    call("bench", "kernels", "--repeats", "2", "--out", tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert "forward + backward" in table
    (tmp_path / "results.md").unlink()
    call("bench", "render", tmp_path / "results.json")
    assert (tmp_path / "results.md").read_text() == table


def test_doctor_names_the_ops():
    said = call("doctor").output
    for op in ("gated_delta_rule", "ssd", "short_conv"):
        assert op in said
