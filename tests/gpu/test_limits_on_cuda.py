"""Where other projects' kernels were reported to break on a GPU, tried on ours, cheaply."""

from __future__ import annotations

import pytest
import torch
from strong_gates import GATES, differentiate, far, with_gates
from torch.nn.functional import normalize

from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.short_conv import short_conv
from hybrid_sleep.kernels.ssd import ssd

pytestmark = pytest.mark.gpu

RULES = [gated_delta_rule, ssd]
BF16 = torch.bfloat16


@pytest.fixture(params=RULES, ids=lambda op: op.__name__)
def op(request):
    return request.param


def rule_inputs(op, B, T, H, K, V, dtype=BF16):
    """On the GPU; gates and strengths in fp32."""

    def draw(*size):
        return torch.randn(size, device="cuda")

    inputs = {
        "q": normalize(draw(B, T, H, K), dim=-1).to(dtype),
        "k": normalize(draw(B, T, H, K), dim=-1).to(dtype),
        "v": draw(B, T, H, V).to(dtype),
        "g": -draw(B, T, H).sigmoid(),
        "initial_state": draw(B, H, K, V),
    }
    return inputs | ({"beta": draw(B, T, H).sigmoid()} if op is gated_delta_rule else {})


def exact(op, inputs, **options):
    """What chunks of PyTorch in fp64 make of the same numbers."""
    return op(**{n: x.double() for n, x in inputs.items()}, impl="chunked", **options)


