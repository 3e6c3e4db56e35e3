"""Ablations: texts read by hand, sums worked out by hand, and one small enough to train here."""

import json

import pytest

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.eval import ablation
from hybrid_sleep.eval.depth import measure_depth
from hybrid_sleep.eval.variants import parse_seeds, parse_variant, runs_of
from hybrid_sleep.training import load_run_config, train

CONFIG = """
model: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
        linear_num_key_heads: 2, linear_num_value_heads: 2, linear_key_head_dim: 8,
        linear_value_head_dim: 8}
task: {name: rule110, params: {width: 4, states: 2, steps: 1}}
sleep_passes: {uniform: [1, 2]}
train: {steps: 3, batch_size: 8, device: cpu, threads: 1, schedule: constant}
output_dir: {seed}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("{seed}", str(tmp_path / "models")))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("as_it_is", ("as_it_is", [])),
        ("as-it.is:", ("as-it.is", [])),
        ("a:x=1", ("a", ["x=1"])),
        ("a:x=[1, 2],y={b: {c: 3, d: 4}}, z=5", ("a", ["x=[1, 2]", "y={b: {c: 3, d: 4}}", "z=5"])),
        ("a:x='1,2',y=\"],\"", ("a", ["x='1,2'", 'y="],"'])),
    ],
)
def test_a_variant_is_a_name_and_changes(text, expected):
    assert parse_variant(text) == expected


@pytest.mark.parametrize("text", ["", ":x=1", "../a:x=1", "a:x", "a:x=1,", "a:x=[1", "a:x='1"])
def test_what_is_no_variant_is_refused(text):
    with pytest.raises(ValueError, match="variant .*; allowed: NAME:key=value"):
        parse_variant(text)


@pytest.mark.parametrize("text", ["", "1,", "a", "1,1", "-1"])
def test_what_are_no_seeds_is_refused(text):
    with pytest.raises(ValueError, match="seeds=.*; allowed: such as 0,1,2"):
        parse_seeds(text)


def test_every_variant_and_seed_is_a_run_in_a_folder_of_its_own(tmp_path, config):
    variants = [("one", []), ("two", ["train.lr_muon=0.{seed}5", "train.steps=4"])]
    runs = runs_of(config, ["train.batch_size=16"], variants, [3, 1])
    assert list(runs) == [("one", 3), ("two", 3), ("one", 1), ("two", 1)]
    for (name, seed), run in runs.items():
        assert run.output_dir == str(tmp_path / "models" / name / f"seed{seed}")
        assert (run.train.seed, run.train.batch_size) == (seed, 16)
    assert [run.train.lr_muon for run in runs.values()] == [2e-3, 0.35, 2e-3, 0.15]
    assert [run.train.steps for run in runs.values()] == [3, 4, 3, 4]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], r"variants=\[\]; allowed: one or more"),
        ([("a", []), ("a", [])], r"variants=\['a', 'a'\]; allowed: .* different names"),
        ([("a", []), ("b", ["train.step=1"])], "variant 'b': .*unknown key train.step"),
        ([("a", []), ("b", ["task.params.steps=2"])], "variant 'b': task=.*allowed: one task"),
        ([("b", ["init.checkpoint=none"])], "variant 'b': .*init.checkpoint='none' is no folder"),
    ],
)
def test_impossible_variants_are_refused_by_name(config, variants, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runs_of(config, [], variants, [0])


def made_up():
    """Two variants at two depths; seed 1 of the second is not there yet."""
    exact = {("a", 0): (0.5, 0.9), ("a", 1): (0.3, 0.7), ("b", 0): (0.6, 0.8)}
    rows = [
        {
            "variant": name, "seed": seed, "steps": 10 + seed, "seconds": 2.0,
            "exact": {"1": one, "2": two}, "per_label": {"1": 0.5, "2": 0.5 + seed / 4},
        }
        for (name, seed), (one, two) in exact.items()
    ]  # fmt: skip
    return {"depths": [1, 2], "changes": {"a": [], "b": ["x=1"], "c": ["x=2"]}, "rows": rows}


def test_means_spreads_and_differences_seed_by_seed():
    result = made_up()
    ablation.summarise(result)
    a, b = result["variants"].values()
    assert a["exact"] == {"1": pytest.approx(0.4), "2": pytest.approx(0.8)}
    assert a["spread"] == {"1": [0.3, 0.5], "2": [0.7, 0.9]}
    assert a["steps"] == 10.5 and a["per_label"]["2"] == 0.625
    assert a["behind"] == {"1": [0.0, 0.0, 0.0], "2": [0.0, 0.0, 0.0]}
    # Only seed 0 is in both: .5 - .6 and .9 - .8.
    assert b["behind"] == {"1": [pytest.approx(-0.1)] * 3, "2": [pytest.approx(0.1)] * 3}
    assert ablation.best_depth(a) == "2"
    (line,) = ablation.words(result)
    assert "a against b at depth 2, seed by seed: +0.100" in line
    assert line.endswith("a is ahead with every seed.")
    result["rows"].append({**result["rows"][2], "seed": 1})
    ablation.summarise(result)
    # Now .9 - .8 and .7 - .8.
    (line,) = ablation.words(result)
    assert line.endswith("(-0.100 to +0.100); the seeds do not agree.")


def test_a_small_ablation_trains_measures_and_goes_on(tmp_path, config, monkeypatch):
    out = tmp_path / "results"
    given = {"seeds": "0,1", "depths": "1,3", "count": 40, "out": out, "command": "the command"}
    variants = ["plain", "wide:train.batch_size=16"]
    done = []

    def stop_after_three(*arguments, **keywords):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(train(*arguments, **keywords))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr("hybrid_sleep.training.train", stop_after_three)
        part = ablation.run(config, variants, **given)
    assert (part["complete"], part["ended"], len(part["rows"])) == (False, "interrupted", 3)
    assert "Not complete (interrupted)" in ablation.markdown(part)
    result = ablation.run(config, variants, **given)
    assert result["complete"] and result["rows"][:3] == part["rows"]
    row = next(row for row in result["rows"] if (row["variant"], row["seed"]) == ("wide", 1))
    run = load_run_config(
        config, {"train.batch_size": 16, "train.seed": 1, "output_dir": str(tmp_path / "alone")}
    )
    model = HybridSleepForCausalLM.from_pretrained(train(run, progress=False).model_dir)
    measured = measure_depth(model, run.load_task(), [1, 3], 40)
    assert row["exact"] == {str(depth): measured.exact[depth] for depth in (1, 3)}
    assert row["per_label"] == {str(depth): measured.per_label[depth] for depth in (1, 3)}
    assert result["floor"] == run.load_task().majority().exact
    # Table and figure come from the file alone.
    result = json.loads((out / "results.json").read_text())
    table = ablation.markdown(result)
    mean = result["variants"]["wide"]["exact"]["3"]
    (line,) = [line for line in table.splitlines() if line.startswith("| wide | 3 |")]
    assert f"{mean:.3f}" in line and "- wide: `train.batch_size=16`" in table
    assert (
        "the command" in table
        and f"Floor (always the most frequent label): {result['floor']:.4f}" in table
    )
    assert len(ablation.figure(result).axes[0].containers) == 2
