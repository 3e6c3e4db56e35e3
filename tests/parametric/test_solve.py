"""The dual solve against the primal one, least squares and dense matrices, all in fp64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hybrid_sleep.parametric.solve import NULL_THRESHOLD, Preconditioner, Spectrum, solve


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment_of(d: int, low: float = -3.0, seed: int = 9) -> torch.Tensor:
    """A second moment with eigenvalues from 10^low to 1."""
    basis = torch.linalg.qr(randn(d, d, seed=seed))[0]
    return basis @ torch.diag(torch.logspace(low, 0, d, dtype=torch.float64)) @ basis.T


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm())


def inverse_of(moment: torch.Tensor, weight: float, kind: str) -> torch.Tensor:
    """A^-1 as a matrix, from the equations and torch's inverse."""
    d = len(moment)
    mean = moment.trace() / d
    eye = torch.eye(d, dtype=torch.float64)
    if kind == "ridge":
        return torch.linalg.inv(weight * moment + 1e-6 * weight * mean * eye)
    if kind == "none":
        return eye / (weight * mean)
    values, vectors = torch.linalg.eigh(moment)
    small = vectors[:, values < NULL_THRESHOLD * mean]
    return small @ small.T / (weight * mean)


def primal(K, R, inverse, past):
    """`R K^T (A + G G^T)^-1`; with a singular A^-1 = P the same by `P (I + G G^T P)^-1`."""
    G = torch.cat((K, past), dim=1)
    eye = torch.eye(len(K), dtype=torch.float64)
    return R @ K.T @ inverse @ torch.linalg.inv(eye + G @ G.T @ inverse)


@pytest.mark.parametrize("kind", ["ridge", "null", "none"])
@pytest.mark.parametrize("p", [0, 7])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_dual_form_equals_the_primal_one(kind, p, grouped):
    d, o, n, weight = 40, 24, 10, 3.0
    moment, K, past = moment_of(d), randn(d, n, seed=1), randn(d, p, seed=2)
    groups = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1, 0, 3]) if grouped else None
    R = randn(o, 4 if grouped else n, seed=3)
    wanted_R = R[:, groups] if grouped else R
    done = solve(K, R, Preconditioner(Spectrum.of(moment), weight, kind), past, groups)
    wanted = primal(K, wanted_R, inverse_of(moment, weight, kind), past)
    D = done.left @ done.right
    assert relative(D, wanted) < 1e-9
    assert done.left.shape == (o, R.shape[1]) and done.right.shape == (R.shape[1], d)
    # What is told of it is what dense matrices say.
    scale = wanted_R.norm()
    assert done.error == pytest.approx(float((wanted @ K - wanted_R).norm() / scale), rel=1e-9)
    assert done.leak == pytest.approx(float((wanted @ past).norm() / scale), rel=1e-9)
    assert done.norm == pytest.approx(float(wanted.norm()), rel=1e-9)
    G = torch.cat((K, past), dim=1)
    S = torch.eye(n + p, dtype=torch.float64) + G.T @ inverse_of(moment, weight, kind) @ G
    assert done.condition == pytest.approx(float(torch.linalg.cond(S)), rel=1e-6)


def test_the_ridge_edit_minimises_what_the_docstring_says():
    d, o, n, p, weight = 12, 5, 4, 3, 0.7
    moment, K, past, R = moment_of(d), randn(d, n), randn(d, p, seed=1), randn(o, n, seed=2)
    A = weight * moment + 1e-6 * weight * moment.trace() / d * torch.eye(d)

    def objective(D):
        fit, keep = (D @ K - R).square().sum(), (D @ past).square().sum()
        return fit + keep + torch.trace(D @ A @ D.T)

    done = solve(K, R, Preconditioner(Spectrum.of(moment), weight), past)
    D = (done.left @ done.right).requires_grad_()
    gradient = torch.autograd.grad(objective(D), D)[0]
    assert gradient.norm() < 1e-9 * R.norm()
    for seed in range(5):
        assert objective(D + 1e-3 * randn(o, d, seed=10 + seed)) > objective(D)


