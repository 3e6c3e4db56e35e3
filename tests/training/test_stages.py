"""Stages: each goes on from what the one before it left, also when something stops in between."""

import pytest
import torch
from transformers import TrainerCallback

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.training import run as run_module
from hybrid_sleep.training.callbacks import StopOnSignal
from hybrid_sleep.training.config import load_run_config, run_config
from hybrid_sleep.training.run import train

MODEL = {
    "vocab_size": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "window": 11,
}
WARM_UP = {"train.steps": 4, "train.trainable": "new_layers", "model.eviction": "hard"}
WHOLE = {"train.steps": 5, "model.eviction": "sliding"}


@pytest.fixture
def staged(tmp_path, tiny):
    """A run of the paper's two stages, on top of an attention-only model."""
    torch.manual_seed(1234)
    HybridSleepForCausalLM(HybridSleepConfig(**MODEL)).save_pretrained(tmp_path / "base")

    def build(out, stages=(WARM_UP, WHOLE), **changes):
        content = tiny.run(tmp_path / out).to_dict()
        content |= {"model": {"window": 4}, "stages": list(stages)}
        content["init"] = {"checkpoint": str(tmp_path / "base"), "new_layers": [1]}
        return run_config({**content, **changes})

    return build


class StopAt(TrainerCallback):
    """Asks for a stop as a signal would, after a given step."""

    def __init__(self, stop, step):
        self.stop, self.step = stop, step

    def on_step_begin(self, args, state, control, **kwargs):
        self.stop.requested |= state.global_step == self.step - 1


def watch(monkeypatch, *, first=None, stop=None):
    """Keep the first weights of every trainer in `first`; `stop=(folder, step)` ends one there."""
    build = run_module.build_trainer

    def build_and_watch(run, *arguments, **keywords):
        trainer = build(run, *arguments, **keywords)
        if first is not None:
            first.append({n: x.clone() for n, x in trainer.model.state_dict().items()})
        add = trainer.add_callback

        def add_and_stop(callback):
            add(callback)
            if isinstance(callback, StopOnSignal) and stop and run.output_dir == str(stop[0]):
                add(StopAt(callback, stop[1]))

        trainer.add_callback = add_and_stop
        return trainer

    monkeypatch.setattr(run_module, "build_trainer", build_and_watch)


def test_a_stage_starts_bit_for_bit_from_what_the_one_before_it_left(
    tmp_path, monkeypatch, tiny, staged
):
    first = []
    watch(monkeypatch, first=first)
    result = train(staged("out"), progress=False)
    assert result.steps == 9 and result.model_dir == tmp_path / "out"
    one, two = tiny.weights(tmp_path / "out" / "stage-1"), tiny.weights(tmp_path / "out")
    tiny.assert_same(first[1], one)
    base = tiny.weights(tmp_path / "base")
    new = {name for name in one if name.startswith("model.layers.1.")}
    tiny.assert_same({name: one[name] for name in one.keys() - new}, base)
    assert not any(torch.equal(one[name], first[0][name]) for name in new)
    assert not any(torch.equal(two[name], one[name]) for name in one)
    ends = [record["step"] for record in tiny.steps(tmp_path / "out" / "stage-1")[-1:]]
    assert ends == [4] and tiny.steps(tmp_path / "out")[-1]["step"] == 5
    evictions = [
        HybridSleepForCausalLM.from_pretrained(folder).config.eviction
        for folder in (tmp_path / "out" / "stage-1", tmp_path / "out")
    ]
    assert evictions == ["hard", "sliding"]


@pytest.mark.parametrize("interrupted", ["stage-1", "."])
def test_interrupted_in_either_stage_and_resumed_is_uninterrupted(
    tmp_path, monkeypatch, tiny, staged, interrupted
):
    train(staged("whole"), progress=False)
    run = staged("parts")
    with monkeypatch.context() as patch:
        watch(patch, stop=(tmp_path / "parts" / interrupted, 2))
        with pytest.raises(KeyboardInterrupt, match="step 2 of .* is saved in .*--resume"):
            train(run, progress=False)
    assert not list((tmp_path / "parts").glob("*.safetensors"))
    file = tmp_path / "parts" / "stage-1" / "model.safetensors"
    finished = file.stat().st_mtime_ns if file.exists() else None
    assert (finished is None) == (interrupted == "stage-1")
    result = train(run, resume=True, progress=False)
    assert finished in (None, file.stat().st_mtime_ns)
    assert result.steps == 9
    for stage in (".", "stage-1"):
        tiny.assert_same(
            tiny.weights(tmp_path / "parts" / stage), tiny.weights(tmp_path / "whole" / stage)
        )
        assert tiny.steps(tmp_path / "parts" / stage) == tiny.steps(tmp_path / "whole" / stage)


