"""Whose memory a cache is: adapters that come and go, copies, and other processes."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from small import assert_same, gap, small_ids, small_model, snapshot

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.sleep.weights import weights_digest, weights_state

peft = pytest.importorskip("peft")


@pytest.fixture
def tuned():
    """A model with two LoRA adapters that both change what it says; "first" is at work."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small_model(dtype=torch.float32), config, adapter_name="first")
    model.add_adapter("second", config)
    return model.eval()


def read(model):
    with torch.no_grad():
        return model(small_ids(1, 8), sleep_passes=2).cache


def scale(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("first", 0.5)


SWITCHES = {
    "another adapter": lambda model: model.set_adapter("second"),
    "both adapters": lambda model: model.base_model.set_adapter(["first", "second"]),
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "merged safely": lambda model: model.merge_adapter(safe_merge=True),
    "merged for good": lambda model: model.merge_and_unload(),
    "deleted": lambda model: model.delete_adapter("second"),
    "scaled": scale,
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_other_adapters_are_other_weights(tuned, switch, tmp_path):
    inner, cache = tuned.get_base_model(), read(tuned)
    tuned(small_ids(1, 2), cache=cache.copy())
    cache.save_pretrained(tmp_path)
    switch(tuned)
    ids, before = small_ids(1, 2), snapshot(cache)
    for call in (inner, inner.generate):
        with pytest.raises(ValueError, match="cache was made .*(adapters|version)"):
            call(ids, cache=cache)
    with pytest.raises(ValueError, match="cache was made .*(adapters|version)"):
        inner.sleep(cache)
    with pytest.raises(ValueError, match="other weights"):
        type(cache).from_pretrained(tmp_path, model=inner)
    with pytest.raises(ValueError, match="cache was made"):
        cache.save_pretrained(tmp_path)
    assert_same(before, snapshot(cache))


def test_an_adapter_that_comes_back_finds_its_memory(tuned):
    cache, ids = read(tuned), small_ids(1, 2)
    wanted = tuned(ids, cache=cache.copy()).logits
    with tuned.disable_adapter():
        with pytest.raises(ValueError, match="adapters"):
            tuned(ids, cache=cache)
        other = read(tuned)
    tuned.set_adapter("second")
    tuned.set_adapter("first")
    assert torch.equal(tuned(ids, cache=cache).logits, wanted)
    with pytest.raises(ValueError, match="adapters"):
        tuned(ids, cache=other)


def test_adapters_of_raw_parameters_go_on_with_their_memory():
    """peft wraps a raw parameter anew in every forward pass, and torch counts that as a change."""
    torch.manual_seed(0)
    plain = small_model(dtype=torch.float32)
    config = peft.LoraConfig(
        target_parameters=["mixer.kv_conv"], target_modules=[], init_lora_weights=False
    )
    model = peft.get_peft_model(plain, config).eval()
    ids = small_ids(1, 9)
    cache = read(model)
    model.generate(input_ids=ids, cache=cache, max_new_tokens=6, sleep_passes=2)
    model(ids, cache=cache)
    weight = plain.model.layers[1].mixer.base_layer.kv_conv
    with torch.no_grad():
        weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="cache was made"):
        model(ids, cache=cache)


def test_a_model_without_adapters_has_the_version_it_had():
    model = small_model()
    counts = sum(p._version for p in model.parameters())
    assert weights_state(model) == (counts, ())
    model.bump_weights_version()
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert weights_state(model) == (counts + 1, ())


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_caches_and_outputs_are_pickled(how):
    model = small_model(dtype=torch.float32)
    out = model(small_ids(2, 8), sleep_passes=2)
    assert out.cache.fast_weights[1].grad_fn is not None
    if how == "pickle":
        again = pickle.loads(pickle.dumps(out))
    else:
        file = io.BytesIO()
        torch.save(out, file)
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert_same(snapshot(out.cache), snapshot(again.cache))
    assert again.cache.fast_weights[1].grad_fn is None
    new = small_ids(2, 6, seed=1)
    unowned = pickle.loads(pickle.dumps(again.cache))
    logits = model(new, cache=again.cache, sleep_passes=2).logits
    assert torch.equal(logits, model(new, cache=out.cache, sleep_passes=2).logits)
    # It belongs to models of the same weights, and to no other.
    other = small_model(dtype=torch.float32, seed=1)
    with pytest.raises(ValueError, match="cache was made by other weights"):
        other(new, cache=unowned)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(new, cache=unowned, sleep_passes=2).logits, logits)
    with pytest.raises(ValueError, match="another model object"):
        model(new, cache=unowned)


def test_a_cache_pickled_after_its_model_changed_serves_no_one():
    model = small_model(dtype=torch.float32)
    cache = read(model)
    model.bump_weights_version()
    late = pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match="had changed or no longer existed"):
        model(small_ids(1, 2), cache=late)
    del model
    orphan = pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match="only a cache that a living model"):
        orphan.save_pretrained("nowhere")


@pytest.mark.slow
def test_a_pickled_cache_goes_on_in_another_process(tmp_path):
    model = small_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    cache = read(model)
    torch.save(cache, tmp_path / "cache.pt")
    program = (
        "import sys, torch; from hybrid_sleep import HybridSleepForCausalLM as Model\n"
        f"model = Model.from_pretrained({str(tmp_path / 'model')!r}).eval()\n"
        f"cache = torch.load({str(tmp_path / 'cache.pt')!r}, weights_only=False)\n"
        "print(model(torch.tensor([[1, 2, 3]]), cache=cache, sleep_passes=2).logits.tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reloaded = HybridSleepForCausalLM.from_pretrained(tmp_path / "model")
    assert weights_digest(reloaded) == weights_digest(model)
    wanted = model(torch.tensor([[1, 2, 3]]), cache=cache, sleep_passes=2).logits
    assert gap(torch.tensor(json.loads(done.stdout)), wanted) <= 1e-6


def test_a_deep_copy_shares_nothing_and_stays_in_the_graph():
    model = small_model()
    embeds = model.get_input_embeddings()(small_ids(1, 8)).detach().requires_grad_()
    cache = model(inputs_embeds=embeds, sleep_passes=2).cache
    twin = copy.deepcopy(cache)
    assert_same(snapshot(cache), snapshot(twin))
    assert twin.fast_weights[1].data_ptr() != cache.fast_weights[1].data_ptr()
    new = small_ids(1, 6, seed=1)

    def gradient(held):
        loss = model(new, cache=held, sleep_passes=2).logits.square().sum()
        return torch.autograd.grad(loss, embeds, retain_graph=True)[0]

    assert torch.equal(gradient(twin), gradient(cache))
    assert copy.copy(cache).states is not cache.states
