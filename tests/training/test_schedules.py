"""What changes from step to step of a run, and what must not change it."""

import json

import pytest
import torch
import yaml

from hybrid_sleep.training import fit, optimizer_for, train
from hybrid_sleep.training.run import build_trainer
from hybrid_sleep.training.schedules import WindowSchedule, parse_windows


def test_a_window_holds_until_the_next_begins():
    config = {0: 8, 500: 16, 501: 4, 1000: 24}
    schedule = parse_windows(config)
    window, expected = None, []
    for step in range(1100):
        window = config.get(step, window)
        expected.append(window)
    assert [schedule.at(step) for step in range(1100)] == expected
    assert parse_windows(yaml.safe_load(yaml.safe_dump(schedule.to_config()))) == schedule
    assert parse_windows(schedule) is schedule
    with pytest.raises(ValueError, match="step must be an integer of at least 0, got -1"):
        schedule.at(-1)


def test_the_last_window_is_the_models_and_is_reached():
    schedule = WindowSchedule(((0, 8), (500, 16)))
    schedule.check(16, 501)
    with pytest.raises(ValueError, match="must end at the model's window, 24, got 16"):
        schedule.check(24, 501)
    with pytest.raises(ValueError, match="must change before train.steps=500, got step 500"):
        schedule.check(16, 500)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (24, "train.windows must be {0: window, .*}, got 24"),
        ([8, 16], r"train.windows must be {0: window, .*}, got \[8, 16\]"),
        ({}, "train.windows must have a first stage at step 0, got none"),
        ({1: 8}, "train.windows must have a first stage at step 0, got step 1"),
        ({0: 8, 5: 9, 5.5: 9}, "train.windows step must be an integer of at least 0, got 5.5"),
        ({0: 8, 9: 16, 5: 24}, "train.windows must have ascending steps, got 5 after 9"),
        ({0: 8, 5: 0}, "train.windows from step 5 must be an integer of at least 1, got 0"),
        ({0: True}, "train.windows from step 0 must be an integer of at least 1, got True"),
    ],
)
def test_wrong_schedules_name_the_key_and_what_is_allowed(value, message):
    with pytest.raises(ValueError, match=message):
        parse_windows(value)


def seen_by(trainer) -> list[tuple[int, int, int]]:
    """Step, window and depth of each forward in training."""
    seen, model = [], trainer.model
    forward = model.forward

    def watch(*arguments, **keywords):
        if model.training:
            step = trainer.state.global_step
            seen.append((step, model.config.window, keywords["sleep_passes"]))
        return forward(*arguments, **keywords)

    model.forward = watch
    return seen


def test_windows_and_depths_follow_their_curricula(tmp_path, tiny):
    run = tiny.run(tmp_path, windows={0: 2, 2: 3, 4: 4}, eval_every=3)
    run.sleep_passes = type(run.sleep_passes)(1, 1)
    trainer = build_trainer(run)
    seen = seen_by(trainer)
    trainer.train()
    assert seen == [(0, 2, 1), (1, 2, 1), (2, 3, 1), (3, 3, 1), (4, 4, 1), (5, 4, 1)]
    assert trainer.model.config.window == 4


def test_a_run_through_curricula_is_resumed_where_it_was(tmp_path, tiny):
    settings = {"windows": {0: 2, 3: 4}, "save_every": 2, "keep_checkpoints": 3}
    settings |= {"backprop_passes": 1, "backprop_windows": 2, "activation_checkpointing": "window"}
    whole = train(tiny.run(tmp_path / "whole", **settings), progress=False)
    parts = tmp_path / "parts"
    train(tiny.run(parts, **settings), progress=False)
    (parts / "model.safetensors").unlink()
    for late in ("checkpoint-4", "checkpoint-6"):
        for path in (parts / late).iterdir():
            path.unlink()
        (parts / late).rmdir()
    assert json.loads((parts / "checkpoint-2/config.json").read_text())["window"] == 4
    resumed = train(tiny.run(parts, **settings), resume=True, progress=False)
    tiny.assert_same(tiny.weights(resumed.model_dir), tiny.weights(whole.model_dir))
    assert tiny.steps(parts) == tiny.steps(tmp_path / "whole")


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 2},
        {"accumulate": 2, "workers": 1},
        {"activation_checkpointing": ["window", "block"]},
        {"backprop_passes": 3},
        {"report_to": "tensorboard"},
    ],
    ids=str,
)
def test_how_a_run_is_carried_out_changes_no_loss(tmp_path, tiny, settings):
    plain = train(tiny.run(tmp_path / "plain", lr_muon=None), progress=False)
    other = train(tiny.run(tmp_path / "other", lr_muon=None, **settings), progress=False)
    losses = [[line["loss"] for line in tiny.steps(r.model_dir)] for r in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


@pytest.mark.parametrize("settings", [{"backprop_passes": 1}, {"backprop_windows": 1}], ids=str)
def test_a_run_truncates_as_its_model_is_told_to(tmp_path, tiny, settings):
    """Bit for bit; and what is cut off had changed the weights."""
    task = {"width": 4, "states": 3, "steps": 1}
    run = tiny.run(tmp_path, task=task, warmup=0, **settings)
    trainer = build_trainer(run)
    trainer.train()
    weights = []
    for cut in (settings, {}):
        model = build_trainer(tiny.run(tmp_path, task=task)).model
        model.set_truncation(cut.get("backprop_passes"), cut.get("backprop_windows"))
        optimizer = optimizer_for(model, run.train.lr_muon, run.train.lr_adamw)
        batches = trainer.train_dataset
        fit(model, batches, steps=6, optimizer=optimizer, sleep_passes=run.sleep_passes)
        weights.append(model.state_dict())
    tiny.assert_same(trainer.model.state_dict(), weights[0])
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
