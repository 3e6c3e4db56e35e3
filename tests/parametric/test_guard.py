"""A guard that comes back after the weights were edited."""

from __future__ import annotations

import pytest
import torch
from editable import tiny_llama

from hybrid_sleep.parametric.ewc import OnlineEWC
from hybrid_sleep.sleep.weights import bump_version


def test_a_guard_is_anchored_anew_where_it_is_told_that_weights_were_edited(tmp_path):
    model = tiny_llama()
    guard = OnlineEWC(model, 2.0, decay=0.5)
    guard.consolidate(guard.measure([[3, 4, 5, 6], [7, 8, 9]]))
    guard.save(tmp_path / "guard.safetensors")
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.add_(0.1)
    bump_version(model)
    with pytest.raises(ValueError, match="model must have the weights that .* was saved with"):
        OnlineEWC.load(tmp_path / "guard.safetensors", model)
    again = OnlineEWC.load(tmp_path / "guard.safetensors", model, anew=True)
    assert float(again.penalty()) == 0 and again.tasks == 1 and again.decay == 0.5
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(again.importance[name], guard.importance[name])
    assert torch.equal(again.anchors[name], weight)
    with torch.no_grad():
        weight.add_(0.1)
    # 2 / 2 * sum F d^2, d as it is after rounding.
    gap = weight.detach() - again.anchors[name]
    want = float((guard.importance[name] * gap.square()).sum())
    assert float(again.penalty().detach()) == pytest.approx(want, rel=1e-6)
