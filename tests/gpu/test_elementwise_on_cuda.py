"""The short convolution and the gated norm by Triton on a CUDA device, against the fp64 reference.

An error may be twice that of PyTorch's path in the same dtype (and a floor for where that one is
lucky): the kernels round no more often than it does.
"""

from __future__ import annotations

import pytest
import torch

from hybrid_sleep.kernels.gated_norm import gated_norm
from hybrid_sleep.kernels.short_conv import short_conv

pytest.importorskip("triton")

from hybrid_sleep.kernels.common import triton_launch

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)
# What an error may be anyway: half a unit in the last place, relative to the largest value.
FLOOR = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-9}
# PyTorch's path of each op for many tokens.
PLAIN = {short_conv: "chunked", gated_norm: "reference"}
# What is an activation, in the dtype of the model; parameters and sums over tokens are float32.
NARROW = {"x", "initial_state", "o", "gate"}


def conv_inputs(B: int, T: int, E: int, W: int, *without: str) -> dict[str, torch.Tensor]:
    inputs = {
        "x": torch.randn(B, T, E),
        "weight": torch.randn(E, W),
        "bias": torch.randn(E),
        "initial_state": torch.randn(B, W - 1, E),
    }
    return {name: x for name, x in inputs.items() if name not in without}


def norm_inputs(*shape: int) -> dict[str, torch.Tensor]:
    return {
        "o": torch.randn(shape),
        "gate": torch.randn(shape),
        "weight": torch.randn(shape[-1]),
    }


def rounded(inputs, dtype):
    """The inputs as a device is given them: the question that the fp64 reference answers too."""
    return {n: x.to(dtype) if n in NARROW else x for n, x in inputs.items()}


def run(op, inputs, device, double=False, **options):
    """Results and gradients of `op` by name."""
    leaves = {}
    for name, x in inputs.items():
        dtype = torch.float64 if double else x.dtype
        leaves[name] = x.to(device, dtype, copy=True).requires_grad_()
    options = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    results = op(**leaves, **options)
    results = (results,) if isinstance(results, torch.Tensor) else results
    drawn = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(x.shape, generator=drawn).to(inputs_dtype(inputs)) for x in results]
    torch.autograd.backward(results, [s.to(x) for s, x in zip(grad_outputs, results, strict=True)])
    found = {f"result {at}": x.detach() for at, x in enumerate(results)}
    return found | {f"d{name}": x.grad for name, x in leaves.items()}


def inputs_dtype(inputs):
    return next(x.dtype for name, x in inputs.items() if name in NARROW)


def errors(found, wanted):
    scale = {n: x.abs().max().clamp(min=1e-12) for n, x in wanted.items()}
    return {
        n: float((found[n].cpu().double() - x).abs().max() / scale[n]) for n, x in wanted.items()
    }


def is_as_exact_as_pytorch(op, inputs, dtype, **options):
    inputs = rounded(inputs, dtype)
    wanted = run(op, inputs, "cpu", double=True, impl="reference", **options)
    plain = errors(run(op, inputs, "cuda", impl=PLAIN[op], **options), wanted)
    found = errors(run(op, inputs, "cuda", impl="triton", **options), wanted)
    limits = {n: 2 * e + FLOOR[dtype] for n, e in plain.items()}
    assert {n: (e, limits[n]) for n, e in found.items() if not e <= limits[n]} == {}


