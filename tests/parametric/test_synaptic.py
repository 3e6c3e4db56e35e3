"""Importance by the path that weights took, by hand, and all weights alike."""

from __future__ import annotations

import pytest
import torch
from continual import Bowl, bowl

from hybrid_sleep.parametric.ewc import L2, SynapticIntelligence
from hybrid_sleep.training import fit

H = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)


def train(model, guard, target, h=H, steps=400, lr=0.4, optimizer=None):
    optimizer = optimizer or torch.optim.SGD([model.w], lr=lr)
    with guard.guarding(optimizer):
        task = {"h": h, "target": target}
        fit(model, [task] * steps, bowl, steps=steps, optimizer=optimizer, grad_clip=None)


def test_synaptic_intelligence_is_the_integral_along_the_path():
    """By hand over five steps of descent; the sum of omega is what the loss fell by."""
    model = Bowl(torch.tensor([3.0, -2.0, 1.0, 0.0]))
    target = torch.tensor([0.0, 0.0, 0.0, 1.0]).double()
    guard = SynapticIntelligence(model, 0.0, damping=0.3, normalise=False)
    w, omega = model.w.detach().clone(), torch.zeros(4).double()
    for _ in range(5):
        g = H * (w - target)
        omega += g * 0.01 * g
        w = w - 0.01 * g
    start = model.w.detach().clone()
    before = float(bowl(model, {"h": H, "target": target}).detach())
    train(model, guard, target, steps=5, lr=0.01)
    torch.testing.assert_close(guard.path["w"].double(), omega, rtol=1e-5, atol=1e-9)
    fell = before - float(bowl(model, {"h": H, "target": target}).detach())
    assert float(omega.sum()) == pytest.approx(fell, rel=0.02)
    guard.consolidate()
    wanted = omega / ((w - start).square() + 0.3)
    torch.testing.assert_close(guard.importance["w"].double(), wanted, rtol=1e-5, atol=1e-9)
    assert not guard.path


def test_negative_synaptic_importance_counts_as_none():
    """Against the gradient: omega is negative there, and a penalty of it had no lower bound."""
    model = Bowl(torch.tensor([1.0, 1.0]))
    guard = SynapticIntelligence(model, 1.0)
    model.w.grad = torch.tensor([1.0, 1.0]).double()
    guard.before_step()
    with torch.no_grad():
        model.w.add_(torch.tensor([-0.1, 0.1]).double())
    guard.after_step([{"params": [model.w], "lr": 0.1}])
    assert guard.path["w"].tolist() == pytest.approx([0.1, -0.1])
    guard.consolidate()
    assert guard.importance["w"].tolist() == [2.0, 0.0]
    with torch.no_grad():
        model.w.add_(100.0)
    assert float(guard.penalty().detach()) >= 0
    with pytest.raises(ValueError, match="path must have at least a step since"):
        guard.consolidate()


def test_the_path_counts_the_pull_and_no_step_without_gradient():
    model, guard = Bowl(torch.zeros(4)), None
    guard = SynapticIntelligence(model, 10.0, normalise=False)
    guard.importance = {"w": torch.ones(4)}
    train(model, guard, torch.ones(4).double(), torch.ones(4).double(), steps=1, lr=0.1)
    # w' = .1, pulled to .1 / 2; g = -1.
    assert guard.path["w"].tolist() == pytest.approx([0.05] * 4)
    guard.before_step()
    guard.after_step([{"params": [model.w], "lr": 0.1}])
    assert guard.path["w"].tolist() == pytest.approx([0.05] * 4)


def test_l2_holds_all_alike_however_many_tasks():
    model = Bowl(torch.zeros(4))
    guard = L2(model, 2.0)
    for _ in range(2):
        guard.consolidate(guard.measure([[1, 2]]))
    assert guard.importance["w"].tolist() == [1.0] * 4 and guard.tasks == 2
    with torch.no_grad():
        model.w.add_(3.0)
    assert float(guard.penalty().detach()) == pytest.approx(36.0)
