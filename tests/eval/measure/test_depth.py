"""Depth results: sums worked out by hand, baselines, tables and figures from the file alone."""

from __future__ import annotations

import dataclasses

import pytest

from hybrid_sleep import training
from hybrid_sleep.eval import results as files
from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.measure.depth import (
    Baseline,
    DepthResult,
    MeasuredRun,
    TaskRecord,
    read_baseline,
)
from hybrid_sleep.eval.measure.run_cost import cost_of
from hybrid_sleep.eval.render import depth as render
from hybrid_sleep.eval.tasks.accuracy import Accuracy
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.training.config import TaskConfig, TrainConfig
from hybrid_sleep.training.depth import parse_depth

TASK = tasks.load("rule110", width=6, states=2, steps=3)
BASE = Baseline(
    depth=1, seeds=[0, 1, 2], exact=[0.7, 0.8, 0.81], by_difficulty={3: [0.7, 0.8, 0.81]},
    examples_ratio=3.0, compute_ratio=1.2, command="hybrid-sleep bench depth a b c", provenance={},
)  # fmt: skip
EXACT = {1: 0.4, 2: 0.9, 3: 0.9, 4: 0.5}


def accuracy(exact, by_difficulty=None, questions=None, seconds=0.1):
    return Accuracy(
        exact=exact, per_question=exact, per_label=0.9, by_difficulty=by_difficulty or {3: exact},
        questions=questions or {3: 200}, seconds=seconds, passes=1.0,
    )  # fmt: skip


def run(seed, shift=0.0, exact=EXACT, **more):
    return MeasuredRun(
        checkpoint=f"m{seed}", seed=seed, trained_depths=[1, 2, 3], mean_depth=2.0, config={},
        accuracy={d: accuracy(share + shift, seconds=0.1 * d) for d, share in exact.items()} | more,
    )  # fmt: skip


def result_of(*runs, task=TASK, **more):
    return DepthResult(
        task=TaskRecord.of(task), examples=200, split="test", eval_seed=0, runs=list(runs),
        **{"provenance": provenance(), **more},
    )  # fmt: skip


def again(result):
    """As it comes back from its file."""
    return type(result).from_content(result.content())


def test_gradients_are_shown_in_units_of_the_last_pass():
    one, other = (
        dataclasses.replace(run(seed), gradients={1: [3.0], 2: [ratio, 1.0], 3: [0.0, 0.0, 0.0]})
        for seed, ratio in enumerate((2.0, 8.0))
    )
    result = result_of(one, other)
    assert DepthResult.from_content(result.content()) == result
    text = render.markdown(result)
    # The geometric mean of 2 and 8.
    assert "| gradient going into pass | 1 | 2 | 3 |\n" in text
    assert "| depth 2 | 4.00 | 1.00 |  |\n| depth 3 | 0 | 0 | 0 |" in text
    assert "gradient" not in render.markdown(result_of(run(0), run(1)))


def test_summary_of_several_checkpoints():
    result = result_of(*(run(seed, shift) for seed, shift in enumerate((-0.06, 0.0, 0.03))))
    exact = result.shares("exact", 2)
    assert exact.mean == pytest.approx(0.89)
    assert (exact.lowest, exact.highest) == pytest.approx((0.84, 0.93))
    assert result.best_depth == 2
    assert result.seconds_per_example(4) == pytest.approx(0.4 / 200)
    assert again(result) == result
    text = render.markdown(result)
    # .84, .90, .93: deviation .0458, and 4.303 of it over the root of 3 on either side, up to 1.
    assert "| 2 | **0.890** | 0.840 to 0.930 | 0.776 to 1.000 | 0.840 | 0.900 | 0.930 |" in text
    majority = TASK.majority()
    assert f"exact {majority.exact:.4f}, per label {majority.per_label:.4f}" in text
    assert f"(the best guess) {TASK.floor()[3]:.4f} of questions" in text
    for key in ("torch", "transformers", "python", "device", "date"):
        assert str(result.provenance[key]) in text


