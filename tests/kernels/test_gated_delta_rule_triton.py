"""The Triton kernels of the gated delta rule, in Triton's interpreter, against the fp64 reference.

The interpreter runs programs in turn and knows neither bf16 nor races: tests/gpu has those.
"""

from __future__ import annotations

import pytest
import torch
from marks import slow

from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule

pytest.importorskip("triton")

from hybrid_sleep.kernels.common.triton_sizes import Sizes
from hybrid_sleep.kernels.gated_delta_rule import triton as path

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = [torch.float32, slow(torch.float64)]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of `wanted` where that is above 1."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def results(inputs, dtype=torch.float64, only=None, guard=None, **options):
    """o, S and the gradients by name, of one fixed random function of what `only` names."""
    leaves = {name: x.clone().to(dtype).requires_grad_() for name, x in inputs.items()}
    given = leaves if guard is None else {name: guard(x) for name, x in leaves.items()}
    o, S = gated_delta_rule(**given, **options)
    found = {"o": o, "S": S}
    drawn = torch.Generator().manual_seed(1)
    random = {"generator": drawn, "dtype": torch.float64}
    grad_outputs = {name: torch.randn(x.shape, **random) for name, x in found.items()}
    names = ("o", "S") if only is None else (only,)
    torch.autograd.backward([found[n] for n in names], [grad_outputs[n].to(dtype) for n in names])
    grads = {f"d{name}": x.grad for name, x in given.items()}
    return found | {name: x for name, x in grads.items() if x is not None}


def compare(wanted, found, dtype):
    assert wanted.keys() == found.keys()
    assert {n: e for n in wanted if (e := error(found[n], wanted[n])) > TOLERANCE[dtype]} == {}


