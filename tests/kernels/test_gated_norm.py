"""The gated norm: against its equation, and its Triton kernels in the interpreter."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, compare, error
from agreement import results as results_of
from marks import halved

from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.kernels.gated_norm import gated_norm

if find_spec("triton") is not None:
    # Before `guarded` looks for modules that allocate.
    from hybrid_sleep.kernels.common import triton_launch
    from hybrid_sleep.kernels.gated_norm import triton as path

EPS = 1e-6

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or find_spec("triton") is None,
    reason="needs Triton, and no GPU: tests/gpu runs the kernels there",
)


def make(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {
        "o": torch.randn(shape, dtype=dtype),
        "gate": torch.randn(shape, dtype=dtype),
        "weight": torch.randn(shape[-1], dtype=dtype),
    }


results = partial(results_of, gated_norm, names=("y",), eps=EPS)


def test_the_reference_is_its_equation():
    inputs = make(2, 3, 4, 5)
    o, gate, weight = inputs.values()
    wanted = o / (o.square().mean(-1, keepdim=True) + EPS).sqrt() * weight * gate * gate.sigmoid()
    found = gated_norm(**inputs, eps=EPS, impl="reference")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_cpu_it_is_torch_to_the_last_bit(dtype):
    inputs = make(2, 3, 4, 5, dtype=dtype)
    norm = torch.nn.RMSNorm(5, eps=EPS, dtype=dtype)
    norm.weight = torch.nn.Parameter(inputs["weight"])
    found = gated_norm(**inputs, eps=EPS)
    assert torch.equal(found, norm(inputs["o"]) * F.silu(inputs["gate"]))
    assert dispatch.explain("gated_norm")["implementation"] == "reference"


# Blocks are 4 rows here, and each program of the backward pass takes 16.
SHAPES = [(1, 5), (3, 20), (2, 3, 33), (2, 5, 3, 18), (1, 37, 2, 16), (1, 1, 4, 100)]


@interpreted
@pytest.mark.parametrize(("shape", "dtype"), halved(SHAPES, TOLERANCE), ids=str)
def test_the_kernels_match_the_reference(guarded, shape, dtype):
    inputs = make(*shape)
    wanted = results(inputs, impl="reference")
    found = results(inputs, dtype=dtype, guard=guarded, impl="triton")
    guarded.check()
    compare(wanted, found, dtype)
    assert all(x.dtype == dtype for x in found.values())


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_the_kernels_at_the_edges_of_the_range(guarded, scale):
    inputs = make(3, 2, 12)
    inputs["o"] *= scale
    inputs["gate"] *= 100
    wanted = results(inputs, impl="reference")
    found = results(inputs, dtype=torch.float32, guard=guarded, impl="triton")
    for name, x in wanted.items():
        assert error(found[name], x) < 1e-5, name


@interpreted
def test_the_kernels_read_slices_of_a_larger_tensor_in_place(guarded):
    inputs = make(2, 5, 3, 7)
    wanted = results(inputs, impl="reference")
    larger = torch.full((2, 5, 50), float("nan"), dtype=torch.float64)
    larger[..., 4:25] = inputs["gate"].flatten(-2)
    larger = guarded(larger.requires_grad_())
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    leaves["gate"] = larger[..., 4:25].unflatten(-1, (3, 7))
    y = gated_norm(**leaves, eps=EPS, impl="triton")
    drawn = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=drawn, dtype=torch.float64))
    guarded.check()
    assert error(y, wanted["y"]) < 1e-12
    assert error(larger.grad[..., 4:25], wanted["dgate"].flatten(-2)) < 1e-12
    assert error(leaves["weight"].grad, wanted["dweight"]) < 1e-12
    with triton_launch.recording() as launches:
        gated_norm(**leaves, eps=EPS, impl="triton")
    assert [launch.kernel.name for launch in launches] == ["norm"]
    assert launches[0].arguments["gate"].data_ptr() == leaves["gate"].data_ptr()


@interpreted
def test_the_kernels_take_other_layouts():
    inputs = make(2, 5, 3, 6)
    wanted = gated_norm(**inputs, eps=EPS, impl="reference")
    turned = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in inputs.items()}
    assert error(gated_norm(**turned, eps=EPS, impl="triton"), wanted) < 1e-12
    grads = []
    for impl in ("reference", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        # The gradient of a sum is expanded: all its strides are 0.
        total = gated_norm(*leaves, EPS, impl=impl).sum()
        grads.append(torch.autograd.grad(total, leaves))
    assert max(map(error, grads[1], grads[0])) < 1e-12


@interpreted
def test_many_rows_share_a_bounded_number_of_sums(monkeypatch):
    monkeypatch.setattr(path, "PROGRAMS", 2)
    inputs = make(70, 3)
    wanted, found = (results(inputs, impl=impl) for impl in ("reference", "triton"))
    assert max(error(found[n], wanted[n]) for n in wanted) < 1e-12


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_weights_of_another_dtype_do_not_change_that_of_the_result():
    inputs = make(2, 4, dtype=torch.float32)
    inputs["o"] = inputs["o"].bfloat16()
    assert gated_norm(**inputs, eps=EPS).dtype == torch.bfloat16


BAD = [
    ({"weight": torch.zeros(2, 4)}, ValueError, r"weight must have the shape \[V\] .*got \(2, 4\)"),
    ({"o": torch.zeros(2, 3)}, ValueError, r"o must .*\[\.\.\., V\] = \(2, 4\), got \(2, 3\)"),
    ({"gate": torch.zeros(3, 4)}, ValueError, r"gate must have .* = \(2, 4\), got \(3, 4\)"),
    ({"gate": torch.zeros(2, 4).long()}, TypeError, "gate must have a dtype .*got torch.int64"),
    ({"o": torch.zeros(0, 4)}, ValueError, r"o must have .* with no dimension of 0, got \(0, 4\)"),
    ({"o": None}, TypeError, "o must be a Tensor .*got NoneType"),
    ({"eps": 0.0}, ValueError, r"eps must be a finite number above 0, got 0\.0"),
    ({"impl": "chunked"}, ValueError, "impl of gated_norm must be one of 'auto', .*got 'chunked'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_arguments_are_named(change, kind, message):
    with pytest.raises(kind, match=message):
        gated_norm(**{**make(2, 4), "eps": EPS, **change})
