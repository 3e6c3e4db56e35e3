"""A run and what it is compared with: trained small, summed up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.eval import results as files
from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.measure.accuracy import measure_depth
from hybrid_sleep.eval.measure.depth import TaskRecord
from hybrid_sleep.eval.measure.statistics import Gap
from hybrid_sleep.eval.render import comparison as render
from hybrid_sleep.eval.studies import comparison
from hybrid_sleep.eval.studies.comparison import Comparison
from hybrid_sleep.eval.studies.rates import best
from hybrid_sleep.eval.studies.variants import Variant
from hybrid_sleep.eval.tasks.accuracy import Accuracy, measure_accuracy
from hybrid_sleep.eval.trials import Call, Trial
from hybrid_sleep.support.provenance import provenance
from hybrid_sleep.training import load_run_config, train
from hybrid_sleep.training.data import HeldOut

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


def accuracy(zero, one, passes=1.0):
    """Three questions of 0 steps, one of 1."""
    share = (3 * zero + one) / 4
    return Accuracy(
        exact=share, per_question=share, per_label=share, by_difficulty={0: zero, 1: one},
        questions={0: 3, 1: 1}, seconds=1.0, passes=passes,
    )  # fmt: skip


def trial(variant, seed, shares, **more):
    cost = {"steps": 10, "training_flops": 100, "parameters": 5, "wake_flops": 7,
            "memory_bytes": 11}  # fmt: skip
    return Trial(
        variant=variant, seed=seed, depths=list(shares), examples=4, config={},
        first_weights=None, steps=10, seconds=2.0, cost=cost,
        accuracy={depth: accuracy(*pair) for depth, pair in shares.items()}, **more,
    )  # fmt: skip


def made_up(**changes):
    def variant(name, label, depths, at, role, equal, tied=None):
        return Variant(name=name, label=label, depths=depths, compared_at=at, role=role,
                       equal=equal, tied=tied or {})  # fmt: skip

    auto = {"auto_passes": 2, "auto": {0.1: accuracy(0.5, 0.5, 1.5)}}
    content = {
        "config": "run.yaml", "overrides": [], "examples": 4, "seeds": [0, 1],
        "clock": "processor", "left_out": {"schedule": "it is the same"}, "ended": "interrupted",
        "command": "so", "provenance": provenance(),
        "task": TaskRecord(name="rule110", params={"width": 4}, difficulty="steps",
                           floor={0: 0.25, 1: 0.5}, majority={"exact": 0.2, "per_label": 0.3},
                           chance=0.25),
        "variants": [
            variant("sleep", "sleep, N = 2", [1, 2], 2, "reference", "both", {0: 1, 1: 2}),
            variant("once", "N = 1", [1], 1, "baseline", "compute"),
            variant("gone", "not yet", [1], 1, "baseline", "compute"),
        ],
        "rows": [
            trial("sleep", 0, {1: (0.8, 0.2), 2: (1.0, 0.6)}, **auto),
            trial("sleep", 1, {1: (0.6, 0.2), 2: (0.8, 0.4)}, **auto),
            trial("once", 0, {1: (0.7, 0.1)}),
            trial("once", 1, {1: (0.9, 0.5)}),
        ],
    }  # fmt: skip
    return Comparison(**{**content, **changes})


def test_shares_intervals_and_gaps_are_summed_up_seed_by_seed():
    result = made_up()
    sleep, once, gone = result.variants
    assert result.measured == [sleep, once] and result.reference is sleep
    assert result.shares(sleep, 2, 1).mean == pytest.approx(0.5)
    assert result.shares(sleep, 2).values == pytest.approx((0.9, 0.7))
    # Two values .2 apart: t = 12.706 times .1, cut at 0 and 1.
    assert result.shares(sleep, 2).interval == (0.0, 1.0)
    # Each difficulty at its own depth: steps 0 at depth 1, steps 1 at depth 2.
    tied = {level: share.mean for level, share in result.tied(sleep).items()}
    assert tied == pytest.approx({0: 0.7, 1: 0.5}) and result.tied(once) == {}
    # .9 - .55 and .7 - .8.
    assert result.ahead(once) == Gap(*map(pytest.approx, (0.125, -0.1, 0.35)))
    assert result.ahead(gone) is None
    assert result.floor == pytest.approx((3 * 0.25 + 0.5) / 4)
    ((tolerance, passes, shares),) = result.auto
    assert (tolerance, passes, shares.mean) == (0.1, 1.5, 0.5)
    assert Comparison.from_content(result.content()) == result
    (line,) = render.words(result)
    assert line.startswith("At equal compute: sleep (evaluated at N = 2) is 0.125 ahead of N = 1 (")
    assert "(-0.100 to +0.350, seed by seed), but the seeds do not agree; on steps = 1 " in line
    # .6 - .1 and .4 - .5.
    assert result.ahead(once, 1) == Gap(*map(pytest.approx, (0.2, -0.1, 0.5)))
    assert line.endswith(
        "0.200 ahead of it (-0.100 to +0.500, seed by seed), but the seeds do not agree."
    )
    text = render.markdown(result)
    assert "| N = 1 (compute) | 0.800 | 0.300 |" in text
    assert "| floor | 0.250 | 0.500 |" in text
    assert "| sleep, N = 2, each at its own N | 0.700 | 0.500 |" in text
    assert "| 0.1 | 1.50 | 0.500 [0.500, 0.500] |" in text
    assert "- Left out: it is the same." in text and "Not complete (interrupted)" in text
    result.rows[3] = trial("once", 1, {1: (0.5, 0.1)})
    assert render.words(result)[0].endswith("with every seed.")
    result.rows[2:] = [trial("once", 0, {1: (1.0, 0.6)}), trial("once", 1, {1: (0.81, 0.4)})]
    assert render.words(result)[0].endswith("so no difference.")


def test_kinds_of_questions_are_shown_apart():
    result = made_up()
    for row, even, odd in zip(result.rows, (0.5, 0.3, 0.2, 0.2), (0.7, 0.5, 0.0, 0.8), strict=True):
        for found in row.accuracy.values():
            # Of the last kind there is no question of 0 steps.
            found.by_kind = {"even": {0: 1.0, 1: even}, "odd": {0: 0.0, 1: odd}, "rare": {1: 1.0}}
    sleep, once, _ = result.variants
    assert Comparison.from_content(result.content()) == result
    assert result.kinds == ["even", "odd"]
    assert result.shares(sleep, 2, 1, "even").values == (0.5, 0.3)
    assert result.ahead(once, 1, "even") == Gap(*map(pytest.approx, (0.2, 0.1, 0.3)))
    assert render.words(result)[0].endswith(
        "but the seeds do not agree; on even there 0.200 ahead of it (+0.100 to +0.300, seed by "
        "seed), with every seed; on odd there 0.200 ahead of it (-0.300 to +0.700, seed by seed), "
        "but the seeds do not agree."
    )
    text = render.markdown(result)
    assert "| accuracy by steps, even | 0 | 1 |" in text and "rare" not in text
    assert "| sleep, N = 2 | 1.000 | 0.400 |" in text
    assert "| N = 1 (compute) | 0.000 | 0.400 |" in text


def test_without_the_reference_there_is_nothing_to_show(tmp_path):
    result = made_up(rows=[trial("once", 0, {1: (0.7, 0.1)})])
    assert render.markdown(result) == (
        "Not complete (interrupted): sleep, N = 2 has not been measured.\n"
    )
    assert files.save(result, tmp_path)


def test_a_run_is_trained_with_its_baselines_and_goes_on(tmp_path, config):
    out = tmp_path / "results"
    given = {"config": config, "count": 40, "out": out, "command": "the command"}
    part = comparison.run(Call(**given, minutes=1e-4), baselines=["once"])
    assert (part.ended, part.complete) == ("time is up", False)
    result = comparison.run(Call(**given), baselines=["once"], ablations=["adaptive"])
    assert result.complete
    names = {(row.variant, row.seed) for row in result.rows}
    assert names == {(v, s) for v in ("sleep", "once", "once_tokens") for s in (0, 1, 2)}
    (own, longer) = (result.trials(name)[0] for name in ("sleep", "once"))
    assert longer.steps > own.steps == 3
    # A row is what one training gives.
    run = load_run_config(config, {"train.seed": 2, "output_dir": str(tmp_path / "alone")})
    model = HybridSleepForCausalLM.from_pretrained(train(run, progress=False).model_dir)
    measured = measure_depth(model, run.load_task(), [1, 2], 40)
    for depth, found in result.trials("sleep")[2].accuracy.items():
        assert {**vars(found), "seconds": 0} == {**vars(measured[depth]), "seconds": 0}
    assert result.task == TaskRecord.of(run.load_task())
    paths = files.save(result, out)
    before = [path.read_bytes() for path in paths[1:]]
    assert files.render(paths[0]) == paths[1:]
    assert [path.read_bytes() for path in paths[1:]] == before
    assert b"the command" in before[0] and b"mean passes" in before[0]


def test_rates_are_chosen_on_validation_examples_for_each_variant(tmp_path, config):
    out = tmp_path / "results"
    given = {"baselines": ["once"], "rates": [4.0, 0.25], "depths": [2]}
    call = {"config": config, "count": 40, "out": out}
    part = comparison.run(Call(**call, minutes=1e-4), **given)
    assert (part.ended, part.rows, part.seeds) == ("time is up", [], [0, 1, 2])
    assert "sleep, N = 2 has not been measured" in render.markdown(part)
    result = comparison.run(Call(**call), **given)
    assert result.complete and list(result.rates) == ["sleep", "once"]
    assert [variant.name for variant in result.variants] == ["sleep", "once", "once_tokens"]
    for variant in result.variants:
        found = result.rates[variant.name.removesuffix("_tokens")]
        assert list(found) == [0.25, 4.0] and found[variant.rate] == max(found.values())
        assert {row.config["train"]["lr_muon"] for row in result.trials(variant.name).values()} == {
            2e-3 * variant.rate
        }
    # What a rate is judged by, trained and measured by hand.
    rates = {"train.lr_muon": 8e-3, "train.lr_adamw": 2e-4}
    run = load_run_config(
        config, {**rates, "train.seed": 3, "output_dir": str(tmp_path / "alone")}
    )
    model = HybridSleepForCausalLM.from_pretrained(train(run, progress=False).model_dir)
    held_out = HeldOut(task=run.load_task(), depths=(2,), count=40, seed=3)
    measured = measure_accuracy(model, held_out.task, held_out.batches(), [2])[2]
    assert result.rates["sleep"][4.0] == measured.per_question
    text = files.save(result, out)[1].read_text()
    assert "| learning rates of the config times | 0.25 | 4 |" in text
    # The trials of rates are a comparison of their own.
    assert "validation examples" in files.render(out / "rates" / "results.json")[0].read_text()


@pytest.mark.parametrize(
    ("shares", "chosen"),
    [
        ({0.5: 0.2, 1.0: 0.1, 2.0: 0.3}, 2.0),
        ({0.25: 0.3, 2.0: 0.3, 8.0: 0.3}, 2.0),
        ({0.5: 0.3, 1.0: 0.3, 2.0: 0.1}, 1.0),
    ],
)
def test_the_best_rate_is_the_one_nearest_to_the_config_among_equals(shares, chosen):
    assert best(shares) == chosen


def test_variants_are_trained_measured_and_resumed(tmp_path, config, monkeypatch):
    out, done = tmp_path / "results", []
    call = Call(config=config, seeds=[0, 1], count=40, out=out, command="the command")
    given = {
        "depths": [1, 3],
        "variants": {"plain": [], "wide": ["train.batch_size=16", "sleep_passes=1"]},
    }

    def stop_after_three(*arguments, **keywords):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(train(*arguments, **keywords))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr("hybrid_sleep.training.train", stop_after_three)
        part = comparison.run(call, **given)
    assert (part.complete, part.ended, len(part.rows)) == (False, "interrupted", 3)
    assert "Not complete (interrupted)" in render.markdown(part)
    result = comparison.run(call, **given)
    assert result.complete and result.rows[:3] == part.rows
    assert [(v.name, v.role, v.compared_at) for v in result.variants] == [
        ("plain", "reference", 1), ("wide", "ablation", 1),
    ]  # fmt: skip
    # Table and figure come from the file alone.
    table = files.save(result, out)[1].read_text()
    assert "- plain: as it is\n- wide: `train.batch_size=16`, `sleep_passes=1`" in table
    assert "| wide |" in table and "the command" in table
    assert len(render.figure(result).axes[0].containers) == 2
    # One alone shows what it knows at every depth, by difficulty.
    alone = replace(
        result, variants=result.variants[:1], rows=[*result.trials("plain").values()]
    )
    shown = render.figure(alone).axes[0].containers
    assert [line.get_label() for line in shown] == [f"steps = {x}" for x in result.questions]
    for level, line in zip(result.questions, shown, strict=True):
        shares = [alone.shares(alone.reference, N, level).mean for N in (1, 3)]
        assert line.lines[0].get_ydata().tolist() == pytest.approx(shares)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": [0, 1], "baselines": ["once"]}, r"seeds must be at least 3, .* got \[0, 1\]"),
        ({"baselines": ["longer"]}, "baseline must be one of once, .* got 'longer'"),
        ({"ablations": ["schedule"]}, "ablation 'schedule' must have a task with labels"),
        ({"overrides": ["sleep_passes=1"], "baselines": ["once"]}, "sleep_passes must be above 1"),
        ({"rates": [1, 0]}, "rates must be .* above 0, got 0"),
        ({"rates": [1, 1.0]}, r"rates must be different multiples, got \[1, 1.0\]"),
        ({"variants": {"a": []}, "rates": [2]}, "variants must come without .*, got both"),
        ({"depths": [0]}, "depths must be an integer of at least 1, got 0"),
        ({"variants": {"a": []}, "ablations": ["loop"]}, "variants must come without .*, got both"),
        (
            {"variants": {"a": [], "b": ["task.params.steps=2"]}},
            "variant 'b': task must be one for all",
        ),
        (
            {"overrides": ["stages=[{train.steps: 1}]"], "ablations": ["loop"]},
            "stages must be empty",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(config, given, message, monkeypatch):
    monkeypatch.setattr("hybrid_sleep.training.train", lambda *a, **k: pytest.fail("trained"))
    call = {name: given.pop(name) for name in ("seeds", "overrides") if name in given}
    with pytest.raises(ValueError, match=message):
        comparison.run(Call(config=config, **call), **given)


def test_the_reference_comes_from_the_config(config):
    run = load_run_config(config, {"sleep_passes": {"by_difficulty": {0: 1, 1: 3}}})
    reference = comparison._reference(run, [1, 2, 3])
    assert reference.label == "sleep, N = 1, 3 in training"
    assert (reference.compared_at, reference.tied) == (3, {0: 1, 1: 3})
    assert tasks.load("rule110", **run.task.params).difficulty == "steps"