def distance(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("gates", GATES)
def test_gates_that_forget_all_have_their_gradients_in_fp32(op, gates):
    """mamba's ddA, FlashQLA and attention-gym: differences that cancel where decay is strong."""
    on_cpu = {n: x.cpu().double() for n, x in rule_inputs(op, 1, 24, 2, 32, 32).items()}
    inputs = with_gates(on_cpu, gates)
    wanted = differentiate(op, inputs, torch.float64, impl="reference")
    on_gpu = {n: x.cuda() for n, x in inputs.items()}
    found = differentiate(op, on_gpu, torch.float32, impl="triton")
    assert far(found, wanted, 1e-4, 1e-4) == {}


def test_gates_of_minus_five_in_bf16(op):
    """attention-gym: 59 eps of error in the gates' gradient where 1 is possible."""
    inputs = rule_inputs(op, 1, 256, 2, 128, 128)
    inputs["g"].fill_(-5.0)
    double = {n: x.double() for n, x in inputs.items()}
    grads = {}
    for impl, given in (("triton", inputs), ("chunked", double)):
        leaves = {n: x.detach().clone().requires_grad_() for n, x in given.items()}
        o, S = op(**leaves, impl=impl)
        (o.double().sum() + S.double().square().sum()).backward()
        grads[impl] = leaves["g"].grad.double()
    assert distance(grads["triton"], grads["chunked"]) < 4 * torch.finfo(BF16).eps


@pytest.mark.parametrize("T", [61_500])
def test_a_long_row_ends_as_it_should(op, T):
    """mamba: wrong and finite beyond 61,000 tokens at B = 1."""
    inputs = rule_inputs(op, 1, T, 2, 64, 64)
    o, S = op(**inputs, impl="triton")
    o_wanted, S_wanted = exact(op, inputs)
    assert distance(o[:, -500:], o_wanted[:, -500:]) < 2e-2
    assert distance(S, S_wanted) < 2e-2


def test_outputs_of_more_than_two_to_the_31_elements(op):
    """fla: int32. Every row is the same one, expanded, and so must every row of the result be."""
    B, T, H, V = 4100, 512, 8, 128
    one = rule_inputs(op, 1, T, H, 64, V)
    rows = {n: x.expand(B, *x.shape[1:]) for n, x in one.items()}
    with torch.no_grad():
        o, S = op(**rows, impl="triton")
        assert o.numel() > 2**31
        for row in (0, 2050, B - 1):
            assert torch.equal(o[row], o[1]) and torch.equal(S[row], S[1])
        o_one, _ = exact(op, one)
    assert distance(o[-1], o_one[0]) < 2e-2


def test_heads_that_lie_more_than_two_to_the_31_elements_apart(op):
    B, T, H, K = 1, 40, 5, 64
    inputs = rule_inputs(op, B, T, H, K, 32)
    wanted = op(**inputs, impl="triton")
    far_apart = 2**29 + 64
    room = torch.empty(far_apart * (H - 1) + T * K, dtype=BF16, device="cuda")
    k = room.as_strided((B, T, H, K), (0, K, far_apart, 1))
    k.copy_(inputs["k"])
    found = op(**inputs | {"k": k}, impl="triton")
    assert all(map(torch.equal, found, wanted))


def test_more_rows_than_a_grids_other_axes_hold(op):
    """fla: 65,535 programs on the second and third axis of a grid."""
    B = 66_000
    inputs = rule_inputs(op, B, 3, 1, 16, 16)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    o, S = op(**leaves, impl="triton")
    (o.float().square().sum() + S.square().sum()).backward()
    few = {n: x.detach()[-8:].double().requires_grad_() for n, x in leaves.items()}
    o_few, S_few = op(**few, impl="chunked")
    (o_few.square().sum() + S_few.square().sum()).backward()
    assert distance(o[-8:], o_few) < 2e-2
    for name, x in leaves.items():
        assert distance(x.grad[-8:], few[name].grad) < 5e-2, name


def test_more_chunks_than_a_grids_other_axes_hold(op):
    """In fp32 a chunk has 16 tokens, so that a million of them are more than 65,535 chunks."""
    T = 1_050_000
    inputs = rule_inputs(op, 1, T, 1, 16, 16, torch.float32)
    with torch.no_grad():
        o, S = op(**inputs, impl="triton")
        last = {n: x[:, -2000:] for n, x in inputs.items() if n != "initial_state"}
        o_last, S_last = exact(op, last)
    # What lies 2,000 tokens back is forgotten.
    assert distance(o[:, -500:], o_last[:, -500:]) < 1e-3
    assert distance(S, S_last) < 1e-3


def test_short_conv_of_more_rows_than_a_grids_other_axes_hold():
    inputs = {"x": torch.randn(66_000, 3, 16), "weight": torch.randn(16, 4)}
    inputs["initial_state"] = torch.randn(66_000, 3, 16)
    found = {}
    for impl in ("triton", "chunked"):
        leaves = {n: x.cuda().requires_grad_() for n, x in inputs.items()}
        y, tail = short_conv(**leaves, impl=impl)
        (y.square().sum() + tail.square().sum()).backward()
        found[impl] = [y.detach(), tail.detach(), *(x.grad for x in leaves.values())]
    for ours, wanted in zip(found["triton"], found["chunked"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_short_conv_of_more_than_two_to_the_31_elements():
    """vllm: illegal access at 1.4 million tokens."""
    T, E = 1_420_000, 1536
    x = torch.randn(1, 1000, E, device="cuda", dtype=BF16).repeat(1, T // 1000, 1)
    weight = torch.randn(E, 4, device="cuda", dtype=BF16)
    with torch.no_grad():
        y, tail = short_conv(x, weight, impl="triton")
        y_wanted, tail_wanted = short_conv(x[:, -1000:].double(), weight.double(), impl="chunked")
    assert y.numel() > 2**31
    assert distance(y[:, -900:], y_wanted[:, -900:]) < 1e-2
    assert torch.equal(tail.double(), tail_wanted)


@pytest.mark.parametrize("K", [129, 131, 133, 153])
def test_one_token_of_odd_wide_keys(op, K):
    """fla: illegal access at T = 1 in 16 bit."""
    inputs = rule_inputs(op, 2, 1, 2, K, 40)
    for found, wanted in zip(op(**inputs, impl="triton"), exact(op, inputs), strict=True):
        assert distance(found, wanted) < 2e-2


@pytest.mark.parametrize("T", [63, 500, 1000])
def test_the_state_after_a_chunk_that_is_not_full(op, T):
    """cuLA: garbage of 1e27. TensorRT-LLM: a decay counted from the chunk's start."""
    inputs = rule_inputs(op, 2, T, 2, 64, 64)
    whole = op(**inputs, impl="triton")
    for found, wanted in zip(whole, exact(op, inputs), strict=True):
        assert distance(found, wanted) < 2e-2
    cut = T // 3
    parts = [
        {n: x[:, part] for n, x in inputs.items() if n != "initial_state"}
        for part in (slice(0, cut), slice(cut, T))
    ]
    _, S = op(**parts[0], initial_state=inputs["initial_state"], impl="triton")
    o, S = op(**parts[1], initial_state=S, impl="triton")
    assert distance(o, whole[0][:, cut:].double()) < 2e-2
    assert distance(S, whole[1].double()) < 2e-2


def test_keys_that_are_not_normalised_in_fp16_leave_no_nan(op):
    """fla: NaN. Ours takes the path that keeps its state in fp32."""
    inputs = rule_inputs(op, 1, 200, 2, 64, 64, torch.float16)
    if op is ssd:
        inputs["k"] = inputs["k"] * 50
    else:
        # The rule itself diverges where beta |k|^2 > 2; below that nothing may.
        inputs["k"], inputs["beta"] = inputs["k"] * 30, inputs["beta"] / 900
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    o, S = op(**leaves)
    (o.float().mean() + S.mean()).backward()
    for found, wanted in zip((o, S), exact(op, inputs), strict=True):
        assert distance(found.detach(), wanted) < 1e-2
    assert all(x.grad.isfinite().all() for x in leaves.values())


def test_many_packed_tokens_have_finite_gradients(op):
    """unsloth: NaN from 17,000 packed tokens, batch 4. Documents here are rows with pads."""
    inputs = rule_inputs(op, 4, 17_000, 2, 64, 64)
    mask = torch.rand(4, 17_000, device="cuda") > 0.1
    inputs["v"] = inputs["v"].masked_fill(~mask[..., None, None], float("nan"))
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    o, S = op(**leaves, mask=mask, impl="triton")
    (o.float().square().mean() + S.square().mean()).backward()
    assert o.isfinite().all() and S.isfinite().all()
    assert all(x.grad.isfinite().all() for x in leaves.values())


def test_gradients_that_lie_anyhow(op):
    """fla: a gradient that is no contiguous tensor."""
    inputs = rule_inputs(op, 2, 70, 2, 32, 32)
    found = []
    for turn in (False, True):
        leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
        results = op(**leaves, impl="triton")
        torch.manual_seed(1)
        grad_outputs = [torch.randn_like(x) for x in results]
        if turn:
            grad_outputs = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in grad_outputs]
        torch.autograd.backward(results, grad_outputs)
        found.append([x.grad for x in leaves.values()])
    assert all(map(torch.equal, *found))
