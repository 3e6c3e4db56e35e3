"""Variants of a run: equal compute by an independent count, what each changes, texts by hand."""

from __future__ import annotations

import pytest
import torch

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.eval.measure import flops
from hybrid_sleep.eval.measure.run_cost import cost_of, one_stage
from hybrid_sleep.eval.studies.ablations import ABLATIONS, ablations_of, applicable
from hybrid_sleep.eval.studies.baselines import ASLEEP, BASELINES, baselines_of
from hybrid_sleep.eval.studies.baselines import changed as with_changes
from hybrid_sleep.eval.studies.variants import parse_variant, parse_variants, tied_depths
from hybrid_sleep.training.config import run_config

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FROM_TASK = ("vocab_size", "window")  # fields of a model that its task sets
RINGS = {"width": 8, "states": 3, "steps": [1, 2]}


def run_of(tmp_path, task=None, model=None, sleep_passes=4, **train):
    return run_config(
        {
            "model": {**MODEL, **(model or {})},
            "task": task or {"name": "rule110", "params": RINGS},
            "train": {"steps": 600, "batch_size": 8, "device": "cpu", **train},
            "sleep_passes": sleep_passes,
            "output_dir": str(tmp_path),
        }
    )


def changed(run, variant):
    return with_changes(run, variant.changes)


def products(model, ids, passes) -> int:
    """Multiply-adds of every linear layer while reading `ids`, counted as they happen."""
    seen = 0

    def count(module, inputs, output):
        nonlocal seen
        seen += inputs[0].numel() // inputs[0].shape[-1] * module.weight.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if hasattr(m, "in_features")]
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = 0
    model(ids, labels=labels, sleep_passes=passes, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("sleep_passes", [4, {"uniform": [1, 4]}])
def test_training_at_equal_compute_takes_as_many_products(tmp_path, sleep_passes):
    run = run_of(tmp_path, sleep_passes=sleep_passes)

    def work(run):
        ids = run.load_task().batch("train", 0, 1)["input_ids"]
        model = HybridSleepForCausalLM(run.model_config())
        by_depth = {d: products(model, ids, d) for d in run.sleep_passes.depths()}
        steps = range(run.train.steps)
        return sum(by_depth[run.sleep_passes.draw(run.train.seed, step)] for step in steps)

    wanted, once = work(run), with_changes(run, {"sleep_passes": 1})
    for variant in baselines_of(run, list(BASELINES)):
        other = changed(run, variant)
        assert other.sleep_passes == (run if variant.name in ASLEEP else once).sleep_passes
        share = work(other) / wanted
        if variant.equal in ("compute", "both"):
            # Attention's pairs and the recurrence are in the count by FLOPs, and not in this one.
            assert share == pytest.approx(1, abs=0.06), variant.name
        if variant.equal in ("tokens", "both"):
            assert other.train.steps == pytest.approx(run.train.steps, rel=0.1)


def test_what_the_baselines_are(tmp_path):
    run = run_of(tmp_path)
    found = {v.name: changed(run, v).model_config() for v in baselines_of(run, list(BASELINES))}
    config = run.model_config()
    same = ("hidden_size", "num_hidden_layers", "window", "distinct_layers")
    for name in ("once", "once_tokens"):
        assert all(getattr(found[name], key) == getattr(config, key) for key in same)
    size = {
        name: sum(p.numel() for p in HybridSleepForCausalLM(c).parameters())
        for name, c in found.items()
    }
    deeper = next(c for name, c in found.items() if name.startswith("deeper"))
    looped = next(c for name, c in found.items() if name.startswith("looped"))
    assert deeper.num_hidden_layers == looped.num_hidden_layers > config.num_hidden_layers
    assert looped.distinct_layers == config.num_hidden_layers
    assert size["looped"] == size["once"] < size["deeper"]
    wider = found["wider"]
    assert wider.num_hidden_layers == config.num_hidden_layers
    assert wider.head_dim == config.head_dim and wider.hidden_size > config.hidden_size
    assert found["full_cache"].window == run.load_task().length
    repeated = next(v for v in baselines_of(run, ["repeated"]) if v.equal != "tokens")
    assert found["repeated"].window == 4 * config.window
    assert changed(run, repeated).load_task().length == run.load_task().length + 3 * 3 * 8
    assert found["h_carried"].sleep_carry == "hidden_states"
    assert found["S_carried"].sleep_carry == "fast_weights"
    assert found["untied"].distinct_passes == run.sleep_passes.deepest == 4
    assert size["untied"] > 2 * size["once"]


def test_baselines_that_sleep_are_measured_as_the_run_is(tmp_path):
    run = run_of(tmp_path, sleep_passes={"by_difficulty": {1: 2, 2: 4}})
    for variant in baselines_of(run, ["once", *ASLEEP], [1, 2, 4, 8]):
        asleep = variant.name in ASLEEP
        assert variant.depths == ([1, 2, 4, 8] if asleep else [1])
        assert variant.compared_at == (4 if asleep else 1)
        assert variant.tied == ({1: 2, 2: 4} if asleep else {})
        assert not asleep or variant.equal == "both"


def test_difficulties_are_tied_to_the_first_depth_that_is_asked_for_them(tmp_path):
    def of(sleep_passes):
        return tied_depths(run_of(tmp_path, sleep_passes=sleep_passes))

    assert of({"at_once": {1: 1, 2: [1, 2], 4: [2, 1]}}) == {1: 1, 2: 2}
    assert list(of({"at_once": {1: 2, 2: [1, 2]}}).items()) == [(1, 2), (2, 1)]
    assert of({"by_difficulty": {1: 2, 2: 4}}) == {1: 2, 2: 4}
    assert of(2) == of({"uniform": [1, 2]}) == {}


def test_cost_counts_the_depths_that_a_seed_draws(tmp_path):
    run = run_of(tmp_path, sleep_passes={"choice": {1: 1, 3: 1}})
    drawn = [run.sleep_passes.draw(0, step) for step in range(600)]
    ones = cost_of(run_of(tmp_path, sleep_passes=1, steps=drawn.count(1)))
    threes = cost_of(run_of(tmp_path, sleep_passes=3, steps=drawn.count(3)))
    cost = cost_of(run)
    assert cost["training_flops"] == ones["training_flops"] + threes["training_flops"]
    assert cost["tokens"] == 600 * 8 * (3 * 8 + 1 + 3)
    model = HybridSleepForCausalLM(run.model_config())
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())


