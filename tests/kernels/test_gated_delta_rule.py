"""The gated delta rule against its definition by transition matrices, and what it can store."""

from __future__ import annotations

import pytest
import torch

from hybrid_sleep.kernels.gated_delta_rule import chunked, gated_delta_rule
from hybrid_sleep.kernels.gated_delta_rule.inverse import unit_lower_inverse


def by_transition_matrices(q, k, v, g, beta, initial_state, scale):
    """o_t = scale S_t^T q_t, every S_t written out from the start of the sequence:

    S_t = A_t ... A_1 S_0 + sum_j A_t ... A_{j+1} beta_j k_j v_j^T
    A_l = exp(g_l) (I - beta_l k_l k_l^T)
    """
    B, T, H, K = k.shape
    outputs, states = torch.zeros_like(v), torch.zeros_like(initial_state)
    for b in range(B):
        for h in range(H):
            erase = [beta[b, t, h] * torch.outer(k[b, t, h], k[b, t, h]) for t in range(T)]
            A = [g[b, t, h].exp() * (torch.eye(K, dtype=k.dtype) - erase[t]) for t in range(T)]
            for t in range(T):
                carried = torch.eye(K, dtype=k.dtype)
                S = torch.zeros_like(initial_state[b, h])
                for j in range(t, -1, -1):
                    S = S + carried @ (beta[b, j, h] * torch.outer(k[b, j, h], v[b, j, h]))
                    carried = carried @ A[j]
                S = S + carried @ initial_state[b, h]
                outputs[b, t, h] = scale * S.T @ q[b, t, h]
            states[b, h] = S
    return outputs, states


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_the_product_of_its_transition_matrices(make, impl, scale):
    inputs = make(gated_delta_rule, T=10, K=3, V=2)
    inputs["beta"] = inputs["beta"] * 2
    o, S = gated_delta_rule(**inputs, scale=scale, impl=impl, chunk_size=4)
    o_wanted, S_wanted = by_transition_matrices(**inputs, scale=scale or 3**-0.5)
    torch.testing.assert_close(o, o_wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(S, S_wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_orthonormal_keys_are_recalled_exactly(impl):
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q.view(1, 8, 1, 8)
    values = torch.randn(1, 8, 1, 5, dtype=torch.float64)
    still = torch.zeros(1, 8, 1, dtype=torch.float64)
    _, S = gated_delta_rule(keys, keys, values, still, still + 1, impl=impl, chunk_size=3)
    recalled, unchanged = gated_delta_rule(
        keys.flip(1), keys, values, still, still, initial_state=S, scale=1.0, impl=impl
    )
    torch.testing.assert_close(recalled, values.flip(1), rtol=0, atol=1e-12)
    assert torch.equal(unchanged, S)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_writing_a_key_again_replaces_its_value(impl):
    key = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1)
    keys = key.expand(1, 40, 1, 8)
    values = torch.randn(1, 40, 1, 5, dtype=torch.float64)
    still = torch.zeros(1, 40, 1, dtype=torch.float64)
    o, _ = gated_delta_rule(keys, keys, values, still, still + 1, scale=1.0, impl=impl)
    torch.testing.assert_close(o, values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_without_writing_the_state_only_decays(make, impl):
    inputs = make(gated_delta_rule, T=9)
    inputs["beta"] = torch.zeros_like(inputs["beta"])
    o, S = gated_delta_rule(**inputs, scale=1.0, impl=impl, chunk_size=4)
    left = inputs["g"].cumsum(1).exp()
    torch.testing.assert_close(S, inputs["initial_state"] * left[:, -1, :, None, None])
    read = torch.einsum("bhkv,bthk->bthv", inputs["initial_state"], inputs["q"])
    torch.testing.assert_close(o, read * left[..., None])


@pytest.mark.parametrize("C", [1, 2, 3, 24, 25, 31, 48, 65])
@pytest.mark.parametrize("count", [1, 40])
def test_the_inverse_of_a_unit_triangle(count, C):
    A = (torch.randn(count, C, C, dtype=torch.float64) / C).tril(-1)
    M = torch.linalg.inv(torch.eye(C, dtype=torch.float64) + A)
    minus_A = -A
    torch.testing.assert_close(unit_lower_inverse(minus_A), M, rtol=0, atol=1e-12)
    assert torch.equal(minus_A, -A)


@pytest.mark.parametrize("strength", [1.0, 2.0])
@pytest.mark.parametrize("C", [24, 64])
def test_equal_keys_cost_the_inverse_no_accuracy(C, strength):
    """A is `strength` everywhere below the diagonal: powers of A would cancel binomials."""
    A = torch.full((40, C, C), strength).tril(-1)
    M = torch.linalg.inv(torch.eye(C, dtype=torch.float64) + A[0].double())
    torch.testing.assert_close(unit_lower_inverse(-A)[7].double(), M, rtol=0, atol=1e-5)


@pytest.mark.parametrize("state", [True, False])
def test_reading_states_one_by_one_is_reading_them_at_once(make, monkeypatch, state):
    inputs = make(gated_delta_rule, B=3, T=20)
    if not state:
        del inputs["initial_state"]
    at_once = gated_delta_rule(**inputs, chunk_size=6)
    monkeypatch.setattr(chunked, "_MANY", 0)
    one_by_one = gated_delta_rule(**inputs, chunk_size=6)
    torch.testing.assert_close(one_by_one[0], at_once[0], rtol=0, atol=1e-12)
    assert torch.equal(one_by_one[1], at_once[1])