def test_a_sketched_moment_is_inverted_as_the_matrix_it_stands_for():
    d, m, floor = 30, 6, 0.03
    vectors = torch.linalg.qr(randn(d, m))[0]
    values = torch.logspace(-1, 2, m, dtype=torch.float64)
    rest = torch.eye(d) - vectors @ vectors.T
    dense = vectors @ torch.diag(values) @ vectors.T + floor * rest
    K, R = randn(d, 5, seed=1), randn(8, 5, seed=2)
    spectrum = Spectrum(vectors, values, floor)
    assert spectrum.mean == pytest.approx(float(dense.trace()) / d)
    for kind in ("ridge", "null", "none"):
        done = solve(K, R, Preconditioner(spectrum, 2.0, kind))
        wanted = primal(K, R, inverse_of(dense, 2.0, kind), K[:, :0])
        assert relative(done.left @ done.right, wanted) < 1e-9, kind


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_one_after_the_other_is_the_same_as_at_once(batch):
    """Recursive least squares: with past keys kept and residuals of what the weights say now."""
    d, o, n = 60, 16, 100
    moment, K, V, W = moment_of(d), randn(d, n), randn(o, n, seed=1), randn(o, d, seed=2)
    inverse = Preconditioner(Spectrum.of(moment), 5.0)
    at_once = solve(K, V - W @ K, inverse)
    D = torch.zeros(o, d, dtype=torch.float64)
    for first in range(0, n, batch):
        now = slice(first, first + batch)
        done = solve(K[:, now], V[:, now] - (W + D) @ K[:, now], inverse, K[:, :first])
        D = D + done.left @ done.right
    assert relative(D, at_once.left @ at_once.right) < 1e-8


