"""Gradients of gates that forget all: sums of what the decay is a factor of, in every path.

Taken as a difference of running sums, what a strong decay multiplies drowns in the rounding of what
it does not.
"""

from __future__ import annotations

import pytest
import torch
from strong_gates import GATES, differentiate, far, with_gates

from hybrid_sleep.kernels.common import chunks
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.ssd import ssd

PATHS = ["chunked"]
if not torch.cuda.is_available():
    PATHS.append("triton")


# The interpreter is slow, and one of these has every kind of gate in it.
CASES = [("chunked", gates, size) for gates in GATES for size in (16, 32)]
CASES += [(impl, gates, 16) for impl in PATHS[1:] for gates in ("-50 each", "mixed")]


@pytest.mark.parametrize("impl, gates, chunk_size", CASES)
def test_single_precision_is_the_reference_whatever_is_forgotten(op, make, impl, gates, chunk_size):
    if impl == "triton":
        pytest.importorskip("triton")
    inputs = with_gates(make(op, B=1, T=24, H=1, K=6, V=5), gates)
    wanted = differentiate(op, inputs, torch.float64, impl="reference")
    found = differentiate(op, inputs, torch.float32, impl=impl, chunk_size=chunk_size)
    assert far(found, wanted, 2e-6, 2e-5) == {}


@pytest.mark.parametrize("R", [1, 2])
def test_a_group_of_heads_has_a_gradient_for_each_gate(make, R):
    inputs = with_gates(make(ssd, B=2, T=24, H=4, K=6, V=5, G=4 // R), "mixed")
    for state in (True, False):
        if not state:
            del inputs["initial_state"]
        wanted = differentiate(ssd, inputs, torch.float64, impl="reference")
        found = differentiate(ssd, inputs, torch.float32, impl="chunked", chunk_size=7)
        assert far(found, wanted, 2e-6, 2e-5) == {}


def test_the_gradient_of_gates_is_the_sum_over_pairs_that_span_them():
    NT, BH, C = 3, 2, 5
    pairs, read, left, kept = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((NT, BH, C, C), (NT - 1, BH, C), (NT, BH, C), (NT - 1, BH))
    )
    found = chunks.gate_gradient(pairs, read, left, kept)
    for n in range(NT):
        for t in range(C):
            wanted = pairs[n, :, t:, :t].sum((1, 2)) + left[n, :, :t].sum(1)
            if n:
                wanted = wanted + read[n - 1, :, t:].sum(1) + kept[n - 1]
            torch.testing.assert_close(found[n, :, t], wanted, rtol=0, atol=1e-12)


def test_a_gate_of_nan_is_seen(op, make):
    inputs = make(op, B=1, T=24)
    inputs["g"][0, 9] = float("nan")
    for impl in ("reference", *PATHS):
        if impl == "triton":
            pytest.importorskip("triton")
        o, S = op(**inputs, impl=impl, chunk_size=16)
        assert S.isnan().any() and o[0, 9:].isnan().any(), impl


def test_a_gate_of_one_is_the_rule_without_gates(make):
    """S_t = S_{t-1} + beta k (v - S^T k)^T: the delta rule, written out."""
    inputs = make(gated_delta_rule, B=1, T=12, H=1)
    inputs["g"].zero_()
    S, outputs = inputs["initial_state"][0, 0], []
    for t in range(12):
        k = inputs["k"][0, t, 0]
        S = S + inputs["beta"][0, t, 0] * torch.outer(k, inputs["v"][0, t, 0] - S.T @ k)
        outputs.append(S.T @ inputs["q"][0, t, 0])
    for impl in ("reference", "chunked"):
        o, end = gated_delta_rule(**inputs, scale=1.0, impl=impl, chunk_size=5)
        torch.testing.assert_close(o[0, :, 0], torch.stack(outputs), rtol=0, atol=1e-12)
        torch.testing.assert_close(end[0, 0], S, rtol=0, atol=1e-12)
