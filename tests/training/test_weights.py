"""A saved model is loaded whole or refused, by every command that loads one."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.eval.harness.tokenizer import load_tokenizer
from hybrid_sleep.eval.measure.checkpoints import bench_checkpoints
from hybrid_sleep.training.weights import load_model

SIZES = {
    "vocab_size": 3, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "window": 12,
}  # fmt: skip
NORM = "model.norm.weight"


@pytest.fixture
def saved(tmp_path):
    """A model in a folder."""
    model = HybridSleepForCausalLM(HybridSleepConfig(**SIZES))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewritten(change):
    def damage(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return damage


def prefixed(weights):
    for name in list(weights):
        weights[f"_orig_mod.{name}"] = weights.pop(name)


def reshaped(weights):
    weights[NORM] = weights[NORM][:-1].clone()


def raw(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def edited(change):
    def damage(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return damage


def as_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


FILE = "model.safetensors"
DAMAGES = {
    "renamed": (rewritten(prefixed), r"got no model\.\S+, .* more; _orig_mod\."),
    "missing": (
        rewritten(lambda w: w.pop(NORM)),
        rf"checkpoint '.*' must have exactly the weights .*, got no {NORM}",
    ),
    "another": (
        rewritten(lambda w: w.update(x=torch.ones(2))),
        r"x of shape \(2,\), the model has none",
    ),
    "shape": (rewritten(reshaped), rf"{NORM} of shape \(15,\), the model has shape \(16,\)"),
    "cut": (lambda f: os.truncate(f / FILE, 1000), f"{FILE} is damaged: "),
    "empty": (raw(FILE, b""), f"{FILE} is damaged: it is empty"),
    "pointer": (raw(FILE, b"version https://git-lfs.github.com/spec/v1"), f"{FILE} is a pointer"),
    "folder": (as_folder, f"{FILE} is a folder; allowed: a file"),
    "gone": (
        lambda f: (f / FILE).unlink(),
        f"must be the folder of a trained model, got one without {FILE}",
    ),
    "config cut": (raw("config.json", b'{"model_type": "hyb'), "config.json is damaged: no JSON"),
    "config list": (raw("config.json", b"[]"), "config.json is damaged: it holds a list"),
    "config gone": (
        lambda f: (f / "config.json").unlink(),
        "must be the folder of a trained model, got one without config.json",
    ),
    "layers": (edited(lambda c: c.update(window=0)), "config.json: window must be"),
    "sizes": (edited(lambda c: c.update(vocab_size=5)), "the model has shape .5, 16."),
    "other model": (
        edited(lambda c: c.update(model_type="gpt2")),
        "must have model_type='hybrid_sleep', got 'gpt2'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_not_whole_is_refused(saved, damage, message):
    load_model(saved)
    damage(saved)
    with pytest.raises((ValueError, OSError), match=message):
        load_model(saved)


def test_commands_load_models_by_this_one_function(saved, tiny, tmp_path):
    """Accuracy by depth, and lm-eval's model; the others take theirs from the first of them."""
    (saved / "run.yaml").write_text(tiny.run(saved).to_yaml())
    rewritten(prefixed)(saved)
    with pytest.raises(ValueError, match="must have exactly the weights .*, got no model"):
        bench_checkpoints([saved], [1], count=1)
    pytest.importorskip("lm_eval")
    from hybrid_sleep.eval.harness import HybridSleepLM

    with pytest.raises(ValueError, match="must have exactly the weights .*, got no model"):
        HybridSleepLM(saved)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_ones_are_loaded_to_the_bit_in_one_file_or_several(tmp_path, tied):
    model = HybridSleepForCausalLM(HybridSleepConfig(**SIZES, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 1
    if tied:  # under the other of its names
        weights = load_file(tmp_path / "one" / FILE)
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        save_file(weights, tmp_path / "one" / FILE, metadata={"format": "pt"})
    for folder in ("one", "parts"):
        loaded = load_model(tmp_path / folder).state_dict()
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(x, loaded[name]) for name, x in model.state_dict().items())
    parts[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"got one without {parts[0].name}"):
        load_model(tmp_path / "parts")
    (tmp_path / "parts" / f"{FILE}.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="index.json is damaged: it has no weight_map"):
        load_model(tmp_path / "parts")


def test_a_damaged_tokenizer_is_named(tmp_path):
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    load_tokenizer(tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=f"tokenizer must .* '{tmp_path}' that cannot be loaded"):
        load_tokenizer(tmp_path, None)
