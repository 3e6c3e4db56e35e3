"""The Triton kernels of the short convolution, in the interpreter, against the fp64 reference.

The interpreter runs programs in turn and knows neither bf16 nor races: tests/gpu has those.
"""

from __future__ import annotations

import pytest
import torch

from hybrid_sleep.kernels.short_conv import short_conv

pytest.importorskip("triton")

import triton
import triton.language as tl

from hybrid_sleep.kernels.common import triton_launch
from hybrid_sleep.kernels.common.triton_tiles import real_tokens
from hybrid_sleep.kernels.short_conv import triton as path
from hybrid_sleep.kernels.short_conv.triton_taps import (
    conv_tile,
    following_tokens,
    previous_tokens,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels")


def make(B: int, T: int, E: int, W: int, *without: str) -> dict[str, torch.Tensor]:
    inputs = {
        "x": torch.randn(B, T, E, dtype=torch.float64),
        "weight": torch.randn(E, W, dtype=torch.float64),
        "bias": torch.randn(E, dtype=torch.float64),
        "initial_state": torch.randn(B, W - 1, E, dtype=torch.float64),
    }
    return {name: x for name, x in inputs.items() if name not in without}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of `wanted` where that is above 1."""
    found, wanted = found.detach().double(), wanted.detach().double()
    if wanted.numel() == 0:
        return float(found.shape != wanted.shape)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def results(inputs, dtype=torch.float64, only=None, guard=None, **options):
    """y, the tail and the gradients by name, of one fixed random function of what `only` names."""
    leaves = {name: x.detach().to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    given = leaves if guard is None else {name: guard(x) for name, x in leaves.items()}
    y, tail = short_conv(**given, **options)
    found = {"y": y, "tail": tail}
    drawn = torch.Generator().manual_seed(1)
    grad_outputs = {
        n: torch.randn(x.shape, generator=drawn, dtype=torch.float64) for n, x in found.items()
    }
    names = [n for n in ("y", "tail") if only in (None, n) and found[n].requires_grad]
    torch.autograd.backward([found[n] for n in names], [grad_outputs[n].to(dtype) for n in names])
    grads = {f"d{name}": x.grad for name, x in given.items()}
    return found | {name: x for name, x in grads.items() if x is not None}


def compare(wanted, found, dtype=torch.float64):
    assert wanted.keys() == found.keys()
    assert {n: e for n in wanted if (e := error(found[n], wanted[n])) > TOLERANCE[dtype]} == {}


# B, T, E, W: blocks are 16 tokens and 16 channels here, spans of the backward pass 64 tokens.
SIZES = [(2, 1, 3, 4), (1, 2, 5, 6), (1, 17, 19, 4), (1, 33, 16, 2), (1, 70, 4, 3), (1, 5, 3, 8)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("without", [(), ("bias", "initial_state")], ids=["all", "bare"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(sizes, without, dtype):
    inputs = make(*sizes, *without)
    wanted = results(inputs, impl="reference")
    compare(wanted, results(inputs, dtype, impl="triton"), dtype)


@pytest.mark.parametrize("without", [("bias",), ("initial_state",)])
def test_without_an_activation(without):
    inputs = make(2, 19, 5, 4, *without)
    wanted = results(inputs, impl="reference", activation=None)
    compare(wanted, results(inputs, impl="triton", activation=None))


def test_a_filter_of_one_tap_has_an_empty_tail():
    inputs = make(2, 5, 3, 1)
    wanted, found = (results(inputs, only="y", impl=impl) for impl in ("reference", "triton"))
    assert found["tail"].shape == (2, 0, 3)
    wanted.pop("dinitial_state", None), found.pop("dinitial_state", None)
    compare(wanted, found)


MASKS = {
    "left": [".......xxxxxxxxxxxxx", "xxxxxxxxxxxxxxxxxxxx"],
    "anywhere": ["x..x.xx..x....xx.x..", ".x....x.xxxx..x....x"],
    "one token": ["...............x....", "x..................."],
    "a whole row": ["....................", ".xx................."],
    "a long gap": ["xx" + "." * 14 + "xx", "x" * 18],
}


@pytest.mark.parametrize("without", [(), ("initial_state",)], ids=["tail", "no tail"])
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_a_row_is_what_it_is_without_its_pads(guarded, rows, without):
    mask = torch.tensor([[token == "x" for token in row] for row in rows])
    inputs = make(*mask.shape, 3, 4, *without)
    wanted = results(inputs, impl="reference", mask=mask)
    inputs["x"][~mask] = float("nan")
    found = results(inputs, impl="triton", mask=mask, guard=guarded)
    guarded.check()
    compare(wanted, found)
    assert not found["y"][~mask].any()
    assert not found["dx"][~mask].any()


def test_nothing_comes_from_the_gradient_of_a_pad():
    mask = torch.rand(2, 20) > 0.5
    inputs = {name: x.requires_grad_() for name, x in make(2, 20, 3, 4).items()}
    y, _ = short_conv(**inputs, mask=mask, impl="triton")
    dy = torch.randn_like(y)
    dy[~mask] = float("nan")
    y.backward(dy)
    assert all(bool(x.grad.isfinite().all()) for x in inputs.values())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(2, 1, 17, 4), (1, 70, 5, 3), (1, 5, 3, 7)], ids=str)
def test_nothing_is_touched_outside_and_nothing_is_left_unwritten(guarded, sizes, dtype):
    inputs = make(*sizes)
    found = results(inputs, dtype, impl="triton", guard=guarded)
    guarded.check()
    compare(results(inputs, impl="reference"), found, dtype)


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("only", ["y", "tail"])
def test_a_gradient_from_one_result_alone(only, pads):
    mask = torch.rand(2, 18) > 0.4 if pads else None
    inputs = make(2, 18, 3, 4)
    wanted = results(inputs, only=only, mask=mask, impl="reference")
    found = results(inputs, only=only, mask=mask, impl="triton")
    for name in wanted.keys() - found.keys():
        assert not wanted.pop(name).any(), name
    compare(wanted, found)


@pytest.mark.parametrize("pads", [False, True])
def test_split_is_whole_to_the_last_bit(pads):
    mask = torch.rand(2, 40) > 0.4 if pads else torch.ones(2, 40, dtype=torch.bool)
    inputs = make(2, 40, 5, 4)
    x, state = inputs.pop("x"), inputs.pop("initial_state")
    y, tail = short_conv(x, **inputs, initial_state=state, mask=mask, impl="triton")
    parts = []
    for part in (slice(0, 1), slice(1, 3), slice(3, 19), slice(19, 40)):
        given = mask[:, part] if pads else None
        out, state = short_conv(
            x[:, part], **inputs, initial_state=state, mask=given, impl="triton"
        )
        parts.append(out)
    assert torch.equal(torch.cat(parts, 1), y)
    assert torch.equal(state, tail)


def test_a_slice_of_something_wider_is_read_in_place(guarded):
    inputs = make(2, 18, 5, 4)
    wanted = results(inputs, impl="reference")
    wide = torch.full((2, 18, 12), float("nan"), dtype=torch.float64)
    wide[..., 4:9] = inputs["x"]
    wide = guarded(wide.requires_grad_())
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    leaves["x"] = wide[..., 4:9]
    y, tail = short_conv(**leaves, impl="triton")
    drawn = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(x.shape, generator=drawn, dtype=torch.float64) for x in (y, tail)]
    torch.autograd.backward([y, tail], grad_outputs)
    guarded.check()
    assert error(y, wanted["y"]) < 1e-12
    assert error(wide.grad[..., 4:9], wanted["dx"]) < 1e-12
    with triton_launch.recording() as launches:
        short_conv(**leaves, impl="triton")
    assert launches[0].arguments["x"].data_ptr() == leaves["x"].data_ptr()


@pytest.mark.parametrize("T", [1, 40])
def test_forward_is_one_launch(T):
    with triton_launch.recording() as launches:
        short_conv(**make(2, T, 5, 4), impl="triton")
    assert [launch.kernel.name for launch in launches] == ["convolve"]


def test_other_layouts_are_understood():
    inputs = make(2, 9, 5, 4)
    wanted = short_conv(**inputs, impl="reference")
    turned = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in inputs.items()}
    assert max(map(error, short_conv(**turned, impl="triton"), wanted)) < 1e-12
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    grads = []
    for impl in ("reference", "triton"):
        y, tail = short_conv(**leaves, impl=impl)
        # The gradient of a sum is expanded: all its strides are 0.
        grads.append(torch.autograd.grad(y.sum() + tail.sum(), list(leaves.values())))
    assert max(map(error, grads[1], grads[0])) < 1e-12


def test_a_wider_state_and_filter_keep_their_dtypes():
    inputs = make(2, 9, 5, 4)
    narrow = {n: x.float() if n == "x" else x for n, x in inputs.items()}
    leaves = {n: x.clone().requires_grad_() for n, x in narrow.items()}
    y, tail = short_conv(**leaves, impl="triton")
    (y.sum() + tail.sum()).backward()
    assert (y.dtype, tail.dtype) == (torch.float32, torch.float32)
    wanted_y, wanted_tail = short_conv(**narrow, impl="reference")
    assert error(y, wanted_y) < 1e-6
    assert torch.equal(tail, wanted_tail)
    assert {n: x.grad.dtype for n, x in leaves.items()} == {n: x.dtype for n, x in narrow.items()}


def test_spans_are_long_only_where_programs_abound():
    assert path.span_length(8, 8192, 6144) == path.SPAN
    assert path.span_length(1, 2048, 3072) == path.SHORT_SPAN


def test_neighbours_among_real_tokens():
    mask = torch.rand(5, 23) > 0.5
    mask[3], mask[4] = False, True
    T = mask.shape[1]
    before, after = previous_tokens(mask), following_tokens(mask)
    assert (before.dtype, after.dtype) == (torch.int32, torch.int32)
    for row in range(len(mask)):
        real = [t for t in range(T) if mask[row, t]]
        for t in range(T):
            assert before[row, t] == max((s for s in real if s < t), default=-1)
        for t in range(-1, T):
            assert after[row, t + 1] == min((s for s in real if s > t), default=T)
    assert previous_tokens(mask[:, :1]).tolist() == [[-1]] * 5


@triton.jit
def convolve_heads(
    x, weight, tail, previous, mask, y, T, channels, x_b, x_t,
    W: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    HAS_TAIL: tl.constexpr, HAS_PADS: tl.constexpr,
):  # fmt: skip
    """One head of K channels a program, as a kernel does that convolves what it reads."""
    h, b = tl.program_id(1), tl.program_id(2)
    start = tl.program_id(0) * C
    i, d = tl.arange(0, C), tl.arange(0, BK)
    real = real_tokens(mask, b, start, i, T, HAS_PADS)
    sums = conv_tile(
        x, weight, None, tail, previous, b, start, i, h * K, d, T, channels, x_b, x_t, real,
        W, K, BK, False, HAS_TAIL, HAS_PADS, tl.float64,
    )  # fmt: skip
    place = y + (b * T + start) * channels + h * K
    there = (i < T - start)[:, None] & (d < K)[None, :]
    tl.store(place + i[:, None] * channels + d[None, :], sums, mask=there)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("pads", [True, False])
def test_another_kernel_convolves_the_heads_of_a_wider_projection(guarded, pads, tail):
    B, T, H, K, W = 2, 35, 2, 5, 4
    inputs = make(B, T, H * K, W, "bias", *(() if tail else ("initial_state",)))
    mask = torch.rand(B, T) > 0.4 if pads else None
    wanted, _ = short_conv(**inputs, mask=mask, activation=None, impl="reference")
    wide = torch.full((B, T, 17), float("nan"), dtype=torch.float64)
    wide[..., 3:13] = inputs["x"]
    if pads:
        wide[~mask] = float("nan")
    x = guarded(wide)[..., 3:13]
    y = guarded.allocate(x, (B, T, H * K), x.dtype)
    convolve_heads[(triton.cdiv(T, 16), H, B)](
        x, guarded(inputs["weight"]), guarded(inputs["initial_state"]) if tail else None,
        previous_tokens(mask) if pads else None, mask, y, T, H * K, x.stride(0), x.stride(1),
        W=W, K=K, BK=8, C=16, HAS_TAIL=tail, HAS_PADS=pads,
    )  # fmt: skip
    guarded.check()
    assert error(y, wanted) < 1e-12
