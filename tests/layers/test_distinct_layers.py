"""Layers applied more than once: as a model whose layers happen to have equal weights."""

from __future__ import annotations

import pytest
import torch
from small import Row, gap, small_config, small_ids, small_model

from hybrid_sleep import HybridSleepForCausalLM, SleepCache
from hybrid_sleep.sleep.minimal import MinimalModel

KINDS = ["full_attention", "linear_attention"]


def unshared(model: HybridSleepForCausalLM) -> HybridSleepForCausalLM:
    """The same function with a copy of the weights for each application of a layer."""
    config = small_config(**{**model.config.to_diff_dict(), "distinct_layers": None})
    distinct = len(model.model.layers)
    weights = {}
    for name, value in HybridSleepForCausalLM(config).state_dict().items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str(int(parts[2]) % distinct)
        weights[name] = model.state_dict()[".".join(parts)].to(torch.float64, copy=True)
        assert weights[name].shape == value.shape
    copy = HybridSleepForCausalLM(config).double().eval()
    copy.load_state_dict(weights)
    return copy


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loop": (1, 3)},
        {"eviction": "sliding", "state_space": "mamba2"},
        {"sleep_attention": "bidirectional", "intermediate_size": [7, 0, 7, 0]},
    ],
    ids=str,
)
def test_shared_layers_are_the_specification_with_equal_weights(changes):
    model = small_model(layer_types=KINDS * 2, distinct_layers=2, **changes)
    assert len(model.model.layers) == 2
    ids = small_ids(2, 17)
    with torch.no_grad():
        out = model(ids, sleep_passes=3)
    twin = unshared(model)
    oracle = MinimalModel(twin.config, twin.state_dict())
    for row, tokens in enumerate(ids):
        want = oracle.read(Row(5).read(tokens.tolist(), 3).windows)
        assert gap(out.logits[row], torch.stack(want.logits)) <= 1e-10
        for i, S in want.S.items():
            assert gap(out.cache.fast_weights[i][row], S) <= 1e-10
    assert set(out.cache.fast_weights) == {1, 3}


def test_gradients_of_shared_weights_are_the_sums_over_their_applications():
    model = small_model(layer_types=KINDS * 2, distinct_layers=2)
    model.set_activation_checkpointing("block")
    twin = unshared(model)
    ids = small_ids(2, 12)
    labels = ids.clone()
    labels[:, :10] = -100
    for one in (model, twin):
        one(ids, labels=labels, sleep_passes=2).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = theirs[name].grad
        if name.startswith("model.layers."):
            parts = name.split(".")
            parts[2] = str(int(parts[2]) + 2)
            wanted = wanted + theirs[".".join(parts)].grad
        assert gap(parameter.grad, wanted) <= 1e-10, name


def test_shared_layers_are_saved_once_and_generate_as_they_read(tmp_path):
    model = small_model(layer_types=KINDS * 2, distinct_layers=2, dtype=torch.float32, noise=0.05)
    model.save_pretrained(tmp_path)
    again = HybridSleepForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.distinct_layers == 2
    assert sum(p.numel() for p in again.parameters()) < sum(
        p.numel() for p in unshared(model).parameters()
    )
    ids = small_ids(1, 8)
    out = again.generate(ids, max_new_tokens=9, do_sample=False, sleep_passes=2)
    cache = SleepCache(again.config)
    for token in range(out.shape[1] - 1):
        with torch.no_grad():
            step = again(
                out[:, token : token + 1], cache=cache, sleep_passes=2
            )
        if token >= 7:
            assert step.logits[0, -1].argmax() == out[0, token + 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distinct_layers": 3}, "distinct_layers must be None or divide num_hidden_layers=4, got"),
        ({"distinct_layers": 0}, "distinct_layers must be an integer of at least 1, got 0"),
        ({"distinct_layers": 1}, "layer_types must repeat after distinct_layers=1"),
        (
            {"distinct_layers": 2, "intermediate_size": [4, 4, 4, 5]},
            "intermediate_size must repeat after distinct_layers=2",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
