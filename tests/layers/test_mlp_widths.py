"""One MLP width per layer: parameters, gradients, saving and loading."""

from __future__ import annotations

import json

import pytest
import torch
from small import Row, gap, small_config, small_ids, small_model

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.sleep.minimal import MinimalModel

KINDS = ["full_attention", "linear_attention", "full_attention", "linear_attention"]


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_each_layer_has_the_mlp_of_its_width():
    bare = small_model(intermediate_size=0)
    for widths in ([10, 0, 7, 0], [0, 0, 0, 3], [10] * 4):
        model = small_model(intermediate_size=widths)
        # Three matrices and a norm where there is an MLP, nothing where there is none.
        more = sum(3 * 12 * width + 12 for width in widths if width)
        assert parameters(model) == parameters(bare) + more
        for block, width in zip(model.model.layers, widths, strict=True):
            assert (block.mlp is None) == (width == 0)
            assert not any("mlp" in name for name, _ in block.named_parameters()) or width
    whole = small_model(intermediate_size=10).state_dict()
    listed = small_model(intermediate_size=[10] * 4).state_dict()
    assert whole.keys() == listed.keys()
    assert all(torch.equal(x, listed[name]) for name, x in whole.items())


@pytest.mark.parametrize("widths", [[10, 0, 7, 0], [0, 3, 0, 0]])
def test_gradients_equal_the_specification(widths):
    model = small_model(intermediate_size=widths, window=3, layer_types=KINDS, loop=(1, 3))
    ids = small_ids(1, 8)
    logits = model(ids, sleep_passes=3).logits[0]
    weigh = torch.randn_like(logits)
    (logits * weigh).sum().backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    oracle = MinimalModel(model.config, weights)
    wanted = oracle.read(Row(3).read(ids[0].tolist(), 3).windows).logits
    (torch.stack(wanted) * weigh).sum().backward()
    assert gap(logits, torch.stack(wanted)) <= 1e-10
    for name, parameter in model.named_parameters():
        assert gap(parameter.grad, weights[name].grad) <= 1e-10, name


@pytest.mark.parametrize("width", [10, 0, [10, 0, 7, 0]])
def test_a_saved_model_comes_back(tmp_path, width):
    model = small_model(intermediate_size=width, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == width
    assert HybridSleepConfig.from_pretrained(tmp_path).intermediate_size == width
    again = HybridSleepForCausalLM.from_pretrained(tmp_path)
    ids = small_ids(2, 12)
    assert torch.equal(again(ids, sleep_passes=2).logits, model(ids, sleep_passes=2).logits)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (-1, "intermediate_size must be an integer of at least 0, got -1"),
        ([10, 0], "intermediate_size .* num_hidden_layers=4, got 2 entries"),
        ([10, 0, -3, 0], r"intermediate_size\[2\] must be an integer of at least 0, got -3"),
        ([10, 0, True, 0], r"intermediate_size\[2\] must be an integer of at least 0, got True"),
    ],
)
def test_what_is_no_width_is_refused(width, message):
    with pytest.raises(ValueError, match=message):
        small_config(intermediate_size=width)