def test_cost_of_depths_at_once_counts_what_they_share_once(tmp_path):
    content = run_of(tmp_path, steps=3).to_dict()
    content |= {"task": {"name": "circuit", "params": {"wires": 3, "levels": 4}}}
    content["model"] = {k: v for k, v in content["model"].items() if k not in FROM_TASK}

    def of(passes, asked=None, **changes):
        task = {"name": "circuit", "params": {"wires": 3, "levels": 4, "asked": asked}}
        changed = {**content, "task": task, "sleep_passes": passes}
        return cost_of(run_config({**changed, "train": {**content["train"], **changes}}))

    at_once = {"at_once": {1: 1, 4: 4}}
    one, four, both = of(1, [1]), of(4, [4]), of(at_once)
    for name in ("examples", "tokens"):
        assert both[name] == one[name] + four[name]
    config = run_config({**content, "sleep_passes": 4}).model_config()
    first_window = 3 * flops.pass_flops(config, config.window)
    apart = one["training_flops"] + four["training_flops"]
    assert apart - both["training_flops"] == 3 * content["train"]["batch_size"] * first_window
    assert of(at_once, activation_checkpointing="window")["training_flops"] == apart
    assert of(at_once, backprop_passes=1)["training_flops"] == apart
    # Of two groups of one depth only what follows the passes is a cost of its own.
    twice = of({"at_once": {4: [[1], [4]]}})
    assert twice["tokens"] == 2 * four["tokens"]
    passes = 3 * 3 * content["train"]["batch_size"] * flops.shared_flops(config, (4, 4))
    assert twice["training_flops"] == 2 * four["training_flops"] - passes
    assert passes > 3 * content["train"]["batch_size"] * first_window
    # Shorter rows go on to the end of the longest.
    assert of({"at_once": {1: 1, 4: [1, 4]}})["tokens"] == 2 * of(4, [1, 4])["tokens"]