def test_accuracy_by_difficulty_is_the_mean_over_checkpoints():
    task = tasks.load("rule110", width=5, states=1, steps=[0, 1])
    runs = [run(seed, exact={1: 0.5}) for seed in (0, 1)]
    for share, measured in zip((0.5, 0.75), runs, strict=True):
        measured.accuracy[1] = accuracy(0.5, {0: share, 1: 0.25}, {0: 4, 1: 4})
    text = render.markdown(result_of(*runs, task=task))
    assert "| accuracy by steps | 0 | 1 |" in text
    assert "| depth 1 | 0.625 | 0.250 |" in text
    # Cells start on or off alike; after a step 20 of 32 rings begin with 1.
    assert "| floor | 0.500 | 0.625 |" in text
    assert "(the best guess) 0.5625 of questions" in text and "chance 0.5000" in text


def test_kinds_of_questions_have_tables_of_their_own():
    runs = [run(seed, exact={1: 0.5}) for seed in (0, 1)]
    for share, measured in zip((0.5, 0.75), runs, strict=True):
        found = measured.accuracy[1] = accuracy(0.5, {0: 0.5, 1: 0.5}, {0: 4, 1: 4})
        found.by_kind = {"even": {0: share, 1: 0.25}, "rare": {1: 1.0}}
    task = tasks.load("rule110", width=5, states=1, steps=[0, 1])
    result = again(result_of(*runs, task=task))
    text = render.markdown(result)
    assert result.kinds == ["even"] and "rare" not in text
    assert "| accuracy by steps, even | 0 | 1 |" in text and "| depth 1 | 0.625 | 0.250 |" in text


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_table_and_figure_come_from_the_json_alone(tmp_path, checkpoints):
    paths = files.save(result_of(*(run(i, 0.01 * i) for i in range(checkpoints))), tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.md", "accuracy.png"]
    before = [path.read_bytes() for path in paths]
    assert before[2].startswith(b"\x89PNG")
    for path in paths[1:]:
        path.unlink()
    assert files.render(paths[0]) == paths[1:]
    assert [path.read_bytes() for path in paths] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_figure_draws_majority_points_and_baseline():
    axes = render.figure(result_of(run(0), baseline=BASE)).axes[0]
    drawn = [(line.get_xdata(), line.get_ydata()) for line in axes.get_lines()]
    majority = TASK.majority().exact
    assert any(list(y) == [majority, majority] for _, y in drawn)
    assert any(list(x) == [1] and list(y) == [0.77] for x, y in drawn)
    assert any(list(x) == [1, 2, 3, 4] and list(y) == [0.4, 0.9, 0.9, 0.5] for x, y in drawn)


def words_of(best, **changes):
    base = Baseline(**{**vars(BASE), **changes})
    return render.baseline_words(result_of(run(0, exact={1: 0.4, 4: best}), baseline=base))


def test_several_difficulties_are_judged_by_the_hardest():
    task = tasks.load("rule110", width=5, states=1, steps=[1, 2])
    shares = {1: {1: 0.9, 2: 0.4}, 2: {1: 0.8, 2: 0.7}, 4: {1: 0.7, 2: 0.7}}
    runs = []
    for seed, shift in ((0, 0.0), (1, 0.1)):
        found = {n: {x: y + shift for x, y in of.items()} for n, of in shares.items()}
        measured = {n: accuracy(0.1, of, {1: 4, 2: 4}) for n, of in found.items()}
        runs.append(run(seed, exact={}))
        runs[-1].accuracy.update(measured)
    base = Baseline(**{**vars(BASE), "by_difficulty": {1: [1.0, 0.9], 2: [0.3, 0.2]}})
    result = result_of(*runs, task=task, baseline=base)
    assert (result.hardest, result.best_depth) == (2, 2)
    assert result.judged(2).values == (0.7, pytest.approx(0.8))
    said = render.baseline_words(result)
    assert "reaches an accuracy on steps = 2 of 0.250 (0.200 to 0.300" in said
    assert "sleeping deeper is worth 0.500 here" in said
    text = render.markdown(result)
    assert "| depth 2 | 0.850 | 0.750 |" in text
    assert "| trained at N = 1 alone | 0.950 | 0.250 |" in text
    axes = render.figure(result).axes[0]
    drawn = [[round(float(y), 6) for y in line.get_ydata()] for line in axes.get_lines()]
    for line in ([0.95, 0.85, 0.75], [0.45, 0.75, 0.75], [0.95], [0.25]):
        assert line in drawn
    assert again(result) == result


def test_an_equal_baseline_is_not_talked_away():
    text = words_of(0.78)
    assert "3.0 times the examples (1.20 times the compute)" in text
    assert "an exact accuracy of 0.770 (0.700 to 0.810 over 3 seeds)" in text
    assert "does not beat more training at equal compute" in text
    assert "does not beat" in words_of(0.5)


def test_a_worse_baseline_is_said_to_be_worse():
    assert "sleeping deeper is worth 0.220 here" in words_of(0.99)


def test_a_baseline_with_one_good_seed_is_given_its_due():
    text = words_of(0.99, exact=[0.4, 0.925, 0.985])
    assert "the best one gets as far without sleeping" in text
    assert "on average they fall 0.220 short" in text


def trained(steps, passes, width=6, hidden=16, seed=0):
    model = {"hidden_size": hidden, "num_attention_heads": 2}
    return training.RunConfig(
        model=model,
        task=TaskConfig(name="rule110", params={"width": width, "states": 2}),
        train=TrainConfig(steps=steps, batch_size=10, warmup=0, seed=seed),
        sleep_passes=passes,
        output_dir="out",
    )


def saved_baseline(tmp_path, passes=2, depths=(1, 2), **changes):
    exact = {4: {1: 0.5, 2: 0.7}, 5: {1: 0.5, 2: 0.9}}
    runs = [
        MeasuredRun.of(
            "out",
            trained(60, passes, seed=seed, **changes),
            {depth: accuracy(shares[depth]) for depth in depths},
        )
        for seed, shares in exact.items()
    ]
    return files.save(result_of(*runs, command="measured so"), tmp_path)[0]


def test_a_baseline_is_evaluated_at_its_own_depth(tmp_path):
    base = read_baseline(saved_baseline(tmp_path), trained(20, {"choice": {1: 1, 4: 1}}))
    assert base.depth == 2
    assert base.exact == [0.7, 0.9] and base.judged(None).mean == pytest.approx(0.8)
    assert base.seeds == [4, 5] and base.command == "measured so"
    assert base.examples_ratio == 3.0
    once, twice, deep = (cost_of(trained(20, n))["training_flops"] for n in (1, 2, 4))
    policy = parse_depth({"choice": {1: 1, 4: 1}})
    fours = sum(policy.draw(0, step) == 4 for step in range(20))
    ours = (fours * deep + (20 - fours) * once) / 20
    assert base.compute_ratio == pytest.approx(3 * twice / ours)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 7}, r"must have task=.*6.*, got .*7"),
        ({"hidden": 32}, r"must have model=.*16.*, got .*32"),
        ({"depths": (1,)}, r"must be measured at depth 2, .* got \[1\]"),
    ],
)
def test_a_baseline_that_compares_nothing_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"baseline {message}"):
        read_baseline(saved_baseline(tmp_path, **changes), trained(20, 1))


def test_a_baseline_of_several_depths_is_refused(tmp_path):
    path = files.save(result_of(run(0)), tmp_path)[0]
    with pytest.raises(ValueError, match=r"trained at one depth, got .* at depths \[\(1, 2, 3\)\]"):
        read_baseline(path, trained(20, 1))
