"""The proximal step of a penalty on a product, in its factors: against autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from hybrid_sleep.parametric.experience import nearness
from hybrid_sleep.parametric.experience.nearness import pulled


def factors(rows=5, columns=7, rank=3, seed=0, stack=()):
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(*stack, rows, rank, generator=g, dtype=torch.float64)
    a = torch.randn(*stack, rank, columns, generator=g, dtype=torch.float64)
    importance = torch.rand(*stack, rows, columns, generator=g).square() * 3
    importance[..., 1, :] = 0
    importance[..., 4] = 0
    return b, a, importance


def penalty(b, a, importance, strength):
    """`strength / 2 * sum F (B A)^2`."""
    return 0.5 * strength * (importance.double() * (b @ a).square()).sum()


@pytest.mark.parametrize("pull", [1e-3, 1.0, 1e3, 1e6])
def test_each_step_is_where_its_gradient_is_zero(pull):
    b, a, importance = factors()
    new_b, new_a = pulled(b, a, importance, pull)
    at = new_b.clone().requires_grad_()
    (0.5 * (at - b).square().sum() + penalty(at, a, importance, pull)).backward()
    assert at.grad.abs().max() < 1e-9 * max(1.0, pull)
    at = new_a.clone().requires_grad_()
    (0.5 * (at - a).square().sum() + penalty(new_b, at, importance, pull)).backward()
    assert at.grad.abs().max() < 1e-9 * max(1.0, pull)
    assert penalty(new_b, new_a, importance, 1.0) < penalty(b, a, importance, 1.0)


def test_a_small_step_is_one_along_the_gradient_of_the_penalty_through_the_product():
    b, a, importance = (x.requires_grad_(x.dtype == torch.float64) for x in factors())
    penalty(b, a, importance, 2.0).backward()
    product = (b @ a).detach()
    # By the chain rule, from the gradient strength * F * (B A) in all of the weights.
    whole = 2.0 * importance.double() * product
    assert torch.allclose(b.grad, whole @ a.detach().T)
    assert torch.allclose(a.grad, b.detach().T @ whole)
    rate = 1e-7
    new_b, new_a = pulled(b.detach(), a.detach(), importance, 2.0 * rate)
    assert torch.allclose((b.detach() - new_b) / rate, b.grad, rtol=1e-5)
    assert torch.allclose((a.detach() - new_a) / rate, a.grad, rtol=1e-5)


def test_what_has_no_importance_keeps_its_bits():
    b, a, importance = factors()
    for strong in (1.0, 1e30):
        new_b, new_a = pulled(b, a, importance, strong)
        assert torch.equal(new_b[1], b[1]) and torch.equal(new_a[:, 4], a[:, 4])
        assert not torch.equal(new_b[0], b[0]) and bool(torch.isfinite(new_b).all())
    # No product, no penalty: what an expert is at first.
    same = pulled(torch.zeros_like(b), a, importance, 1e3)
    assert not same[0].any() and torch.equal(same[1], a)


@pytest.mark.parametrize("pull", [1e8, 1e20, 1e200])
def test_no_strength_diverges(pull):
    b, a, importance = factors(rank=6)
    moved = pulled(b, a, importance, pull)
    assert penalty(*moved, importance, 1.0) < 1e-9 * penalty(b, a, importance, 1.0)
    assert all(float(x.norm()) <= float(y.norm()) for x, y in zip(moved, (b, a), strict=True))
    half = pulled(b.float(), a.float(), importance, pull)
    assert all(x.dtype == torch.float32 and bool(torch.isfinite(x).all()) for x in half)


def test_blocks_and_stacks_are_the_same_steps(monkeypatch):
    b, a, importance = factors()
    whole = pulled(b, a, importance, 0.7)
    monkeypatch.setattr(nearness, "AT_ONCE", 20)
    for x, y in zip(pulled(b, a, importance, 0.7), whole, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-14)
    b, a, importance = factors(stack=(2, 2))
    found = pulled(b, a, importance, 0.7)
    for i in range(2):
        for j in range(2):
            alone = pulled(b[i, j], a[i, j], importance[i, j], 0.7)
            assert torch.equal(found[0][i, j], alone[0]) and torch.equal(found[1][i, j], alone[1])
