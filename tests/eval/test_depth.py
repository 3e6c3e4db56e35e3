"""The depth benchmark: scripted models whose accuracy is known, and a real one asked by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM, training
from hybrid_sleep.eval import depth, depth_report, tasks
from hybrid_sleep.eval import results as files
from hybrid_sleep.eval.statistics import over_seeds, wilson
from hybrid_sleep.training.config import TaskConfig, TrainConfig

TASK = tasks.load("rule110", width=6, states=2, steps=3)


class Scripted(torch.nn.Module):
    """Knows Rule 110, but takes one step of it a pass: right at depth `steps`, and only there."""

    def __init__(self, task, wrong_rows=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.task, self.wrong_rows, self.seen, self.modes = task, wrong_rows, [], []

    def forward(self, input_ids, sleep_passes, use_cache=None, labels=None):
        assert labels is None and not torch.is_grad_enabled()
        self.modes.append(self.training)
        self.seen.append((len(input_ids), sleep_passes))
        separator = self.task.width * self.task.states
        # The last label must not go in; all before it must.
        assert input_ids.shape[1] == self.task.length - 1
        assert (input_ids[:, separator] == 2).all()
        logits = torch.zeros(*input_ids.shape, 3)
        for row, tokens in enumerate(input_ids.tolist()):
            for state in range(self.task.states):
                ring = tokens[state * self.task.width : (state + 1) * self.task.width]
                answer = self.task.rollout(ring, sleep_passes)[0]
                logits[row, separator + state, answer] = 1
        logits[: self.wrong_rows] = logits[: self.wrong_rows].roll(1, dims=-1)
        return SimpleNamespace(logits=logits)


def test_a_model_that_needs_three_passes_is_right_at_depth_three_only():
    model = Scripted(TASK)
    model.train()
    result = depth.measure_depth(model, TASK, [3, 1, 2], count=70, seed=5, batch_size=32)
    assert result.depths == [1, 2, 3]
    assert result.exact[3] == result.per_label[3] == 1.0
    for wrong in (1, 2):
        rows = TASK.examples("test", 5, 70)
        agree = [
            [
                TASK.rollout(ring, wrong)[0] == TASK.rollout(ring)[0]
                for ring in ex["meta"]["context"]
            ]
            for ex in rows
        ]
        assert result.exact[wrong] == pytest.approx(sum(all(row) for row in agree) / 70)
        assert result.per_label[wrong] == pytest.approx(sum(sum(row) for row in agree) / 140)
        assert result.exact[wrong] < 1
    assert model.training and not any(model.modes)
    # One untimed forward, then every batch at every depth.
    assert model.seen[1:] == [(n, d) for n in (32, 32, 6) for d in (1, 2, 3)]
    assert all(seconds > 0 for seconds in result.seconds.values())


def test_one_wrong_row_in_each_batch_shows():
    model = Scripted(TASK, wrong_rows=1)
    result = depth.measure_depth(model, TASK, [3], count=60, batch_size=20)
    assert result.exact[3] == pytest.approx(57 / 60)


def test_progress_ends_complete():
    calls = []
    depth.measure_depth(
        Scripted(TASK), TASK, [1, 3], count=10, batch_size=4,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (40, 40)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def tiny_model(window=6):
    config = HybridSleepConfig(
        vocab_size=3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        window=window,
        initializer_range=0.6,
    )
    torch.manual_seed(3)
    return HybridSleepForCausalLM(config).eval()


def test_accuracy_is_that_of_answering_freely():
    """`exact` from one forward equals generating the answers token by token, at every depth."""
    model, count = tiny_model(), 24
    result = depth.measure_depth(model, TASK, [1, 2, 4], count=count, seed=1, batch_size=10)
    for passes in (1, 2, 4):
        right = 0
        for example in TASK.examples("test", 1, count):
            prompt = torch.tensor([example["input_ids"][: -TASK.states]])
            answer = model.generate(
                prompt, max_new_tokens=TASK.states, do_sample=False, sleep_passes=passes
            )[0, prompt.shape[1] :]
            right += answer.tolist() == example["meta"]["answers"]
        assert result.exact[passes] == pytest.approx(right / count)
    assert 0 < sum(result.exact.values()) < 3


def test_depth_reaches_the_model():
    ids = TASK.batch("test", 0, 8)["input_ids"]
    model = tiny_model()
    with torch.no_grad():
        logits = [model(input_ids=ids[:, :-1], sleep_passes=n).logits[:, -2:] for n in (1, 2, 3)]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])


BASE = {
    "depth": 1,
    "accuracy": {"1": 0.77},
    "spread": {"1": [0.7, 0.8]},
    "seeds": [0, 1, 2],
    "examples_ratio": 3.0,
    "passes_ratio": 1.2,
    "command": "hybrid-sleep bench depth a b c",
}


def made_up(shift=0.0):
    exact = {1: 0.4 + shift, 2: 0.9 + shift, 3: 0.9 + shift, 4: 0.5 + shift}
    return depth.DepthResult(
        count=200, eval_seed=0, exact=exact, per_question=exact, per_label={d: 0.9 for d in exact},
        by_difficulty={d: {2: share} for d, share in exact.items()}, questions={2: 200},
        seconds={d: 0.1 * d for d in exact},
    )  # fmt: skip


def record(seed):
    return {"checkpoint": f"m{seed}", "seed": seed, "trained_depths": [1, 2, 3], "config": {}}


def test_summary_of_several_checkpoints():
    shifts = (-0.06, 0.0, 0.03)
    result = depth_report.summarise(
        TASK, [made_up(shift) for shift in shifts], [record(seed) for seed in range(3)]
    )
    assert result["floor"] == TASK.majority().exact
    assert result["accuracy"]["2"] == pytest.approx(0.89)
    assert result["spread"]["2"] == pytest.approx([0.84, 0.93])
    assert result["best_depth"] == 2
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
    assert result["seconds_per_example"]["4"] == pytest.approx(0.4 / 200)
    for key in ("torch", "transformers", "python", "device", "date", "commit", "hybrid_sleep"):
        assert key in result["provenance"]
    text = depth_report.markdown(json.loads(json.dumps(result)))
    # .84, .90, .93: deviation .0458, and 4.303 of it over the root of 3 on either side, up to 1.
    assert "| 2 | **0.890** | 0.840 to 0.930 | 0.776 to 1.000 | 0.840 | 0.900 | 0.930 |" in text
    assert f"{TASK.majority().exact:.4f}" in text


def test_accuracy_by_difficulty_is_the_mean_over_checkpoints():
    task = tasks.load("rule110", width=5, states=1, steps=[0, 1])
    results = [
        depth.DepthResult(
            count=8, eval_seed=0, exact={1: 0.5}, per_question={1: 0.5}, per_label={1: 0.5},
            by_difficulty={1: {0: share, 1: 0.25}}, questions={0: 4, 1: 4}, seconds={1: 1.0},
        )
        for share in (0.5, 0.75)
    ]  # fmt: skip
    result = depth_report.summarise(task, results, [record(0), record(1)])
    text = depth_report.markdown(json.loads(json.dumps(result)))
    assert "| questions right, steps: | 0 | 1 |" in text
    assert "| depth 1 | 0.625 | 0.250 |" in text
    # Cells start on or off alike; after a step 20 of 32 rings begin with 1.
    assert "| without memory | 0.500 | 0.625 |" in text
    assert "chance 0.5000" in text


@pytest.mark.parametrize(
    ("shares", "interval"),
    [
        ([0.5], None),
        ([0.4, 0.6], (0.0, 1.0)),
        # Deviation .1; t = 4.303 for three.
        ([0.4, 0.5, 0.6], (0.5 - 4.303 * 0.1 / 3**0.5, 0.5 + 4.303 * 0.1 / 3**0.5)),
        ([1.0, 1.0, 1.0], (1.0, 1.0)),
    ],
)
def test_interval_over_seeds_is_student_s(shares, interval):
    found = over_seeds(shares)
    assert found == (None if interval is None else pytest.approx(interval))


def test_interval_over_many_seeds_nears_the_normal_one():
    shares = [0.4, 0.6] * 50
    low, high = over_seeds(shares)
    assert (low + high) / 2 == pytest.approx(0.5)
    # 100 values at .1 from their mean, by scipy's t.ppf(.975, 99) = 1.98422.
    assert (high - low) / 2 == pytest.approx(1.98422 * 0.1 / 99**0.5, rel=1e-4)


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_table_and_figure_come_from_the_json_alone(tmp_path, checkpoints):
    runs = range(checkpoints)
    result = depth_report.summarise(
        TASK, [made_up(0.01 * i) for i in runs], [record(i) for i in runs]
    )
    paths = files.save(result, tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.md", "accuracy.png"]
    before = [path.read_bytes() for path in paths]
    assert before[2].startswith(b"\x89PNG")
    for path in paths[1:]:
        path.unlink()
    assert files.render(paths[0]) == paths[1:]
    assert [path.read_bytes() for path in paths] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_figure_draws_floor_points_and_baseline():
    result = depth_report.summarise(TASK, [made_up()], [record(0)])
    result["baseline"] = BASE
    axes = depth_report.figure(result).axes[0]
    drawn = [(line.get_xdata(), line.get_ydata()) for line in axes.get_lines()]
    floor = TASK.majority().exact
    assert any(list(y) == [floor, floor] for _, y in drawn)
    assert any(list(x) == [1] and list(y) == [0.77] for x, y in drawn)
    assert any(list(x) == [1, 2, 3, 4] and list(y) == [0.4, 0.9, 0.9, 0.5] for x, y in drawn)


def test_an_equal_baseline_is_not_talked_away():
    result = {"accuracy": {"1": 0.4, "4": 0.78}, "best_depth": 4, "baseline": BASE}
    text = depth_report.baseline_words(result)
    assert "3.0 times the examples (1.2 times the passes over a window)" in text
    assert "0.770 at depth 1 (0.700 to 0.800 over 3 seeds)" in text
    assert "does not beat more training at equal compute" in text
    result["accuracy"]["4"] = 0.5
    assert "does not beat" in depth_report.baseline_words(result)


def test_a_worse_baseline_is_said_to_be_worse():
    result = {"accuracy": {"1": 0.4, "4": 0.99}, "best_depth": 4, "baseline": BASE}
    assert "worth 0.220 of exact accuracy" in depth_report.baseline_words(result)


def test_a_baseline_with_one_good_seed_is_given_its_due():
    base = {**BASE, "spread": {"1": [0.4, 0.985]}}
    result = {"accuracy": {"1": 0.4, "4": 0.99}, "best_depth": 4, "baseline": base}
    text = depth_report.baseline_words(result)
    assert "the best one gets as far without sleeping" in text
    assert "on average they fall 0.220 of exact accuracy short" in text


def trained(steps, passes, width=6, hidden=16):
    model = {"hidden_size": hidden, "num_attention_heads": 2}
    return training.RunConfig(
        model=model,
        task=TaskConfig(name="rule110", params={"width": width, "states": 2}),
        train=TrainConfig(steps=steps, batch_size=10, warmup=0),
        sleep_passes=passes,
        output_dir="out",
    )


def saved_baseline(tmp_path, passes=2, depths=(1, 2), **changes):
    runs = [
        depth_report.run_record("out", trained(60, passes, **changes)) | {"seed": seed}
        for seed in (4, 5)
    ]
    exact = {2: {1: 0.5, 2: 0.7}, 3: {1: 0.5, 2: 0.9}}
    results = [
        depth.DepthResult(
            count=9, eval_seed=0, **{name: {d: values[d] for d in depths} for name in
                                     ("exact", "per_question", "per_label", "seconds")},
            by_difficulty={d: {2: values[d]} for d in depths}, questions={2: 9},
        )
        for values in exact.values()
    ]  # fmt: skip
    result = depth_report.summarise(TASK, results, runs, command="measured so")
    return files.save(result, tmp_path)[0]


def test_a_baseline_is_asked_at_its_own_depth(tmp_path):
    base = depth_report.read_baseline(
        saved_baseline(tmp_path), trained(20, {"choice": {1: 1, 4: 1}})
    )
    assert base["depth"] == 2
    assert base["accuracy"]["2"] == pytest.approx(0.8)
    assert base["spread"] == {"2": [0.7, 0.9]}
    assert base["seeds"] == [4, 5] and base["command"] == "measured so"
    # 600 examples of 2 passes against 200 of 2.5 on average.
    assert base["examples_ratio"] == 3.0
    assert base["passes_ratio"] == pytest.approx(1200 / 500)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 7}, r"task=.*7.*allowed.*6"),
        ({"hidden": 32}, r"model=.*32.*allowed.*16"),
        ({"depths": (1,)}, r"not measured at depth 2"),
    ],
)
def test_a_baseline_that_compares_nothing_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        depth_report.read_baseline(saved_baseline(tmp_path, **changes), trained(20, 1))


def test_a_baseline_of_several_depths_is_refused(tmp_path):
    path = files.save(depth_report.summarise(TASK, [made_up()], [record(0)]), tmp_path)[0]
    with pytest.raises(ValueError, match="trained at one depth"):
        depth_report.read_baseline(path, trained(20, 1))


@pytest.mark.parametrize("share, count", [(0.0, 50), (0.43, 200), (0.99, 2000), (1.0, 10)])
def test_wilson_interval_solves_its_equation(share, count):
    """The bounds are the p at which the observed share lies 1.96 standard errors away."""
    for bound in wilson(share, count):
        if 1e-12 < bound < 1 - 1e-12:
            error = math.sqrt(bound * (1 - bound) / count)
            assert abs(share - bound) / error == pytest.approx(1.959964, rel=1e-6)
        else:
            assert bound == pytest.approx(share, abs=1e-12)


def test_parse_depths():
    assert depth.parse_depths("1-4") == [1, 2, 3, 4]
    assert depth.parse_depths("8,1,2-3") == [1, 2, 3, 8]
    for wrong in ("", "0-3", "3-1", "1,1", "a", "1-", "-2", "1.5"):
        with pytest.raises(ValueError, match="^depths must be .*, got "):
            depth.parse_depths(wrong)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depths": [0]}, r"depths must be .* at least 1, got 0"),
        ({"depths": [1, 1]}, r"distinct"),
        ({"depths": []}, r"one or more"),
        ({"depths": [2.0]}, r"depths must be .*, got 2\.0"),
        ({"count": 0}, r"count must be .*, got 0"),
        ({"batch_size": 0}, r"batch_size must be .*, got 0"),
        ({"seed": -1}, r"seed must be .*, got -1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        depth.measure_depth(Scripted(TASK), TASK, **{"depths": [1], "count": 4, **change})


def test_render_refuses_what_is_no_result(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="results.json is damaged: no JSON"):
        files.render(path)
    path.write_text('{"benchmark": "speed"}')
    with pytest.raises(ValueError, match="benchmark must be one of depth.*got 'speed'"):
        files.render(path)