def test_cost_of_examples_that_ask_about_one_context_counts_it_once(tmp_path):
    content = run_of(tmp_path, steps=3, sleep_passes=4).to_dict()
    content["model"] = {k: v for k, v in content["model"].items() if k not in FROM_TASK}

    def of(passes, **params):
        task = {"name": "ancestor", "params": {"nodes": 16, "hops": [1], "queries": 4, **params}}
        made = run_config({**content, "task": task, "sleep_passes": passes})
        return made.model_config(), cost_of(made)

    config, apart = of(4, apart=True)
    _, alone = of(4, queries=1)
    assert apart["examples"] == alone["examples"] == 3 * 8
    window = flops.pass_flops(config, 32) + flops.sleep_flops(config, 32, 4)
    # Of four examples that read the window three need not.
    saved = alone["training_flops"] - apart["training_flops"]
    assert saved == 3 * 8 * 3 * window * 3 // 4
    _, both = of({"at_once": {4: 1, 2: 1}}, apart=True)
    _, two = of(2, queries=1)
    saved = alone["training_flops"] + two["training_flops"] - both["training_flops"]
    shallow = flops.pass_flops(config, 32) + flops.sleep_flops(config, 32, 2)
    assert saved == 3 * 8 * 3 * (3 * window + 4 * shallow) // 4


def test_cost_of_stages_is_that_of_each(tmp_path):
    stages = [{"train.steps": 5, "sleep_passes": 1}, {"train.steps": 7, "sleep_passes": 3}]
    content = run_of(tmp_path).to_dict()
    cost = cost_of(run_config({**content, "stages": stages}))
    one = cost_of(run_of(tmp_path, sleep_passes=1, steps=5))
    three = cost_of(run_of(tmp_path, sleep_passes=3, steps=7))
    for name in ("steps", "examples", "tokens", "training_flops"):
        assert cost[name] == one[name] + three[name]
    assert cost["parameters"] == one["parameters"]
    with pytest.raises(ValueError, match="stages must be empty where steps are fitted .*, got 2"):
        one_stage(run_config({**content, "stages": stages}))


def test_ablations_change_one_decision_each(tmp_path):
    run = run_of(tmp_path, model={"num_hidden_layers": 4})
    names = [name for name in ABLATIONS if name != "schedule"]
    found = {v.name: v for v in ablations_of(run, names, [1, 2, 3, 4])}
    before = run.model_config()
    keys = (
        "state_space", "eviction", "loop", "sleep_attention", "sleep_schedule", "time_step_min",
    )  # fmt: skip
    for name, variant in found.items():
        after = changed(run, variant)
        config = after.model_config()
        differing = [key for key in keys if getattr(config, key) != getattr(before, key)]
        if after.sleep_passes != run.sleep_passes:
            differing.append("sleep_passes")
        assert len(differing) == 1, name
        assert after.train == run.train
    assert found["state_space_mamba2"].compared_at == 4
    assert {name for name in found if name.startswith("loop")} == {
        "loop_0_2", "loop_2_4", "loop_1_3",
    }  # fmt: skip
    assert changed(run, found["difficulty"]).sleep_passes.to_config() == {
        "by_difficulty": {1: 1, 2: 4}
    }
    assert found["difficulty"].tied == {1: 1, 2: 4}
    slow = changed(run, found["forgetting_slow"]).model_config()
    assert (slow.time_step_min, slow.time_step_max) == (1e-4, 1e-3)
    again = run_of(tmp_path, model={"time_step_min": 1e-4, "time_step_max": 1e-3})
    (back,) = ablations_of(again, ["forgetting"], [1])
    assert back.name == "forgetting_default" and "0.001 to 0.1 at first" in back.label
    assert changed(again, back).model_config().to_dict() == before.to_dict() | {
        "num_hidden_layers": again.model_config().num_hidden_layers,
        "layer_types": again.model_config().layer_types,
        "intermediate_size": again.model_config().intermediate_size,
    }


