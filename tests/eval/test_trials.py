"""Trials: planned with every seed, trained and measured, sent to processes and resumed."""

from __future__ import annotations

import pickle
from functools import partial

import pytest

from hybrid_sleep.eval.trials import Call, train_and_measure

CONFIG = """
model: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
        linear_num_key_heads: 2, linear_num_value_heads: 2, linear_key_head_dim: 8,
        linear_value_head_dim: 8}
task: {name: rule110, params: {width: 4, states: 2, steps: 1}}
sleep_passes: {uniform: [1, 2]}
train: {steps: 3, batch_size: 8, device: cpu, threads: 1, schedule: constant}
output_dir: {out}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("{out}", str(tmp_path / "models")))
    return path


def test_every_variant_and_seed_is_a_run_in_a_folder_of_its_own(tmp_path, config):
    variants = {
        "one": [],
        "two": ["train.lr_muon=0.{seed}5", "train.steps=4"],
        "three": {"train.steps": 5},
    }
    runs = Call(config=config, overrides=["train.batch_size=16"], seeds=[3, 1]).plan(variants)
    assert list(runs) == [(name, seed) for seed in (3, 1) for name in variants]
    for (name, seed), run in runs.items():
        assert run.output_dir == str(tmp_path / "models" / name / f"seed{seed}")
        assert (run.train.seed, run.train.batch_size) == (seed, 16)
    assert [run.train.lr_muon for run in runs.values()] == [2e-3, 0.35, 2e-3, 2e-3, 0.15, 2e-3]
    assert [run.train.steps for run in runs.values()] == [3, 4, 5] * 2


def test_windows_written_several_times_are_no_other_task(config):
    runs = Call(config=config, seeds=[0]).plan({"a": [], "b": ["task.repeats=2"]})
    assert [run.load_task().window for run in runs.values()] == [4, 8]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a": [], "b": ["train.step=1"]}, "variant 'b': .*train must have keys .*, got 'step'"),
        ({"a": [], "b": ["task.params.steps=2"]}, "variant 'b': task must be one for all"),
        ({"b": ["init.checkpoint=none"]}, "variant 'b': .*init.checkpoint"),
    ],
)
def test_impossible_variants_are_refused_by_name(config, variants, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Call(config=config).plan(variants)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
        ({"jobs": 0}, "jobs must be an integer of at least 1, got 0"),
        ({"seeds": [1, 1]}, r"seeds must be one or more, each once, got \[1, 1\]"),
        ({"seeds": []}, "seeds must be one or more"),
        ({"seeds": [-1]}, "seeds must be an integer of at least 0, got -1"),
    ],
)
def test_calls_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Call(config="run.yaml", **given)


def test_what_processes_are_sent_survives_the_way(config):
    """A depth policy has integer keys, which a trip through JSON would make into texts."""
    tied = {"sleep_passes": {"by_difficulty": {1: 2}}}
    runs = Call(config=config, seeds=[0]).plan({"sleep": {}, "tied": tied})
    again = pickle.loads(pickle.dumps(partial(train_and_measure, runs)))
    assert again.args[0] == runs
    assert again.args[0]["tied", 0].sleep_passes.draw(0, 1) == 2
