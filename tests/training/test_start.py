"""Starting from a checkpoint: the same weights in their places, new layers that add nothing yet."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.training.config import run_config
from hybrid_sleep.training.data import TaskBatches
from hybrid_sleep.training.run import train
from hybrid_sleep.training.start import build_model

ATTENTION = {
    "vocab_size": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "window": 12,
    "rms_norm_eps": 1e-3,
}


def checkpoint(folder, **changes):
    """An attention-only model with weights far from those of any seed a run would draw."""
    torch.manual_seed(1234)
    model = HybridSleepForCausalLM(HybridSleepConfig(**{**ATTENTION, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return model.eval()


def started(tiny, folder, new_layers=(), model=None, out="out", **settings):
    content = tiny.run(folder.parent / out).to_dict()
    content["train"] |= settings
    content["init"] = {"checkpoint": str(folder), "new_layers": list(new_layers)}
    return run_config({**content, "model": model or {}})


@pytest.mark.parametrize("model", [{}, {"state_space": "mamba2"}, {"intermediate_size": 24}])
@pytest.mark.parametrize("new_layers", [[1, 3], [0], [4, 0, 1]])
def test_inserted_layers_change_no_prediction(tmp_path, tiny, new_layers, model):
    before = checkpoint(tmp_path / "base")
    after = build_model(started(tiny, tmp_path / "base", new_layers, model)).eval()
    ids = torch.randint(3, (5, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(after(input_ids=ids).logits, before(input_ids=ids).logits)
    count = 2 + len(new_layers)
    assert after.config.num_hidden_layers == count and after.config.rms_norm_eps == 1e-3
    kept = iter(before.model.layers)
    for i, block in enumerate(after.model.layers):
        assert block.is_state_space == (i in new_layers)
        assert (block.mlp is None) == (i in new_layers and not model.get("intermediate_size"))
        if i not in new_layers:
            tiny.assert_same(block.state_dict(), next(kept).state_dict())
    assert next(kept, None) is None


@pytest.mark.parametrize("recompute", [None, "block"])
def test_frozen_weights_stay_to_the_bit_and_new_ones_move(tmp_path, tiny, recompute):
    before = checkpoint(tmp_path / "base").state_dict()
    run = started(
        tiny,
        tmp_path / "base",
        [1, 3],
        {"window": 4},
        trainable="new_layers",
        weight_decay=0.1,
        activation_checkpointing=recompute,
    )
    first = {name: value.clone() for name, value in build_model(run).state_dict().items()}
    after = tiny.weights(train(run, progress=False).model_dir)
    places = {"model.layers.0.": "model.layers.0.", "model.layers.1.": "model.layers.2."}
    old = {places.get(name[:15], name[:15]) + name[15:]: x for name, x in before.items()}
    assert set(after) - set(old) == {
        name for name in after if name.startswith(("model.layers.1.", "model.layers.3."))
    }
    tiny.assert_same({name: after[name] for name in old}, old)
    still = [name for name in after.keys() - old if torch.equal(after[name], first[name])]
    assert not still


def test_a_hybrid_is_tuned_with_another_window_eviction_and_depth(tmp_path, tiny):
    """The first loss is that of the checkpoint itself, loaded with these keys by transformers."""
    kinds = ["full_attention", "linear_attention"]
    checkpoint(tmp_path / "base", layer_types=kinds, window=4, weights_version=3)
    changed = {"window": 3, "eviction": "sliding", "sleep_attention": "bidirectional"}
    run = started(tiny, tmp_path / "base", model=changed, steps=2, warmup=0, log_every=1)
    loaded = HybridSleepForCausalLM.from_pretrained(tmp_path / "base", **changed)
    model = build_model(run)
    tiny.assert_same(model.state_dict(), loaded.state_dict())
    assert model.config.layer_types == kinds and model.config.weights_version == 0
    result = train(run, progress=False)
    (record, *_) = tiny.steps(result.model_dir)
    ids = TaskBatches(run.load_task(), length=2, size=8, seed=0)[0]
    with torch.no_grad():
        loss = loaded(**ids, sleep_passes=record["depth"]).loss
    assert record["loss"] == pytest.approx(float(loss), rel=1e-5)
    saved = HybridSleepForCausalLM.from_pretrained(result.model_dir).config
    assert (saved.window, saved.eviction) == (3, "sliding")


def test_a_checkpoint_in_parts_or_with_a_tied_head_is_read_whole(tmp_path, tiny):
    before = checkpoint(tmp_path / "base", tie_word_embeddings=True)
    HybridSleepForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(
        tmp_path / "parts", max_shard_size="8KB"
    )
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    after = build_model(started(tiny, tmp_path / "parts"))
    tiny.assert_same(after.state_dict(), before.state_dict())
    assert after.lm_head.weight is after.model.embed_tokens.weight
    with pytest.raises(ValueError, match="model.tie_word_embeddings must be True, .*, got False"):
        started(tiny, tmp_path / "parts", model={"tie_word_embeddings": False})


def test_digits_of_compound_tokens_stay_what_they_were(tmp_path, tiny):
    before = checkpoint(tmp_path / "base", vocab_size=12, token_fields=[3, 4])
    after = build_model(started(tiny, tmp_path / "base"))
    assert after.config.token_fields == [3, 4]
    tiny.assert_same(after.state_dict(), before.state_dict())
    with pytest.raises(ValueError, match=r"model.token_fields must be \[3, 4\], .*, got \[4, 3\]"):
        started(tiny, tmp_path / "base", model={"token_fields": [4, 3]})


@pytest.mark.parametrize(
    ("new_layers", "model", "message"),
    [
        ([4], {}, r"init.new_layers must be below 3, .*, got \[4\]"),
        ([1, 1], {}, r"init.new_layers must be distinct indices of layers, got \[1, 1\]"),
        ([-1], {}, r"init.new_layers\[0\] must be an integer of at least 0, got -1"),
        ([1], {"hidden_size": 8}, "init.checkpoint=.* has .* of shape .*16.*, the model has shape"),
        ([], {"vocab_size": 5}, r"init.checkpoint=.* has .* of shape \(3, 16\)"),
        (
            [],
            {"intermediate_size": 0},
            "init.checkpoint=.* must have .*, got .*mlp.* the model has none",
        ),
        (
            [],
            {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
            "init.checkpoint=.* must have .*init.new_layers.*, got no model.layers.2",
        ),
        (
            [1],
            {"layer_types": ["full_attention"] * 3},
            "init.new_layers must be indices of 'linear_attention' .*, got \\[1\\]",
        ),
        ([1], {"num_hidden_layers": 4}, "model: .* for num_hidden_layers=4, got 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(tmp_path, tiny, new_layers, model, message):
    checkpoint(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        build_model(started(tiny, tmp_path / "base", new_layers, model))


def test_a_loop_is_given_anew_where_layers_shift(tmp_path, tiny):
    checkpoint(tmp_path / "base", loop=(0, 1))
    with pytest.raises(ValueError, match=r"model.loop must be given .* checkpoint's loop=\[0, 1\]"):
        started(tiny, tmp_path / "base", [1])
    run = started(tiny, tmp_path / "base", [1], {"loop": [0, 2]})
    assert run.model_config().loop_range == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distinct_layers": 1}, "layers that share no weights .*, got distinct_layers=1"),
        ({"distinct_passes": 2}, "passes that share their weights .*, got distinct_passes=2"),
    ],
)
def test_layers_are_not_inserted_where_several_would_be_meant(tmp_path, tiny, changes, message):
    checkpoint(tmp_path / "base", **changes)
    with pytest.raises(ValueError, match=message):
        started(tiny, tmp_path / "base", [1])


def test_what_is_no_whole_checkpoint_is_refused(tmp_path, tiny):
    with pytest.raises(
        FileNotFoundError,
        match="init.checkpoint=.*none.* must be the folder of a trained model, got no folder",
    ):
        started(tiny, tmp_path / "none")
    folder = tmp_path / "base"
    checkpoint(folder)
    run, file = started(tiny, folder), folder / "model.safetensors"
    weights = load_file(file)
    gone = weights.pop("model.layers.1.mixer.q_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="init.checkpoint=.* must have .*, got no model.layers.1.mixer.q_proj"
    ):
        build_model(run)
    save_file({**weights, "model.layers.7.x": gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="got .*; model.layers.7.x of .*, the model has none"):
        build_model(run)
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match="init.checkpoint=.* must be .*, got one without model.safetensors"
    ):
        build_model(run)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="must have model_type='hybrid_sleep', got 'llama'"):
        started(tiny, folder)


def test_only_new_layers_can_be_trained_alone(tmp_path, tiny):
    checkpoint(tmp_path / "base")
    with pytest.raises(
        ValueError, match="train.trainable must be 'all' where .*, got 'new_layers'"
    ):
        started(tiny, tmp_path / "base", trainable="new_layers")
