"""The short convolution against torch's, and its tail as a state."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_sleep.kernels.short_conv import short_conv

B, E, W = 3, 5, 4


@pytest.fixture(params=["reference", "chunked"])
def impl(request) -> str:
    return request.param


def make(T: int, width: int = W, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(B, T, E, dtype=dtype),
        "weight": torch.randn(E, width, dtype=dtype),
        "bias": torch.randn(E, dtype=dtype),
        "initial_state": torch.randn(B, width - 1, E, dtype=dtype),
    }


def by_conv1d(x, weight, bias=None, initial_state=None, activation="silu"):
    width = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    past = torch.cat([initial_state, x], 1)
    y = F.conv1d(past.mT, weight[:, None], bias, groups=weight.shape[0]).mT
    return F.silu(y) if activation else y, past[:, past.shape[1] - width + 1 :]


@pytest.mark.parametrize("T", [1, 2, 3, 9])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("drop", [(), ("bias",), ("initial_state",), ("bias", "initial_state")])
def test_it_is_a_depthwise_convolution(impl, T, width, activation, drop):
    inputs = {name: x for name, x in make(T, width).items() if name not in drop}
    y, tail = short_conv(**inputs, activation=activation, impl=impl)
    y_wanted, tail_wanted = by_conv1d(**inputs, activation=activation)
    torch.testing.assert_close(y, y_wanted, rtol=0, atol=1e-12)
    assert torch.equal(tail, tail_wanted)


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
def test_two_halves_make_the_whole(impl, cut):
    inputs = make(9)
    y, tail = short_conv(**inputs, impl=impl)
    x, state = inputs.pop("x"), inputs.pop("initial_state")
    left, middle = short_conv(x[:, :cut], **inputs, initial_state=state, impl=impl)
    right, end = short_conv(x[:, cut:], **inputs, initial_state=middle, impl=impl)
    torch.testing.assert_close(torch.cat([left, right], 1), y, rtol=0, atol=1e-12)
    assert torch.equal(end, tail)


PATTERNS = ["..xxxx", "xxxx..", ".x..xx.x", "......", "x.....", "xx...."]


@pytest.mark.parametrize("garbage", [1e3, float("nan")])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_row_is_what_it_is_without_its_pads(impl, pattern, garbage):
    real = torch.tensor([[mark == "x" for mark in pattern], [True] * len(pattern)])
    inputs = make(len(pattern))
    inputs = {n: x[:2] if n in ("x", "initial_state") else x for n, x in inputs.items()}
    inputs["x"][~real] = garbage
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y, tail = short_conv(**leaves, mask=real, impl=impl)
    loss = y.sin().sum() + tail.sin().sum()
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert not y[~real].any()
    assert not grads["x"][~real].any()

    bare = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    total = 0
    for row in range(2):
        kept = real[row]
        state = bare["initial_state"][row : row + 1]
        x = bare["x"][row : row + 1, kept]
        if kept.any():
            y_row, tail_row = by_conv1d(x, bare["weight"], bare["bias"], state)
        else:
            y_row, tail_row = x, state
        torch.testing.assert_close(y[row : row + 1, kept], y_row, rtol=0, atol=1e-12)
        assert torch.equal(tail[row : row + 1], tail_row)
        total = total + y_row.sin().sum() + tail_row.sin().sum()
    wanted = dict(zip(bare, torch.autograd.grad(total, list(bare.values())), strict=True))
    for name in bare:
        torch.testing.assert_close(grads[name], wanted[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("pads", [False, True])
def test_gradients_are_those_of_finite_differences(impl, pads, activation):
    inputs = make(5)
    mask = torch.rand(B, 5) > 0.4 if pads else None

    def function(x, weight, bias, state):
        return short_conv(
            x, weight, bias, initial_state=state, mask=mask, activation=activation, impl=impl
        )

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


def test_half_precision_sums_in_single(impl):
    inputs = make(9, dtype=torch.bfloat16)
    y, tail = short_conv(**inputs, impl=impl)
    y_wanted, _ = by_conv1d(**{name: x.double() for name, x in inputs.items()})
    assert (y.dtype, tail.dtype) == (torch.bfloat16, torch.bfloat16)
    scale = y_wanted.abs().max().clamp(min=1)
    assert (y.double() - y_wanted).abs().max() / scale <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("T", [2, 40])
def test_a_kept_tail_does_not_keep_the_sequence(impl, rows, T):
    inputs = make(T)
    x, state = inputs.pop("x")[:rows], inputs.pop("initial_state")[:rows]
    for mask in (None, torch.rand(rows, T) > 0.5):
        _, tail = short_conv(x, **inputs, initial_state=state, mask=mask, impl=impl)
        assert tail.untyped_storage().nbytes() < 2 * tail.numel() * tail.element_size()


BAD = [
    ({"x": torch.zeros(3, 0, 5)}, ValueError, r"x must have .*no dimension of 0, got \(3, 0, 5\)"),
    ({"x": torch.zeros(3, 5)}, ValueError, r"x must have the shape \[B, T, E\] .*got \(3, 5\)"),
    ({"weight": torch.zeros(4, 4)}, ValueError, r"weight must .*\[E, W\] = \(5, 4\), got \(4, 4\)"),
    ({"weight": torch.zeros(5, 1, 4)}, ValueError, r"weight must .*\[E, W\] .*got \(5, 1, 4\)"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must have the shape \[E\] = \(5,\), got \(4,\)"),
    ({"initial_state": torch.zeros(3, 4, 5)}, ValueError, r"initial_state .*= \(3, 3, 5\), got"),
    ({"mask": torch.ones(3, 7)}, TypeError, "mask must be a bool Tensor"),
    ({"activation": "relu"}, ValueError, "activation must be 'silu' or None, got 'relu'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_arguments_are_named(change, kind, message):
    with pytest.raises(kind, match=message):
        short_conv(**make(7) | change)
