"""A run beside its baselines, and the map of depth: trained small, summed up by hand."""

from __future__ import annotations

import json
import pickle
from functools import partial

import pytest
import torch

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.eval import adaptive, depth_map, suite, suite_report, tasks, variants
from hybrid_sleep.eval import results as files
from hybrid_sleep.eval.depth import measure_depth
from hybrid_sleep.training import load_run_config, train

CONFIG = """
model: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
        linear_num_key_heads: 2, linear_num_value_heads: 2, linear_key_head_dim: 8,
        linear_value_head_dim: 8}
task: {name: rule110, params: {width: 4, states: 2, steps: [0, 1]}}
sleep_passes: 2
train: {steps: 3, batch_size: 8, device: cpu, threads: 1, schedule: constant}
output_dir: {out}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("{out}", str(tmp_path / "models")))
    return path


def row(variant, seed, shares, **more):
    """What is left in a file of one trained model: shares of questions right by depth and steps."""
    return {
        "variant": variant, "seed": seed, "seconds": 2.0, "steps": 10,
        "questions": {"0": 3, "1": 1},
        "per_question": {depth: (3 * a + b) / 4 for depth, (a, b) in shares.items()},
        "by_difficulty": {depth: {"0": a, "1": b} for depth, (a, b) in shares.items()},
        "cost": {"steps": 10, "training_flops": 100, "parameters": 5, "wake_flops": 7,
                 "memory_bytes": 11},
        **more,
    }  # fmt: skip


def made_up():
    def plan(label, depths, asked, role, equal, tied=None):
        return {"label": label, "depths": depths, "asked": asked, "role": role, "equal": equal,
                "tied": tied or {}}  # fmt: skip

    tied = {"0": 1, "1": 2}
    adapted = {"tolerance": 0.1, "passes": 1.5, "per_question": 0.5}
    return {
        "task": {"name": "rule110", "params": {"width": 4}, "difficulty": "steps"},
        "floor": {"by_difficulty": {"0": 0.25, "1": 0.5}, "chance": 0.25},
        "plan": {
            "sleep": plan("sleep, N = 2", [1, 2], 2, "reference", "both", tied),
            "once": plan("N = 1", [1], 1, "baseline", "compute"),
            "gone": plan("not yet", [1], 1, "baseline", "compute"),
        },
        "rows": [
            row("sleep", 0, {"1": (0.8, 0.2), "2": (1.0, 0.6)}, adaptive=[adapted]),
            row("sleep", 1, {"1": (0.6, 0.2), "2": (0.8, 0.4)}, adaptive=[adapted]),
            row("once", 0, {"1": (0.7, 0.1)}),
            row("once", 1, {"1": (0.9, 0.5)}),
        ],
        "config": "run.yaml", "overrides": [], "examples": 4, "seeds": [0, 1],
        "clock": "processor", "left_out": {}, "complete": False, "ended": "interrupted",
        "command": "so", "provenance": report_of(),
    }  # fmt: skip


def report_of():
    from hybrid_sleep.support.provenance import provenance

    return provenance()


def test_shares_intervals_and_gaps_are_summed_up_seed_by_seed():
    result = made_up()
    suite.summarise(result)
    sleep, once = result["variants"]["sleep"], result["variants"]["once"]
    assert "gone" not in result["variants"]
    assert sleep["by_difficulty"]["2"]["1"]["mean"] == pytest.approx(0.5)
    assert sleep["per_question"]["2"]["seeds"] == [pytest.approx(0.9), pytest.approx(0.7)]
    # Two values .2 apart: t = 12.706 times .1, cut at 0 and 1.
    assert sleep["per_question"]["2"]["interval"] == [0.0, 1.0]
    # Asked at its own depth: steps 0 at depth 1, steps 1 at depth 2.
    assert sleep["tied"]["0"]["mean"] == pytest.approx(0.7)
    assert sleep["tied"]["1"]["mean"] == pytest.approx(0.5)
    # .9 - .55 and .7 - .8.
    assert once["ahead"] == [pytest.approx(0.125), pytest.approx(-0.1), pytest.approx(0.35)]
    assert result["floor_per_question"] == pytest.approx((3 * 0.25 + 0.5) / 4)
    assert result["adaptive"][0]["passes"] == 1.5
    (line,) = suite_report.words(result)
    assert line.startswith("At equal compute: sleep (asked at N = 2) is 0.125 ahead of N = 1 (-0.1")
    assert line.endswith("but the seeds do not agree.")
    text = suite_report.markdown(result)
    assert "| N = 1 (compute) | 0.800 | 0.300 |" in text
    assert "| without memory | 0.250 | 0.500 |" in text
    assert "Not complete (interrupted)" in text
    result["rows"][3]["per_question"]["1"] = 0.4
    suite.summarise(result)
    assert suite_report.words(result)[0].endswith("with every seed.")


def test_a_run_is_trained_beside_its_baselines_and_goes_on(tmp_path, config):
    out = tmp_path / "results"
    given = {"count": 40, "baselines": "once", "out": out, "command": "the command"}
    part = suite.run(config, minutes=1e-4, **given)
    assert (part["ended"], part["complete"]) == ("time is up", False)
    result = suite.run(config, ablations="adaptive", **given)
    assert result["complete"]
    names = {(row["variant"], row["seed"]) for row in result["rows"]}
    assert names == {(v, s) for v in ("sleep", "once", "once_tokens") for s in (0, 1, 2)}
    longer = next(row for row in result["rows"] if row["variant"] == "once")
    own = next(row for row in result["rows"] if row["variant"] == "sleep")
    assert longer["steps"] > own["steps"] == 3
    # A row is what one training gives.
    run = load_run_config(config, {"train.seed": 2, "output_dir": str(tmp_path / "alone")})
    model = HybridSleepForCausalLM.from_pretrained(train(run, progress=False).model_dir)
    measured = measure_depth(model, run.load_task(), [1, 2], 40)
    last = next(r for r in result["rows"] if (r["variant"], r["seed"]) == ("sleep", 2))
    assert last["per_question"] == {str(d): measured.per_question[d] for d in (1, 2)}
    floor = {str(level): share for level, share in run.load_task().floor().items()}
    assert result["floor"] == {"by_difficulty": floor, "chance": run.load_task().chance()}
    paths = files.save(result, out)
    before = [path.read_bytes() for path in paths[1:]]
    assert files.render(paths[0]) == paths[1:]
    assert [path.read_bytes() for path in paths[1:]] == before
    assert b"the command" in before[0] and b"mean passes" in before[0]


def test_what_side_by_side_processes_are_sent_survives_the_way(config):
    """A depth policy has integer keys, which a trip through JSON would make into texts."""
    changes = [("sleep", {}), ("tied", {"sleep_passes": {"by_difficulty": {0: 1, 1: 2}}})]
    runs = variants.runs_of(config, [], changes, [0])
    work = partial(variants._measure, runs, partial(suite._adaptive, deepest=2, count=4))
    again = pickle.loads(pickle.dumps(work))
    assert again.args[0] == runs
    assert again.args[0]["tied", 0].sleep_passes.draw(0, 1) in (1, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": "0,1"}, "seeds='0,1'; allowed: at least 3"),
        ({"baselines": "longer"}, "baselines='longer'; allowed: all, none, or some of once"),
        ({"ablations": "loop,loop"}, "ablations='loop,loop'; allowed: .* each once"),
        ({"ablations": "schedule"}, "ablation='schedule': labels"),
        ({"overrides": ["sleep_passes=1"]}, "sleep_passes=1 makes a run that is its own baseline"),
        ({"depths": "0"}, "depths must be an integer of at least 1, got 0"),
        ({"jobs": 0}, "jobs must be an integer of at least 1, got 0"),
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_benchmarked_is_refused_before_training(config, given, message, monkeypatch):
    monkeypatch.setattr("hybrid_sleep.training.train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        suite.run(config, **given)


def test_of_all_ablations_those_without_effect_are_left_out(config):
    run = load_run_config(config)
    kept, left_out = suite._applicable(run, ["attention", "schedule", "difficulty"], [1, 2])
    assert kept == ["attention", "difficulty"]
    assert list(left_out) == ["schedule"]


def test_adaptive_depth_between_two_passes_and_the_deepest():
    task = tasks.load("rule110", width=4, states=2, steps=[0, 1])
    torch.manual_seed(0)
    config = load_config_model(task)
    model = HybridSleepForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    fixed = measure_depth(model, task, [2, 5], 60)
    found = adaptive.measure_adaptive(model, task, [1e9, 1e-9], deepest=5, count=60, batch_size=25)
    # Everything changes by less than 1e9 in pass 2, and nothing by less than 1e-9.
    for cell, passes in zip(found, (2, 5), strict=True):
        assert cell["passes"] == passes
        assert cell["per_question"] == fixed.per_question[passes]
        by_steps = {str(level): share for level, share in fixed.by_difficulty[passes].items()}
        assert cell["by_difficulty"] == by_steps


def load_config_model(task):
    from hybrid_sleep import HybridSleepConfig

    return HybridSleepConfig(
        vocab_size=task.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, window=task.window,
    )  # fmt: skip


@pytest.mark.slow
def test_a_map_trains_every_cell_at_its_compute(tmp_path, config):
    out = tmp_path / "results"
    given = {"depths": "1,3", "compute": "1,2", "seeds": "5", "count": 30, "out": out}
    result = depth_map.run(config, "task.params.steps=[0,2]", overrides=["train.steps=6"], **given)
    assert len(result["rows"]) == 8 and len(result["grid"]) == 8
    for row in result["rows"]:
        cell = result["cells"][row["variant"]]
        wanted = cell["compute"] * result["flops"]
        step = row["cost"]["training_flops"] / row["steps"]
        assert abs(row["cost"]["training_flops"] - wanted) <= step / 2
        assert list(row["per_question"]) == [str(cell["depth"])]
        assert str(row["config"]["task"]["params"]["steps"]) == cell["value"]
    for cell in result["grid"]:
        assert (cell["ahead"] is None) == (cell["depth"] == 1)
    text = depth_map.markdown(json.loads(json.dumps(files.save(result, out) and result)))
    assert "| 0 | 0.250 | 1x |" in text
    assert files.render(out / "results.json")


def test_the_map_says_who_wins_and_whether_the_seeds_agree():
    def cell(depth, mean, ahead):
        return {"value": "4", "compute": 1.0, "depth": depth, "mean": mean, "ahead": ahead}

    result = {
        "vary": {"key": "task.params.steps", "values": ["4"]}, "compute": [1.0], "depths": [1, 2],
        "grid": [cell(1, 0.5, None), cell(2, 0.7, [0.2, 0.1, 0.3])],
    }  # fmt: skip
    (line,) = depth_map.verdicts(result)
    assert line == (
        "steps = 4, 1x compute: N = 2 is best (0.700), +0.200 over N = 1 (+0.100 to +0.300), with "
        "every seed."
    )
    result["grid"][1]["ahead"] = [0.2, -0.1, 0.5]
    assert depth_map.verdicts(result)[0].endswith("but the seeds do not agree.")
    result["grid"][0]["mean"] = 0.69
    (line,) = depth_map.verdicts(result)
    assert line == "steps = 4, 1x compute: N = 1 and N = 2 are within 0.02 (0.700)."
    result["grid"][0]["mean"] = 0.8
    assert "N = 1 is best (0.800), but not with every seed." in depth_map.verdicts(result)[0]


@pytest.mark.parametrize(
    ("vary", "given", "message"),
    [
        ("task.params.steps=4", {}, "vary='task.params.steps=4'; allowed: such as"),
        ("task.params.steps=[]", {}, "vary=.*allowed"),
        ("task.params.steps=[-1]", {}, "steps must be .* at least 0 .*, got -1"),
        ("task.params.steps=[1]", {"compute": "1,1"}, "compute='1,1'; allowed: different numbers"),
        ("task.params.steps=[1]", {"compute": "0"}, "compute='0'; allowed"),
        ("task.params.steps=[1]", {"depths": "x"}, "depths must be such as .*, got 'x'"),
    ],
)
def test_an_impossible_map_is_refused(config, vary, given, message):
    with pytest.raises(ValueError, match=message):
        depth_map.run(config, vary, **given)
