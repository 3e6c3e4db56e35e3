"""What holds for the gated delta rule and for SSD, in each implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import halved
from torch.utils.checkpoint import checkpoint

from hybrid_sleep.kernels.common import chunks
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule

SEQUENCES = ("q", "k", "v", "g", "beta")


@pytest.fixture(params=["reference", "chunked"])
def impl(request) -> str:
    return request.param


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of `b` where that is above 1."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def differentiate(op, inputs, **options):
    """o, S, and the gradients by name of one fixed random function of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    results = op(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    torch.autograd.backward(results, [w.to(x.dtype) for w, x in zip(weights, results, strict=True)])
    return [x.detach() for x in results], {name: x.grad for name, x in leaves.items()}


def rows(inputs, index):
    return {name: x[index] for name, x in inputs.items()}


def tokens(inputs, part):
    """The inputs of some tokens, without the state."""
    return {name: x[:, part] for name, x in inputs.items() if name in SEQUENCES}


@settings(max_examples=40)
@given(
    B=st.sampled_from([1, 3, 20]),
    T=st.integers(1, 40),
    H=st.sampled_from([2, 4]),
    G=st.sampled_from([1, 2]),
    K=st.integers(1, 5),
    V=st.integers(1, 5),
    chunk_size=st.integers(1, 45),
    pads=st.booleans(),
    state=st.booleans(),
    seed=st.integers(0, 9),
)
def test_chunked_is_the_reference_for_any_chunk_length(
    op, make, B, T, H, G, K, V, chunk_size, pads, state, seed
):
    torch.manual_seed(seed)
    inputs = make(op, B, T, H, K, V, G)
    options = {"mask": torch.rand(B, T) > 0.3 if pads else None, "scale": 0.7}
    if not state:
        del inputs["initial_state"]
    wanted, grads_wanted = differentiate(op, inputs, impl="reference", **options)
    found, grads = differentiate(op, inputs, impl="chunked", chunk_size=chunk_size, **options)
    assert max(map(error, found, wanted)) < 1e-10
    assert max(error(grads[name], grads_wanted[name]) for name in inputs) < 1e-10


@pytest.mark.parametrize("chunk_size", [None, 1, 24, 25, 31, 48, 63, 64, 100])
def test_chunked_is_the_reference_over_many_and_long_chunks(op, make, chunk_size):
    inputs = make(op, B=17, T=100, H=2, K=6, V=5)
    wanted, grads_wanted = differentiate(op, inputs, impl="reference")
    found, grads = differentiate(op, inputs, impl="chunked", chunk_size=chunk_size)
    assert max(map(error, found, wanted)) < 1e-10
    assert max(error(grads[name], grads_wanted[name]) for name in inputs) < 1e-10


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("elements", [1, 2000, 5000])
def test_blocks_of_rows_make_the_batch(op, make, monkeypatch, elements, state):
    inputs = make(op, B=7, T=10, H=4, G=2)
    if not state:
        del inputs["initial_state"]
    options = {"mask": torch.rand(7, 10) > 0.2, "chunk_size": 4}
    wanted, grads_wanted = differentiate(op, inputs, **options)
    monkeypatch.setattr(chunks, "_WORKING_SET", elements)
    blocks = chunks.batch_blocks(7, 1000, torch.device("cpu"))
    assert len(blocks) == {1: 7, 2000: 4, 5000: 2}[elements]
    assert chunks.batch_blocks(7, 1000, torch.device("cuda")) == [slice(0, 7)]
    found, grads = differentiate(op, inputs, **options)
    assert max(map(error, found, wanted)) < 1e-12
    assert max(error(grads[name], grads_wanted[name]) for name in inputs) < 1e-12
    _, alone = op(**inputs, output=False, **options)
    assert torch.equal(alone, found[1])


@pytest.mark.parametrize("dim", [16, 48, 80])
def test_single_precision_stays_close_to_double(op, make, dim):
    exact = make(op, B=4, T=90, H=2, K=dim, V=dim)
    wanted, grads_wanted = differentiate(op, exact, impl="reference")
    single = {name: x.float() for name, x in exact.items()}
    found, grads = differentiate(op, single, impl="chunked")
    assert max(map(error, found, wanted)) < 1e-5
    assert max(error(grads[name], grads_wanted[name]) for name in exact) < 1e-5


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_gradients_are_those_of_finite_differences(op, make, impl, state, output):
    inputs = make(op, B=1, T=5, H=2, K=2, V=3)
    if op is gated_delta_rule:
        inputs["beta"][0, 2] = 0
    if not state:
        del inputs["initial_state"]
    names = [name for name in inputs if output or name != "q"]

    def function(*values):
        given = inputs | dict(zip(names, values, strict=True))
        o, S = op(**given, impl=impl, chunk_size=2, output=output)
        return (o, S) if output else S

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("only", ["o", "S"])
@pytest.mark.parametrize("chunk_size", [4, 7])
def test_a_gradient_from_one_result_alone(op, make, chunk_size, only):
    inputs = make(op)
    grads = {}
    for impl in ("reference", "chunked"):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o, S = op(**leaves, impl=impl, chunk_size=chunk_size)
        (o if only == "o" else S).square().sum().backward()
        grads[impl] = {name: x.grad for name, x in leaves.items()}
    for name, wanted in grads["reference"].items():
        found = grads["chunked"][name]
        if wanted is None or found is None:
            assert not any(x is not None and x.any() for x in (wanted, found)), name
        else:
            assert error(found, wanted) < 1e-10, name


def test_a_state_that_needs_no_gradient_changes_no_other_gradient(op, make):
    inputs = make(op, T=9)
    _, wanted = differentiate(op, inputs, chunk_size=4)
    state = inputs.pop("initial_state")
    _, found = differentiate(op, inputs, initial_state=state, chunk_size=4)
    assert max(error(found[name], wanted[name]) for name in inputs) < 1e-12


def test_checkpointing_recomputes_the_same_gradients(op, make, impl):
    inputs = make(op, dtype=torch.float32)
    names = list(inputs)

    def function(*values):
        return op(**dict(zip(names, values, strict=True)), impl=impl, chunk_size=3)

    grads = []
    for wrap in (False, True):
        leaves = [inputs[name].clone().requires_grad_() for name in names]
        once = checkpoint(function, *leaves, use_reentrant=False) if wrap else function(*leaves)
        twice = function(*leaves[:-1], once[1])
        (once[0].square().sum() + twice[1].square().sum()).backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_second_backward_gives_the_same_gradients(op, make):
    inputs = {name: x.requires_grad_() for name, x in make(op).items()}
    o, S = op(**inputs, impl="chunked", chunk_size=3)
    loss = o.square().sum() + S.square().sum()
    first, second = (
        torch.autograd.grad(loss, list(inputs.values()), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_two_halves_make_the_whole(op, make, impl, cut):
    inputs = make(op, T=9)
    o, S = op(**inputs, impl=impl, chunk_size=4)
    left, middle = op(
        **tokens(inputs, slice(0, cut)),
        initial_state=inputs["initial_state"],
        impl=impl,
        chunk_size=4,
    )
    right, end = op(**tokens(inputs, slice(cut, 9)), initial_state=middle, impl=impl, chunk_size=4)
    assert error(torch.cat([left, right], 1), o) < 1e-12
    assert error(end, S) < 1e-12


def test_token_by_token_makes_the_whole(op, make):
    inputs = make(op, T=9)
    o, S = op(**inputs)
    state, steps = inputs["initial_state"], []
    for t in range(9):
        step, state = op(**tokens(inputs, slice(t, t + 1)), initial_state=state)
        steps.append(step)
    assert error(torch.cat(steps, 1), o) < 1e-12
    assert error(state, S) < 1e-12


@pytest.mark.parametrize(
    ("garbage", "pattern"),
    halved(
        [1e3, float("nan"), float("inf")], ["..xxxxx", "xxxxx..", "x..x.xx.x.", ".x.x.x.x.x."]
    ),
)
def test_a_pad_changes_nothing(op, make, impl, pattern, garbage):
    real = torch.tensor([mark == "x" for mark in pattern])
    bare = make(op, T=int(real.sum()))
    padded = {"initial_state": bare["initial_state"]}
    for name in SEQUENCES:
        if name in bare:
            padded[name] = bare[name].new_full((2, len(real), *bare[name].shape[2:]), garbage)
            padded[name][:, real] = bare[name]
    (o, S), grads = differentiate(op, bare, impl=impl, chunk_size=3)
    leaves = {name: x.clone().requires_grad_() for name, x in padded.items()}
    o_padded, S_padded = op(**leaves, mask=real.expand(2, -1), impl=impl, chunk_size=3)
    assert error(o_padded[:, real], o) < 1e-12
    assert error(S_padded, S) < 1e-12
    assert not o_padded[:, ~real].any()

    generator = torch.Generator().manual_seed(1)
    weight = torch.full_like(o_padded, 7.0)
    weight[:, real] = torch.randn(o.shape, generator=generator, dtype=torch.float64)
    weight_S = torch.randn(S.shape, generator=generator, dtype=torch.float64)
    torch.autograd.backward([o_padded, S_padded], [weight, weight_S])
    assert error(leaves["initial_state"].grad, grads["initial_state"]) < 1e-12
    for name in set(SEQUENCES) & set(bare):
        assert error(leaves[name].grad[:, real], grads[name]) < 1e-12, name
        assert not leaves[name].grad[:, ~real].any(), name


def test_a_row_of_pads_keeps_its_state(op, make, impl):
    inputs = make(op)
    mask = torch.tensor([[False] * 7, [True] * 7])
    _, S = op(**inputs, mask=mask, impl=impl, chunk_size=3)
    assert torch.equal(S[0], inputs["initial_state"][0])
    assert not torch.equal(S[1], inputs["initial_state"][1])


def test_a_row_is_what_it_is_alone(op, make, impl):
    inputs = make(op, B=20, T=11)
    mask = torch.rand(20, 11) > 0.3
    o, S = op(**inputs, mask=mask, impl=impl, chunk_size=4)
    for row in (0, 7, 19):
        part = slice(row, row + 1)
        alone = op(**rows(inputs, part), mask=mask[part], impl=impl, chunk_size=4)
        assert error(alone[0], o[part]) < 1e-12
        assert error(alone[1], S[part]) < 1e-12


@pytest.mark.parametrize(("T", "state", "B"), halved([1, 7, 24, 75], [True, False], [1, 16]))
def test_the_state_alone_is_the_same_to_the_last_bit(op, make, impl, B, state, T):
    inputs = make(op, B=B, T=T, H=2, K=16, V=24, dtype=torch.float32)
    if not state:
        del inputs["initial_state"]
    mask = torch.rand(B, T) > 0.2
    for options in ({"chunk_size": 24}, {"chunk_size": 10, "mask": mask}):
        _, S = op(**inputs, impl=impl, **options)
        nothing, alone = op(**inputs, impl=impl, output=False, **options)
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        _, trained = op(**leaves, impl=impl, **options)
        assert nothing is None
        assert torch.equal(alone, S)
        assert torch.equal(trained, S)


@pytest.mark.parametrize("reset", [-50.0, -1e4])
def test_after_a_reset_small_decays_still_count(op, make, impl, reset):
    """A decay this strong leaves nothing to resolve in a float32 sum of the decays after it."""
    exact = make(op, T=24, K=8, V=8)
    exact["g"] = exact["g"] * 0.01
    exact["g"][:, ::5] = reset
    exact["g"][:, 7] = 0
    single = {name: x.float() for name, x in exact.items()}
    wanted, grads_wanted = differentiate(op, exact, impl="reference")
    found, grads = differentiate(op, single, impl=impl)
    assert max(map(error, found, wanted)) < 2e-6
    for name in exact:
        assert grads[name].isfinite().all(), name
        assert error(grads[name], grads_wanted[name]) < 2e-6, name


def test_a_forgotten_past_leaves_no_trace(op, make, impl):
    inputs = make(op, T=6)
    inputs["g"][:, 3] = -1e4
    _, S = op(**inputs, impl=impl, chunk_size=4)
    _, fresh = op(**tokens(inputs, slice(3, 6)), impl=impl, chunk_size=4)
    assert error(S, fresh) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_single(op, make, impl, dtype):
    inputs = make(op, T=40, K=16, V=16, dtype=dtype)
    exact = {name: x.double() for name, x in inputs.items()}
    (o_wanted, S_wanted), grads_wanted = differentiate(op, exact, impl="reference")
    (o, S), grads = differentiate(op, inputs, impl=impl)
    assert (o.dtype, S.dtype) == (dtype, torch.float32)
    assert error(S.double(), S_wanted) < 1e-5
    # One rounding to the inputs' type, at the very end.
    assert error(o.double(), o_wanted) <= torch.finfo(dtype).eps
    for name in inputs:
        assert grads[name].dtype == dtype
        assert error(grads[name].double(), grads_wanted[name]) <= 2 * torch.finfo(dtype).eps, name


def test_autocast_changes_nothing(op, make, impl):
    inputs = make(op, T=12, K=8, V=8, dtype=torch.float32)
    wanted, grads_wanted = differentiate(op, inputs, impl=impl)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = op(**leaves, impl=impl)
    assert all(map(torch.equal, found, wanted))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in found]
    # The reference is differentiated by torch, for which a backward under autocast is a mistake.
    with torch.autocast("cpu", torch.bfloat16, enabled=impl == "chunked"):
        torch.autograd.backward(found, [weight.float() for weight in weights])
    assert all(torch.equal(leaves[name].grad, grads_wanted[name]) for name in inputs)


def test_layout_in_memory_does_not_matter(op, make, impl):
    inputs = make(op, T=9)
    o, S = op(**inputs, impl=impl, chunk_size=4)
    turned = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    o_turned, S_turned = op(**turned, impl=impl, chunk_size=4)
    assert error(o_turned, o) < 1e-12
    assert error(S_turned, S) < 1e-12


@pytest.mark.parametrize("T", [1, 3, 9])
def test_neither_state_is_shared_with_what_happens_later(op, make, impl, T):
    inputs = make(op, T=T)
    before = {name: x.clone() for name, x in inputs.items()}
    o, S = op(**inputs, impl=impl, chunk_size=4)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert S.data_ptr() != inputs["initial_state"].data_ptr()
    # A kept state would otherwise keep the states of every chunk in memory.
    assert S.untyped_storage().nbytes() == S.numel() * S.element_size()


BAD = [
    ({"q": torch.zeros(2, 0, 2, 3)}, ValueError, r"q must .*no dimension of 0, got \(2, 0, 2, 3\)"),
    ({"q": torch.zeros(2, 7, 3)}, ValueError, r"q must .*\[B, T, [GH], K\] .*got \(2, 7, 3\)"),
    ({"q": [1.0]}, TypeError, "q must be a Tensor .*got list"),
    ({"k": torch.zeros(2, 7, 2, 4)}, ValueError, r"k must .*= \(2, 7, 2, 3\), got \(2, 7, 2, 4\)"),
    ({"v": torch.zeros(2, 6, 2, 4)}, ValueError, r"v must .*= \(2, 7, 2, 4\), got \(2, 6, 2, 4\)"),
    ({"v": torch.ones(2, 7, 2, 4, dtype=torch.long)}, TypeError, "v must have a dtype .*int64"),
    ({"g": torch.zeros(2, 7)}, ValueError, r"g must .*\[B, T, H\] = \(2, 7, 2\), got \(2, 7\)"),
    ({"initial_state": torch.zeros(2, 2, 4, 3)}, ValueError, "initial_state .*= .2, 2, 3, 4.*got"),
    ({"mask": torch.ones(2, 7)}, TypeError, "mask must be a bool Tensor .*torch.float32"),
    ({"mask": torch.ones(7, dtype=torch.bool)}, ValueError, r"mask must .*= \(2, 7\), got \(7,\)"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1, got 0"),
    ({"chunk_size": 2.5}, ValueError, "chunk_size must be an integer .*got 2.5"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_arguments_are_named(op, make, change, kind, message):
    inputs = make(op, G=2, dtype=torch.float32)
    with pytest.raises(kind, match=message):
        op(**inputs | change)
