"""On a CUDA device: the Triton kernels of Mamba-2 against the fp64 references, and again."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from hybrid_sleep.kernels.common.triton_paths import LARGEST_FP32_KEY
from hybrid_sleep.kernels.mamba2 import mamba2
from hybrid_sleep.kernels.ssd import ssd

pytestmark = pytest.mark.gpu

# What rounding the operands of products leaves, relative in norm; 2e-3 was found for 8 bits.
FLOOR = {torch.bfloat16: 6e-3, torch.float32: 2e-5}

SHAPES = {
    "heads fill it": dict(B=8, T=300, H=16, G=16, K=128, V=128),
    "segments": dict(B=1, T=2048, H=8, G=2, K=128, V=64),
    "odd": dict(B=2, T=333, H=3, G=1, K=72, V=100),
    "small": dict(B=2, T=40, H=2, G=2, K=16, V=24),
    "largest": dict(B=1, T=200, H=2, G=1, K=256, V=256),
}
# The kernels decline what the PyTorch path is left with: keys above 128 in anything but bf16.
CASES = [
    pytest.param(shape, dtype, id=f"{name}-{dtype}")
    for name, shape in SHAPES.items()
    for dtype in FLOOR
    if dtype == torch.bfloat16 or shape["K"] <= LARGEST_FP32_KEY
]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rule_inputs(B, T, H, G, K, V):
    """Of `ssd`, fp64 on the CPU."""
    return {
        "q": normalize(draw(B, T, G, K), dim=-1),
        "k": normalize(draw(B, T, G, K), dim=-1),
        "v": draw(B, T, H, V),
        "g": -torch.rand(B, T, H, dtype=torch.float64),
        "initial_state": draw(B, H, K, V),
    }


def mixer_inputs(B, T, H, G, K, V):
    """Of `mamba2`, fp64 on the CPU."""
    key_width, kv_width = G * K, G * K + H * V
    return {
        "q": draw(B, T, key_width) * K**-0.5,
        "kv": draw(B, T, kv_width),
        "a": draw(B, T, H),
        "q_weight": draw(key_width, 4) / 2,
        "kv_weight": draw(kv_width, 4) / 2,
        "A_log": draw(H),
        "dt_bias": draw(H) - 2,
        "skip": draw(H),
        "initial_state": draw(B, H, K, V),
        "q_tail": draw(B, 3, key_width) * K**-0.5,
        "kv_tail": draw(B, 3, kv_width),
    }


EXACT = ("g", "A_log", "dt_bias", "skip", "initial_state")


def rounded(inputs, dtype):
    """What of the inputs a model of `dtype` can hold, still in fp64."""
    return {n: x if n in EXACT else x.to(dtype).double() for n, x in inputs.items()}


def results(op, inputs, dtype, **options):
    """What op returns and its gradients, by name, on the GPU."""
    leaves = {}
    for name, x in inputs.items():
        state = torch.float64 if dtype == torch.float64 else torch.float32
        leaves[name] = x.cuda().to(state if name in EXACT else dtype, copy=True).requires_grad_()
    o, S, *_ = op(**leaves, **options)
    drawn = torch.Generator().manual_seed(1)
    random = [torch.randn(x.shape, generator=drawn).bfloat16() for x in (o, S)]
    grad_outputs = [x.cuda().to(result.dtype) for x, result in zip(random, (o, S), strict=True)]
    torch.autograd.backward([o, S], grad_outputs)
    return {"o": o.detach(), "S": S.detach()} | {f"d{n}": x.grad for n, x in leaves.items()}


def distance(found, wanted):
    """Relative in norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9))


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("pads", [False, True], ids=["whole", "pads"])
@pytest.mark.parametrize("op", [ssd, mamba2], ids=lambda op: op.__name__)
def test_as_close_as_the_chunked_path(op, shape, pads, dtype):
    inputs = rounded((rule_inputs if op is ssd else mixer_inputs)(**shape), dtype)
    options = {"mask": (torch.rand(shape["B"], shape["T"]) > 0.2).cuda() if pads else None}
    if op is mamba2:
        options["key_heads"] = shape["G"]
    wanted = results(op, inputs, torch.float64, impl="chunked", **options)
    plain = results(op, inputs, dtype, impl="chunked", **options)
    found = results(op, inputs, dtype, impl="triton", **options)
    # The mixer rounds once more, between the convolution and the rule.
    floor = FLOOR[dtype] * (1 if op is ssd else 2)
    far = {}
    for name, x in wanted.items():
        allowed = 2 * distance(plain[name], x) + floor
        if not distance(found[name], x) <= allowed:
            far[name] = (distance(found[name], x), allowed)
    assert far == {}


@pytest.mark.parametrize("op", [ssd, mamba2], ids=lambda op: op.__name__)
@pytest.mark.parametrize("shape", ["heads fill it", "segments"])
def test_a_hundred_runs_are_bit_identical(op, shape):
    sizes = SHAPES[shape]
    inputs = rounded((rule_inputs if op is ssd else mixer_inputs)(**sizes), torch.bfloat16)
    options = {"impl": "triton"} | ({"key_heads": sizes["G"]} if op is mamba2 else {})
    first = results(op, inputs, torch.bfloat16, **options)
    for _ in range(100):
        again = results(op, inputs, torch.bfloat16, **options)
        assert [n for n, x in first.items() if not torch.equal(x, again[n])] == []


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_state_does_not_depend_on_whether_outputs_are_read(shape, dtype):
    inputs = {
        n: x.cuda().to(torch.float32 if n in EXACT else dtype)
        for n, x in mixer_inputs(**shape).items()
    }
    whole = mamba2(**inputs, key_heads=shape["G"], impl="triton")
    alone = mamba2(**inputs, key_heads=shape["G"], impl="triton", output=False)
    assert torch.equal(whole.S, alone.S)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_steps_are_the_sequence(dtype):
    sizes = SHAPES["segments"] | {"B": 3, "T": 9}
    inputs = rounded(mixer_inputs(**sizes), dtype)
    given = {n: x.cuda().to(torch.float32 if n in EXACT else dtype) for n, x in inputs.items()}
    mask = (torch.rand(3, 9) > 0.3).cuda()
    exact = {n: x.cuda() for n, x in inputs.items()}
    wanted = mamba2(**exact, key_heads=2, mask=mask, impl="reference")
    carried = {n: given.pop(n) for n in ("initial_state", "q_tail", "kv_tail")}
    outputs = []
    for t in range(9):
        token = given | {n: given[n][:, t : t + 1] for n in ("q", "kv", "a")}
        o, S, q_tail, kv_tail = mamba2(
            **token, **carried, key_heads=2, mask=mask[:, t : t + 1], impl="triton"
        )
        outputs.append(o)
        carried = {"initial_state": S, "q_tail": q_tail, "kv_tail": kv_tail}
    assert distance(torch.cat(outputs, 1), wanted.o) < 2 * FLOOR[dtype]
    assert distance(S, wanted.S) < FLOOR[dtype]
