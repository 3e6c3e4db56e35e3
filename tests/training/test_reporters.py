"""What transformers' reporters get of a run: TensorBoard's event files, and calls of W&B."""

import json
import sys

import pytest
import yaml

from hybrid_sleep.training import load_run_config, train
from hybrid_sleep.training.callbacks import scalars

WANDB = """
calls = []
run = None

class Run:
    summary = {}
    def _label(self, **given): pass

class Config(dict):
    def update(self, given, **more): super().update(given)

config = Config()

def init(**given):
    global run
    run = Run()
    calls.append(("init", given))

def log(given): calls.append(("log", given))
"""


def events(folder):
    """`{tag: {step: [values]}}` as TensorBoard shows them."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder))
    accumulator.Reload()
    found = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            found.setdefault(tag, {}).setdefault(event.step, []).append(event.value)
    return found


def test_tensorboard_shows_the_metrics_and_no_step_twice(tmp_path, tiny):
    """A run that is taken up again from step 4 of 6, though it had reported all of them."""
    settings = {"report_to": "tensorboard", "eval_every": 3, "save_every": 4}
    run = tiny.run(tmp_path, **settings)
    train(run, progress=False)
    for path in (tmp_path / "model.safetensors", tmp_path / "run_files.json"):
        path.unlink()
    train(tiny.run(tmp_path, **settings), resume=True, progress=False)
    found = events(tmp_path / "tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # The run's own log has a loss for each step, a report the mean of those since the last one.
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    means, last = {}, 0
    for step in (2, 3, 4, 6):
        since = [losses[i] for i in range(last + 1, step + 1)]
        means[step], last = sum(since) / len(since), step
    expected = {"train/loss": means}
    for line in lines:
        step, own = line.pop("step"), {"exact", "per_label"} & line.keys()
        if "depth" in line:
            line = {"lr": line["lr"]} if step in means else {}
        for name, value in scalars(line).items():
            tag = f"eval/{name.replace('/', '_')}" if own else f"train/{name}"
            expected.setdefault(tag, {})[step] = value
    assert {"train/lr/muon", "train/loss_by_depth/2", "train/memory/peak"} < expected.keys()
    assert any(tag.startswith("train/loss_by_position/") for tag in expected)
    assert set(expected["eval/exact_3"]) == {3, 6}
    for tag, values in expected.items():
        shown = found[tag]
        assert {step: number for step, (number,) in shown.items()} == pytest.approx(
            values, rel=1e-5
        ), tag


def test_wandb_is_called_with_the_metrics(tmp_path, tiny, monkeypatch):
    package = tmp_path / "packages/wandb"
    (package / "sdk/lib").mkdir(parents=True)
    (package / "__init__.py").write_text(WANDB)
    for inner in ("sdk/__init__.py", "sdk/lib/__init__.py"):
        (package / inner).write_text("")
    (package / "sdk/lib/config_util.py").write_text("class ConfigError(Exception): pass")
    monkeypatch.syspath_prepend(package.parent)
    out = tmp_path / "out"
    try:
        train(tiny.run(out, report_to=["wandb"], eval_every=6), progress=False)
        calls, config = sys.modules["wandb"].calls, sys.modules["wandb"].config
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
            del sys.modules[name]
    assert [what for what, _ in calls].count("init") == 1
    assert config["hidden_size"] == 16 and config["max_steps"] == 6
    logged = [given for what, given in calls if what == "log"]
    steps = [given["train/global_step"] for given in logged if "train/loss" in given]
    assert steps == [2, 4, 6]
    last = [given for given in logged if "train/loss" in given][-1]
    assert {"train/lr/adamw", "train/tokens_per_second"} < last.keys()
    assert any(name.startswith("train/loss_by_depth/") for name in last)
    (evaluated,) = [given for given in logged if "eval/exact_1" in given]
    assert 0 <= evaluated["eval/exact_1"] <= 1
    assert not (out / "tensorboard").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", r"report_to must name packages that are installed, got 'wandb', .*pip install w"),
        ("wnadb", r"must be none or some of .*, got 'wnadb' \(did you mean wandb\?"),
    ],
)
def test_a_reporter_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path, tiny, monkeypatch, name, message
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(
        "hybrid_sleep.training.callbacks.get_available_reporting_integrations", lambda: []
    )
    with pytest.raises(ValueError, match=message):
        train(tiny.run(tmp_path / "out", report_to=[name]), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "report_to"),
    [({"tensorboard": False}, "none"), ({"tensorboard": True}, "tensorboard")],
    ids=str,
)
def test_runs_of_earlier_versions_say_where_they_report(tmp_path, tiny, old, report_to):
    content = tiny.run(tmp_path).to_dict()
    del content["train"]["report_to"]
    content["train"] |= old
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    run = load_run_config(tmp_path / "run.yaml")
    assert run.train.report_to == report_to and "tensorboard" not in run.to_dict()["train"]
