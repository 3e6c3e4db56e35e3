"""The Triton kernels of the short convolution, in the interpreter, against the fp64 reference.

The interpreter runs one program after another and knows no bf16 and no races: tests/gpu has those.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from agreement import TOLERANCE, compare, error
from agreement import results as results_of
from marks import slow

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

SINGLE, DOUBLE = TOLERANCE

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels")


def make(B: int, T: int, E: int, W: int, *without: str) -> dict[str, torch.Tensor]:
    inputs = {
        "x": torch.randn(B, T, E, dtype=torch.float64),
        "weight": torch.randn(E, W, dtype=torch.float64),
        "bias": torch.randn(E, dtype=torch.float64),
        "initial_state": torch.randn(B, W - 1, E, dtype=torch.float64),
    }
    return {name: x for name, x in inputs.items() if name not in without}


results = partial(results_of, short_conv, names=("y", "tail"))


# B, T, E, W: blocks are 16 tokens and 16 channels here, spans of the backward pass 64 tokens.
SIZES = [(2, 1, 17, 4), (1, 2, 5, 6), (1, 17, 19, 4), (1, 33, 16, 2), (1, 70, 5, 3), (1, 5, 3, 8)]


ALL, BARE = (), ("bias", "initial_state")


FAST = [(sizes, *((ALL, SINGLE), (BARE, DOUBLE))[i % 2]) for i, sizes in enumerate(SIZES)]
REST = [one for one in product(SIZES, (ALL, BARE), TOLERANCE) if one not in FAST]


@pytest.mark.parametrize(
    ("sizes", "without", "dtype"), FAST + [slow(*one) for one in REST], ids=str
)
def test_values_and_gradients(guarded, sizes, without, dtype):
    inputs = make(*sizes, *without)
    wanted = results(inputs, impl="reference")
    found = results(inputs, dtype=dtype, impl="triton", guard=guarded)
    guarded.check()
    compare(wanted, found, dtype)


@pytest.mark.parametrize("without", [("bias",), ("initial_state",)])
def test_without_an_activation(without):
    inputs = make(2, 19, 5, 4, *without)
    wanted = results(inputs, impl="reference", activation=None)
    compare(wanted, results(inputs, impl="triton", activation=None))


def test_a_filter_of_one_tap_has_an_empty_tail():
    inputs = make(2, 5, 3, 1)
    wanted, found = (results(inputs, only="y", impl=impl) for impl in ("reference", "triton"))
    assert found["tail"].shape == (2, 0, 3)
    compare(wanted, found, absent_is_zero=True)


MASKS = {
    "left": [".......xxxxxxxxxxxxx", "xxxxxxxxxxxxxxxxxxxx"],
    "anywhere": ["x..x.xx..x....xx.x..", ".x....x.xxxx..x....x"],
    "one token": ["...............x....", "x..................."],
    "a whole row": ["....................", ".xx................."],
    "a long gap": ["xx" + "." * 14 + "xx", "x" * 18],
}


@pytest.mark.parametrize("without", [(), slow(("initial_state",))], ids=["tail", "no tail"])
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


@pytest.mark.parametrize(
    ("only", "pads"), [("y", True), ("tail", True), slow("y", False), slow("tail", False)]
)
def test_a_gradient_from_one_result_alone(only, pads):
    mask = torch.rand(2, 18) > 0.4 if pads else None
    inputs = make(2, 18, 3, 4)
    wanted = results(inputs, only=only, mask=mask, impl="reference")
    found = results(inputs, only=only, mask=mask, impl="triton")
    compare(wanted, found, absent_is_zero=True)


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


def test_a_slice_of_a_larger_tensor_is_read_in_place(guarded):
    inputs = make(2, 18, 5, 4)
    wanted = results(inputs, impl="reference")
    larger = torch.full((2, 18, 12), float("nan"), dtype=torch.float64)
    larger[..., 4:9] = inputs["x"]
    larger = guarded(larger.requires_grad_())
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    leaves["x"] = larger[..., 4:9]
    y, tail = short_conv(**leaves, impl="triton")
    drawn = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(x.shape, generator=drawn, dtype=torch.float64) for x in (y, tail)]
    torch.autograd.backward([y, tail], grad_outputs)
    guarded.check()
    assert error(y, wanted["y"]) < 1e-12
    assert error(larger.grad[..., 4:9], wanted["dx"]) < 1e-12
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


def test_a_state_and_filter_of_another_dtype_keep_theirs():
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


@pytest.mark.parametrize(
    ("pads", "tail"), [(True, True), (False, False), slow(True, False), slow(False, True)]
)
def test_another_kernel_convolves_the_heads_of_a_larger_projection(guarded, pads, tail):
    B, T, H, K, W = 2, 35, 2, 5, 4
    inputs = make(B, T, H * K, W, "bias", *(() if tail else ("initial_state",)))
    mask = torch.rand(B, T) > 0.4 if pads else None
    wanted, _ = short_conv(**inputs, mask=mask, activation=None, impl="reference")
    larger = torch.full((B, T, 17), float("nan"), dtype=torch.float64)
    larger[..., 3:13] = inputs["x"]
    if pads:
        larger[~mask] = float("nan")
    x = guarded(larger)[..., 3:13]
    y = guarded.allocate(x, (B, T, H * K), x.dtype)
    convolve_heads[(triton.cdiv(T, 16), H, B)](
        x, guarded(inputs["weight"]), guarded(inputs["initial_state"]) if tail else None,
        previous_tokens(mask) if pads else None, mask, y, T, H * K, x.stride(0), x.stride(1),
        W=W, K=K, BK=8, C=16, HAS_TAIL=tail, HAS_PADS=pads,
    )  # fmt: skip
    guarded.check()
    assert error(y, wanted) < 1e-12