def test_without_past_keys_one_after_the_other_is_not_the_same():
    d, o, n = 60, 16, 40
    K, R = randn(d, n), randn(o, n, seed=1)
    inverse = Preconditioner(Spectrum.of(moment_of(d)), 5.0)
    D = torch.zeros(o, d, dtype=torch.float64)
    for i in range(n):
        done = solve(K[:, i : i + 1], R[:, i : i + 1] - D @ K[:, i : i + 1], inverse)
        D = D + done.left @ done.right
    at_once = solve(K, R, inverse)
    assert relative(D, at_once.left @ at_once.right) > 1e-2


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_keys_that_are_almost_the_same(weight):
    """What each key gets, against the same minimum by a singular value decomposition."""
    d, o, n = 384, 64, 128
    moment = moment_of(d, low=-6.0)
    root = torch.linalg.cholesky(moment)
    K = root @ randn(d, n // 2)
    K = torch.cat((K, K + 1e-4 * root @ randn(d, n // 2, seed=5)), dim=1)
    R = randn(o, n, seed=2)
    done = solve(K, R, Preconditioner(Spectrum.of(moment), weight))
    A = weight * moment + 1e-6 * weight * moment.trace() / d * torch.eye(d)
    # The same minimum as stacked least squares, which no normal equations square.
    rows = torch.cat((K.T, torch.linalg.cholesky(A).T))
    right = torch.cat((R.T, torch.zeros(d, o, dtype=torch.float64)))
    wanted = torch.linalg.lstsq(rows, right, driver="gelsd").solution.T
    assert relative(done.left @ (done.right @ K), wanted @ K) < 1e-8
    assert done.condition > 1e2


def test_the_null_space_leaves_what_is_protected():
    d, o = 48, 12
    protected = randn(d, 20)
    spectrum = Spectrum.of(protected @ protected.T / 20)
    K, R = randn(d, 6, seed=1), randn(o, 6, seed=2)
    done = solve(K, R, Preconditioner(spectrum, 0.1, "null"))
    D = done.left @ done.right
    assert relative(D @ K, R) < 0.9 and D.norm() > 0.1
    assert (D @ protected).norm() < 1e-6 * R.norm()
    ridge = solve(K, R, Preconditioner(spectrum, 1.0))
    assert (ridge.left @ ridge.right @ protected).norm() > 1e-6 * R.norm()


def test_a_key_that_only_protected_directions_have_gets_nothing_and_says_so():
    protected = randn(30, 4)
    spectrum = Spectrum.of(protected @ protected.T)
    done = solve(protected[:, :1], randn(5, 1), Preconditioner(spectrum, 1.0, "null"))
    assert done.error == pytest.approx(1.0)
    assert done.norm == pytest.approx(0.0, abs=1e-9)


def test_past_keys_are_kept_the_better_the_smaller_the_weight():
    K, past, R = randn(40, 5), randn(40, 10, seed=1), randn(8, 5, seed=2)
    spectrum = Spectrum.of(moment_of(40))
    done = [solve(K, R, Preconditioner(spectrum, w), past) for w in (1.0, 1e-4, 1e-8)]
    assert done[0].leak > done[1].leak > done[2].leak
    assert done[2].leak < 1e-4 and done[2].error < 1e-4


def test_bad_input_is_refused():
    inverse = Preconditioner(Spectrum.of(moment_of(10)), 1.0)
    K, R = randn(10, 3), randn(4, 3)
    bad = K.clone()
    bad[2, 1] = float("nan")
    for given, message in [
        ((bad, R), "keys must be finite"),
        ((K, R / 0), "residuals must be finite"),
        ((K, R, inverse, bad), "past must be finite"),
        ((K, R[:, :2]), "residuals must be one for each of 3 keys"),
        ((K, R, inverse, None, torch.tensor([0, 1, 3])), "groups of shape"),
        ((K, R, inverse, None, torch.tensor([0, -1, 1])), "groups of shape"),
        ((K, R, inverse, None, torch.tensor([0, 1])), "groups of shape"),
        ((randn(9, 3), R), "width of the statistics"),
        ((K, R, inverse, randn(9, 2)), "width of the statistics"),
        ((K[:, :0], R[:, :0]), "one or more"),
        ((K[:, 0], R), "keys must be a matrix"),
        ((K, R[0]), "residuals must be a matrix"),
    ]:
        given = (*given[:2], inverse, *given[3:])
        with pytest.raises(ValueError, match=message):
            solve(*given)
    spectrum = Spectrum.of(moment_of(10))
    for weight in (0, -1.0, float("nan"), True):
        with pytest.raises(ValueError, match="weight must be"):
            Preconditioner(spectrum, weight)
    with pytest.raises(ValueError, match="filter must be one of 'ridge', 'null', 'none'"):
        Preconditioner(spectrum, 1.0, "alpha")
    for moment in (torch.zeros(4, 4), torch.full((4, 4), float("inf"))):
        with pytest.raises((ValueError, RuntimeError)):
            Preconditioner(Spectrum.of(moment), 1.0)


LARGE = """
import resource, torch
from hybrid_sleep.parametric.solve import Preconditioner, Spectrum, solve

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

o, d, rows, facts = 8192, 28672, 512, 60
generator = torch.Generator().manual_seed(0)
# Orthonormal without a factorisation: no two columns have an entry in one row.
vectors = torch.zeros(d, rows, dtype=torch.float64)
vectors[torch.arange(d), torch.arange(d) % rows] = (rows / d) ** 0.5
keys = torch.randn(d, facts, generator=generator)
residuals = torch.randn(o, facts, generator=generator)
inverse = Preconditioner(Spectrum(vectors, torch.ones(rows, dtype=torch.float64), 0.1), 10.0)
before = peak()
done = solve(keys, residuals, inverse)
kept = [done.left.float(), done.right.float(), keys]
print(peak() - before, sum(x.numel() * x.element_size() for x in kept), done.error)
"""


def test_a_layer_of_a_70b_model_needs_no_dense_matrix():
    o, d, facts = 8192, 28672, 60
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    grown, kept, error = map(float, run.stdout.split())
    # A dense edit has 448 MiB in bf16, and a whole second moment 3 GiB in fp32.
    assert grown < 0.4 * o * d * 2
    assert kept == facts * (o + 2 * d) * 4
    assert error < 0.5