def test_stages_are_runs_with_their_changes_and_places(tmp_path, staged):
    run = staged("out", stages=[WARM_UP, {"sleep_passes": 2}, WHOLE])
    one, two, three = run.stage_runs()
    places = [tmp_path / "out" / "stage-1", tmp_path / "out" / "stage-2", tmp_path / "out"]
    assert [stage.output_dir for stage in (one, two, three)] == [str(place) for place in places]
    assert [s.init.checkpoint for s in (one, two, three)] == [
        str(tmp_path / "base"), str(places[0]), str(places[1])
    ]  # fmt: skip
    assert [s.init.new_layers for s in (one, two, three)] == [[1], [], []]
    assert [s.train.steps for s in (one, two, three)] == [4, 6, 5]
    assert [s.train.trainable for s in (one, two, three)] == ["new_layers", "all", "all"]
    assert [s.model["eviction"] for s in (one, two, three)] == ["hard", "hard", "sliding"]
    depths = [set(stage.sleep_passes.probabilities()) for stage in (one, two, three)]
    assert depths == [{1, 2, 3}, {2}, {1, 2, 3}]
    for stage in (run, one, two, three):
        path = tmp_path / "run.yaml"
        path.write_text(stage.to_yaml())
        assert load_run_config(path) == stage
    assert one.model_config().layer_types == ["full_attention", "linear_attention"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"output_dir": "x"},
            r"stages\[1\]: a key must begin with one of model, task, .*, got 'output_dir'",
        ),
        ({"init.checkpoint": "x"}, r"stages\[1\]: a key must begin .*, got 'init.checkpoint'"),
        ({"train.step": 2}, r"stages\[1\]: train must have keys out of .*, got 'step'"),
        (
            {"train.trainable": "new_layers"},
            r"stages\[1\]: train.trainable must be 'all' where .*, got 'new_layers'",
        ),
        ({"model.eviction": "none"}, r"stages\[1\]: model: eviction must be one of"),
    ],
)
def test_impossible_stages_are_refused_by_their_place(staged, stage, message):
    with pytest.raises(ValueError, match=message):
        staged("out", stages=[WARM_UP, stage])


def test_stages_also_start_from_chance(tmp_path, tiny):
    content = tiny.run(tmp_path / "out", schedule="constant").to_dict()
    content["stages"] = [{"train.steps": 3}, {"train.steps": 2, "model.window": 2}]
    result = train(run_config(content), progress=False)
    assert HybridSleepForCausalLM.from_pretrained(result.model_dir).config.window == 2
    assert load_run_config(tmp_path / "out" / "run.yaml").model["hidden_size"] == 16


def test_a_resumed_run_takes_no_stage_of_another_run_and_no_empty_folder(
    tmp_path, monkeypatch, staged
):
    run = staged("out")
    with pytest.raises(FileNotFoundError, match="must hold a checkpoint .*, got '.*stage-1'"):
        train(run, resume=True, progress=False)
    with monkeypatch.context() as patch:
        watch(patch, stop=(tmp_path / "out", 2))
        with pytest.raises(KeyboardInterrupt):
            train(run, progress=False)
    other = staged("out", stages=[{**WARM_UP, "train.lr_muon": 0.5}, WHOLE])
    with pytest.raises(
        ValueError, match="train.lr_muon must be 0.02, as in the run that is resumed, .*, got 0.5"
    ):
        train(other, resume=True, progress=False)


def test_an_occupied_folder_is_refused_before_the_first_stage(tmp_path, staged):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"of an earlier run")
    with pytest.raises(
        FileExistsError,
        match="must be a folder without a run, got .* with model.safetensors: resume=True",
    ):
        train(staged("out"), progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_what_one_stage_changes_deep_down_stays_its_own(staged):
    theta = {"model.rope_parameters.rope_theta": 5.0}
    run = staged("out", stages=[theta, {"train.steps": 2}])
    one, two = run.stage_runs()
    assert one.model["rope_parameters"]["rope_theta"] == 5.0
    assert two.model["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_layers_named_by_the_run_leave_the_rest_to_the_checkpoint(tmp_path, staged):
    kinds = ["full_attention", "linear_attention"]
    widths = {"intermediate_size": [24, 0], "loop": [0, 1]}
    named = {"vocab_size": 3, "num_hidden_layers": 2, "layer_types": kinds, **widths}
    run = staged("out", model=named)
    assert run.model_config().hidden_size == 16 and run.model_config().window == 11
    assert all(stage.model["loop"] == [0, 1] for stage in run.stage_runs())