def test_the_schedule_is_ablated_where_it_matters(tmp_path):
    word = {"name": "parity", "params": {"elements": 24, "layout": "tagging"}}
    run = run_of(tmp_path, task=word, model={"window": 8})
    (variant,) = ablations_of(run, ["schedule"], [1, 2])
    assert changed(run, variant).model_config().sleep_schedule == "every_window"
    with pytest.raises(
        ValueError, match="'schedule' must .* labels lie in its last window"
    ):
        ablations_of(run_of(tmp_path), ["schedule"], [1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda run: baselines_of(run(), ["longer"]),
            "baseline must be one of once, .* got 'longer'",
        ),
        (
            lambda run: baselines_of(run(sleep_passes=1), ["once"]),
            "sleep_passes must be above 1 .*, got 1",
        ),
        (
            lambda run: baselines_of(run(model={"sleep_carry": "fast_weights"}), ["h_carried"]),
            "model.sleep_carry must be 'both' .* got 'fast_weights'",
        ),
        (
            lambda run: baselines_of(run(model={"distinct_passes": 2}), ["untied"]),
            "model.distinct_passes must be 1 in a run that is compared with 'untied', got 2",
        ),
        (
            lambda run: baselines_of(run(model={"window": 5}), ["repeated"]),
            "baseline 'repeated' must have a run whose windows are the task's, of 8 tokens, .*=5",
        ),
        (
            lambda run: ablations_of(run(), ["rope"], [1]),
            "ablation must be one of state_space, .* got 'rope'",
        ),
        (
            lambda run: ablations_of(run(sleep_passes=1), ["depth"], [1]),
            "ablation 'depth' must have a run that sleeps, got sleep_passes=1",
        ),
        (
            lambda run: ablations_of(
                run(task={"name": "rule110", "params": {"width": 8, "states": 2, "steps": 2}}),
                ["difficulty"],
                [1],
            ),
            r"two or more difficulties .* got 'rule110' with steps=\[2\]",
        ),
        (
            lambda run: ablations_of(
                run(model={"num_hidden_layers": 1, "layer_types": ["linear_attention"]}),
                ["loop"],
                [1],
            ),
            "ablation 'loop' must have layers that leave another range",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda **changes: run_of(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("as_it_is", ("as_it_is", [])),
        ("as-it.is:", ("as-it.is", [])),
        ("a:x=1", ("a", ["x=1"])),
        ("a:x=[1, 2],y={b: {c: 3, d: 4}}, z=5", ("a", ["x=[1, 2]", "y={b: {c: 3, d: 4}}", "z=5"])),
        ("a:x='1,2',y=\"],\"", ("a", ["x='1,2'", 'y="],"'])),
        ("a:x=[b, c],train.y = 2", ("a", ["x=[b, c]", "train.y = 2"])),
    ],
)
def test_a_variant_is_a_name_and_changes(text, expected):
    assert parse_variant(text) == expected


@pytest.mark.parametrize("text", ["", ":x=1", "../a:x=1", "a:x", "a:x,y=1"])
def test_what_is_no_variant_is_refused(text):
    with pytest.raises(ValueError, match="variant must be NAME:key=value,key=value, .* got"):
        parse_variant(text)


@pytest.mark.parametrize("texts", [[], ["a", "a:x=1"]])
def test_variants_have_different_names(texts):
    with pytest.raises(ValueError, match="variants must be one or more with different names, got"):
        parse_variants(texts)


def test_of_all_ablations_those_without_effect_are_left_out(tmp_path):
    run = run_of(tmp_path)
    kept, left_out = applicable(run, ["attention", "schedule", "difficulty"], [1, 2])
    assert kept == ["attention", "difficulty"]
    assert list(left_out) == ["schedule"]
