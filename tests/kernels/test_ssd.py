"""SSD against its definition as one masked attention matrix."""

from __future__ import annotations

import pytest
import torch

from hybrid_sleep.kernels.ssd import ssd


def as_attention(q, k, v, g, initial_state, scale):
    """O = scale ((L * Q K^T) V + exp(sum of g) Q S_0), with L_ij = exp(g_{j+1} + ... + g_i)."""
    B, T, H, V = v.shape
    repeat = H // q.shape[2]
    outputs, states = torch.zeros_like(v), torch.zeros_like(initial_state)
    for b in range(B):
        for h in range(H):
            Q, K = q[b, :, h // repeat], k[b, :, h // repeat]
            L = torch.zeros(T, T, dtype=v.dtype)
            for i in range(T):
                for j in range(i + 1):
                    L[i, j] = g[b, j + 1 : i + 1, h].sum().exp()
            carried = torch.stack([g[b, : i + 1, h].sum().exp() for i in range(T)])
            scores = L * (Q @ K.T)
            read = carried[:, None] * (Q @ initial_state[b, h])
            outputs[b, :, h] = scale * (scores @ v[b, :, h] + read)
            states[b, h] = carried[-1] * initial_state[b, h] + K.T @ (L[-1, :, None] * v[b, :, h])
    return outputs, states


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, None])
def test_it_is_a_masked_attention_matrix(make, impl, G, chunk_size):
    inputs = make(ssd, T=11, H=4, G=G, K=3, V=2)
    o, S = ssd(**inputs, scale=0.8, impl=impl, chunk_size=chunk_size)
    o_wanted, S_wanted = as_attention(**inputs, scale=0.8)
    torch.testing.assert_close(o, o_wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(S, S_wanted, rtol=0, atol=1e-12)


def test_groups_must_divide_the_heads(make):
    inputs = make(ssd, H=4, G=3)
    with pytest.raises(ValueError, match="groups of q must divide the 4 heads of v, got 3"):
        ssd(**inputs)