SIZES = [(2, 1, 96, 4), (1, 2, 40, 6), (3, 63, 100, 4), (2, 300, 257, 3), (1, 700, 64, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("without", [(), ("bias", "initial_state")], ids=["all", "bare"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_short_conv(sizes, without, dtype):
    is_as_exact_as_pytorch(short_conv, conv_inputs(*sizes, *without), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("pads", ["left", "anywhere", "a whole row"])
def test_short_conv_with_pads(pads, activation, dtype):
    B, T = 3, 130
    mask = torch.rand(B, T) > 0.4
    if pads == "left":
        mask = torch.arange(T) >= torch.tensor([[0], [57], [128]])
    elif pads == "a whole row":
        mask[1] = False
    inputs = conv_inputs(B, T, 72, 4)
    is_as_exact_as_pytorch(short_conv, inputs, dtype, mask=mask, activation=activation)
    given = {name: x.cuda().requires_grad_() for name, x in rounded(inputs, dtype).items()}
    clean = short_conv(**given, mask=mask.cuda(), activation=activation, impl="triton")
    dirty = given | {"x": given["x"].detach().masked_fill(~mask.cuda()[..., None], float("nan"))}
    for one, other in zip(
        clean,
        short_conv(**dirty, mask=mask.cuda(), activation=activation, impl="triton"),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_conv_of_many_tokens(dtype):
    """Enough of them that programs of the backward pass take long spans."""
    is_as_exact_as_pytorch(short_conv, conv_inputs(2, 2100, 2048, 4), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_conv_of_a_slice_and_by_the_token(dtype):
    inputs = {n: x.cuda() for n, x in rounded(conv_inputs(2, 20, 72, 4), dtype).items()}
    wide = torch.full((2, 20, 201), float("nan"), dtype=dtype, device="cuda")
    wide[..., 31:103] = inputs["x"]
    y, tail = short_conv(**inputs, impl="triton")
    y_slice, tail_slice = short_conv(**inputs | {"x": wide[..., 31:103]}, impl="triton")
    assert torch.equal(tail_slice, tail)
    state, outputs = inputs["initial_state"], []
    for t in range(20):
        step = inputs | {"x": wide[:, t : t + 1, 31:103], "initial_state": state}
        out, state = short_conv(**step, impl="triton")
        outputs.append(out)
    assert torch.equal(state, tail)
    for found in (y_slice, torch.cat(outputs, 1)):
        assert (found - y).abs().max() <= 2 * FLOOR[dtype] * y.abs().max()


SHAPES = [(1, 64), (2, 1, 16, 128), (3, 37, 5, 100), (2, 301, 8, 256), (70_000, 32)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_norm(shape, dtype):
    inputs = rounded(norm_inputs(*shape), dtype)
    inputs["weight"] = inputs["weight"].to(dtype)
    is_as_exact_as_pytorch(gated_norm, inputs, dtype, eps=1e-6)


CALLS = {
    "short_conv": (short_conv, conv_inputs(2, 700, 200, 4), {}),
    "short_conv with pads": (short_conv, conv_inputs(2, 700, 200, 4), {"mask": True}),
    "gated_norm": (gated_norm, norm_inputs(2, 700, 4, 96), {"eps": 1e-6}),
}


def filled(options):
    """The options with a mask in place of True."""
    return {n: torch.rand(2, 700) > 0.3 if n == "mask" else x for n, x in options.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "inputs", "options"), CALLS.values(), ids=CALLS)
def test_a_hundred_runs_agree_to_the_last_bit(op, inputs, options, dtype):
    options = filled(options)
    inputs = rounded(inputs, dtype)
    first = run(op, inputs, "cuda", impl="triton", **options)
    for _ in range(100):
        again = run(op, inputs, "cuda", impl="triton", **options)
        assert [n for n, x in first.items() if not torch.equal(x, again[n])] == []


@pytest.mark.parametrize("choice", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "inputs", "options"), CALLS.values(), ids=CALLS)
def test_every_configuration_gives_the_same(op, inputs, options, dtype, choice, monkeypatch):
    options = filled(options)
    inputs = rounded(inputs, dtype)
    wanted = run(op, inputs, "cuda", impl="triton", **options)

    def launch(kernel, grid, **arguments):
        allowed = kernel.allowed(arguments)
        config = allowed[min(choice, len(allowed) - 1)]
        kernel.function[grid](**arguments, **config.all_kwargs())

    monkeypatch.setattr(triton_launch.Kernel, "launch", launch)
    found = run(op, inputs, "cuda", impl="triton", **options)
    wanted = {name: x.cpu().double() for name, x in wanted.items()}
    assert {n: e for n, e in errors(found, wanted).items() if not e <= 4 * FLOOR[dtype]} == {}