CASES = {
    "one chunk": dict(T=9, K=5, V=3),
    "one long chunk, large heads": dict(T=64, K=40, V=20, chunk_size=64),
    "two chunks, odd": dict(T=77, K=16, V=33, chunk_size=64),
    "three chunks": dict(T=129, K=24, V=16, B=1, chunk_size=100),
    "as many chunks as it likes": dict(T=49, K=16, V=16),
    "segments": dict(T=140, K=8, V=8, B=1, H=1, chunk_size=16),
    "four short chunks": dict(T=55, K=17, V=18, chunk_size=16),
    "chunks of 32": dict(T=70, K=12, V=7, chunk_size=40),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(make, case, state, dtype):
    sizes = {name: n for name, n in case.items() if name != "chunk_size"}
    inputs = make(gated_delta_rule, **{"B": 2, "H": 2} | sizes)
    if not state:
        del inputs["initial_state"]
    options = {"scale": 0.7}
    wanted = results(inputs, impl="reference", **options)
    options["chunk_size"] = case.get("chunk_size")
    compare(wanted, results(inputs, dtype, impl="triton", **options), dtype)


@pytest.mark.parametrize("pads", ["anywhere", slow("left"), slow("a whole row")])
def test_pads_write_nothing_and_leak_nothing(make, guarded, pads):
    B, T = 3, 70
    inputs = make(gated_delta_rule, B, T, 1, 20, 18)
    mask = torch.rand(B, T) > 0.3
    if pads == "left":
        mask = torch.arange(T) >= torch.tensor([[0], [13], [66]])
    elif pads == "a whole row":
        mask[1] = False
    wanted = results(inputs, impl="reference", mask=mask)
    for name, x in inputs.items():
        if name != "initial_state":
            inputs[name] = torch.where(mask[(...,) + (None,) * (x.ndim - 2)], x, float("nan"))
    found = results(inputs, impl="triton", mask=mask, guard=guarded)
    guarded.check()
    compare(wanted, found, torch.float64)
    assert torch.equal(found["dg"] != 0, mask[..., None]) or pads == "a whole row"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segments", [1, 2, 3, 5])
def test_nothing_is_read_or_written_outside_and_nothing_is_left_unwritten(
    make, guarded, segments, dtype
):
    inputs = make(gated_delta_rule, 2, 75, 2, 18, 21, dtype=dtype)
    given = [guarded(inputs[name]) for name in ("q", "k", "v", "g", "beta", "initial_state")]
    o, S = path.gated_delta_rule(*given, None, 1.0, 16, True, segments)
    guarded.check()
    wanted = gated_delta_rule(**{n: x.double() for n, x in inputs.items()}, scale=1.0)
    assert max(map(error, (o, S), wanted)) < TOLERANCE[dtype]


@pytest.mark.parametrize("segments", [1, 2, 4])
@pytest.mark.parametrize("state", [True, False])
def test_the_state_does_not_depend_on_whether_outputs_are_read(make, segments, state):
    inputs = make(gated_delta_rule, 1, 90, 2, 16, 20)
    given = [inputs[name].float() for name in ("q", "k", "v", "g", "beta", "initial_state")]
    if not state:
        given[-1] = None
    _, S = path.gated_delta_rule(*given, None, 1.0, 16, True, segments)
    nothing, alone = path.gated_delta_rule(*given, None, 1.0, 16, False, segments)
    assert nothing is None
    assert torch.equal(S, alone)


@pytest.mark.parametrize("only", ["o", "S"])
def test_a_gradient_from_one_result_alone(make, only):
    inputs = make(gated_delta_rule, 1, 40, 2, 9, 10)
    wanted = results(inputs, impl="reference", only=only)
    found = results(inputs, impl="triton", only=only, chunk_size=16)
    for name in found.keys() - wanted.keys():
        assert not found.pop(name).any(), name
    if only == "S":
        assert "dq" not in found or not found["dq"].any()
        found.pop("dq", None), wanted.pop("dq", None)
    compare(wanted, found, torch.float64)


def test_without_outputs_the_state_has_its_gradients(make):
    inputs = make(gated_delta_rule, 2, 50, 1, 8, 9)
    grads = {}
    for impl in ("reference", "triton"):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        _, S = gated_delta_rule(**leaves, output=False, impl=impl, chunk_size=16)
        S.square().sum().backward()
        grads[impl] = {n: x.grad for n, x in leaves.items() if n != "q" and x.grad is not None}
    compare(grads["reference"], grads["triton"], torch.float64)


def test_split_is_whole(make):
    inputs = make(gated_delta_rule, 2, 100, 1, 12, 8)
    o, S = gated_delta_rule(**inputs, impl="triton")
    state, parts = inputs["initial_state"], []
    for part in (slice(0, 33), slice(33, 34), slice(34, 100)):
        tokens = {n: x[:, part] for n, x in inputs.items() if n != "initial_state"}
        out, state = gated_delta_rule(**tokens, initial_state=state, impl="triton")
        parts.append(out)
    assert error(torch.cat(parts, 1), o) < 1e-12
    assert error(state, S) < 1e-12


def test_views_with_any_strides_are_read_as_they_are(make):
    inputs = make(gated_delta_rule, 2, 20, 2, 6, 5)
    wanted = gated_delta_rule(**inputs, impl="reference")
    wide = {n: torch.cat([x, x], -1)[..., : x.shape[-1]] for n, x in inputs.items()}
    last_first = {n: x.mT.contiguous().mT for n, x in inputs.items()}
    for views in (wide, last_first):
        assert max(map(error, gated_delta_rule(**views, impl="triton"), wanted)) < 1e-12
    mask = torch.rand(20, 2).T > 0.3
    assert not mask.is_contiguous()
    wanted = gated_delta_rule(**inputs, mask=mask, impl="reference")
    found = gated_delta_rule(**inputs, mask=mask, impl="triton")
    assert max(map(error, found, wanted)) < 1e-12


def test_a_reset_keeps_the_small_decays_that_follow_it(make):
    inputs = make(gated_delta_rule, 1, 60, 1, 8, 8)
    inputs["g"][:, ::17] = -1e4
    wanted = gated_delta_rule(**inputs, impl="reference")
    single = {name: x.float() for name, x in inputs.items()}
    assert max(map(error, gated_delta_rule(**single, impl="triton"), wanted)) < 2e-5


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_keys_that_are_all_alike_do_not_amplify_rounding(make, beta):
    inputs = make(gated_delta_rule, 1, 64, 1, 16, 16)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["g"] = torch.zeros_like(inputs["g"])
    inputs["beta"] = torch.full_like(inputs["beta"], beta)
    wanted = gated_delta_rule(**inputs, impl="reference")
    single = {name: x.float() for name, x in inputs.items()}
    assert max(map(error, gated_delta_rule(**single, impl="triton"), wanted)) < 1e-5


def test_segments_fill_a_gpu_only_where_heads_do_not():
    def segments(B, T, H, V=128):
        return path.segment_count(Sizes(B, T, H, 1, 128, V, 64, 1))

    assert segments(8, 8192, 16) == 1
    assert segments(1, 2048, 8) == 2
    assert segments(1, 2048, 2) == 8
    assert segments(1, 100, 1) == 1
