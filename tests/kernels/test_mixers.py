"""The fused mixers against the composition of their parts, and what they refuse.

The composition itself is held against a token-by-token formulation in tests/sleep.
"""

from __future__ import annotations

import pytest
import torch
from marks import slow

from hybrid_sleep.kernels.common import triton_paths
from hybrid_sleep.kernels.gated_delta_net import gated_delta_net
from hybrid_sleep.kernels.mamba2 import mamba2

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = [torch.float32, slow(torch.float64)]
NAMES = ("o", "S", "q_tail", "kv_tail")

fused = pytest.mark.skipif(not triton_paths.interpreting(), reason="needs Triton's interpreter")


@pytest.fixture(params=[gated_delta_net, mamba2], ids=lambda op: op.__name__, scope="session")
def op(request):
    return request.param


def inputs_of(op, B=2, T=7, G=1, R=2, K=5, V=6, W=4, state=True, tails=True):
    """Keyword arguments of a mixer, fp64."""
    H = G * R

    def draw(*size):
        return torch.randn(size, dtype=torch.float64)

    inputs = {
        "q": draw(B, T, G * K),
        "kv": draw(B, T, G * K + H * V),
        "a": draw(B, T, H),
        "q_weight": draw(G * K, W),
        "kv_weight": draw(G * K + H * V, W),
        "A_log": 0.3 * draw(H),
        "dt_bias": draw(H),
    }
    inputs |= {"b": draw(B, T, H)} if op is gated_delta_net else {"skip": draw(H)}
    if state:
        inputs["initial_state"] = draw(B, H, K, V)
    if tails:
        inputs["q_tail"] = draw(B, W - 1, G * K)
        inputs["kv_tail"] = draw(B, W - 1, G * K + H * V)
    return inputs, {"key_heads": G}


def error(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def results(op, inputs, dtype=torch.float64, guard=None, only=NAMES, **options):
    """What `op` returns, and the gradients by name of one fixed random function of `only`."""
    leaves = {name: x.clone().to(dtype).requires_grad_() for name, x in inputs.items()}
    given = leaves if guard is None else {name: guard(x) for name, x in leaves.items()}
    returned = op(**given, **options)._asdict()
    found = {name: x for name, x in returned.items() if x is not None}
    drawn = torch.Generator().manual_seed(1)
    random = {"generator": drawn, "dtype": torch.float64}
    grad_outputs = {name: torch.randn(x.shape, **random) for name, x in found.items()}
    chosen = [n for n in only if n in found]
    torch.autograd.backward([found[n] for n in chosen], [grad_outputs[n].to(dtype) for n in chosen])
    grads = {f"d{name}": x.grad for name, x in given.items() if x.grad is not None}
    return found | grads


def compare(found, wanted, dtype=torch.float64):
    zero = torch.zeros(())
    wrong = {}
    for name in wanted.keys() | found.keys():
        e = error(found.get(name, zero), wanted.get(name, zero))
        if not e <= TOLERANCE[dtype]:
            wrong[name] = e
    assert wrong == {}


CASES = {
    "one token": dict(T=1, R=1),
    "one chunk, shared keys": dict(T=13, G=2, R=2, K=3, V=4),
    "shorter than the filter": dict(T=2, W=4),
    "no history": dict(T=20, state=False, tails=False),
    "three chunks": dict(T=37, B=1, K=9, V=17, R=1, W=2),
}


@fused
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_is_composed(op, case, dtype):
    inputs, options = inputs_of(op, **case)
    wanted = results(op, inputs, impl="reference", **options)
    compare(results(op, inputs, dtype, impl="triton", **options), wanted, dtype)


@fused
@pytest.mark.parametrize("only", [("o",), ("S",), ("kv_tail",)], ids=lambda names: names[0])
def test_a_gradient_from_one_result_alone(op, only):
    inputs, options = inputs_of(op, T=9)
    wanted = results(op, inputs, only=only, impl="reference", **options)
    compare(results(op, inputs, only=only, impl="triton", **options), wanted)


@fused
@pytest.mark.parametrize("pads", ["anywhere", slow("left"), slow("a whole row")])
def test_pads_change_nothing_whatever_stands_there(op, guarded, pads):
    T = 21
    inputs, options = inputs_of(op, B=3, T=T)
    mask = torch.rand(3, T) > 0.4
    if pads == "left":
        mask = torch.arange(T) >= torch.tensor([[0], [5], [19]])
    elif pads == "a whole row":
        mask[1] = False
    wanted = results(op, inputs, impl="reference", mask=mask, **options)
    for name in {"q", "kv", "a", "b"} & inputs.keys():
        inputs[name] = torch.where(mask[..., None], inputs[name], float("nan"))
    found = results(op, inputs, impl="triton", mask=mask, guard=guarded, **options)
    guarded.check()
    compare(found, wanted)


@fused
@pytest.mark.parametrize(
    ("tails", "padded"), [(True, True), slow(True, False), slow(False, True), slow(False, False)]
)
def test_one_token_after_another_is_the_sequence(op, guarded, tails, padded):
    T = 6
    inputs, options = inputs_of(op, B=3, T=T, G=2, R=2, K=3, V=20, state=tails, tails=tails)
    mask = torch.rand(3, T) > 0.4 if padded else None
    wanted = op(**inputs, **options, mask=mask, impl="reference")
    memory = {n: inputs.pop(n, None) for n in ("initial_state", "q_tail", "kv_tail")}
    outputs = []
    with torch.no_grad():
        for t in range(T):
            now = {
                n: x[:, t : t + 1] if n in ("q", "kv", "a", "b") else x for n, x in inputs.items()
            }
            now = {n: guarded(x.contiguous()) for n, x in now.items()}
            mask_t = None if mask is None else mask[:, t : t + 1]
            o, *after = op(**now, **memory, **options, mask=mask_t, impl="triton")
            memory = dict(zip(memory, after, strict=True))
            outputs.append(o)
    guarded.check()
    found = (torch.cat(outputs, 1), *memory.values())
    assert max(map(error, found, wanted)) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "chunked", pytest.param("triton", marks=fused)])
@pytest.mark.parametrize("T", [1, 20])
def test_the_state_does_not_depend_on_what_else_is_asked_for(op, impl, T):
    inputs, options = inputs_of(op, T=T)
    with torch.no_grad():
        whole = op(**inputs, **options, impl=impl)
        written = op(**inputs, **options, impl=impl, output=False)
        assert written.o is None
        for name in ("S", "q_tail", "kv_tail"):
            assert torch.equal(getattr(whole, name), getattr(written, name)), name
        without = inputs | {"q": None}
        bare = op(**without, **options, impl=impl, output=False, tails=False)
        kept = op(**without, **options, impl=impl, output=False)
    assert torch.equal(bare.S, whole.S)
    assert bare.o is bare.q_tail is bare.kv_tail is None
    # Without queries their tail stays what it was.
    assert torch.equal(kept.q_tail, inputs["q_tail"])
    assert torch.equal(kept.kv_tail, whole.kv_tail)


def test_what_is_wrong_is_named(op):
    inputs, options = inputs_of(op)

    def refused(message, **changes):
        with pytest.raises((TypeError, ValueError), match=message):
            op(**(inputs | options | changes))

    refused("q must be .*unless output=False, got None", q=None)
    refused("key_heads must be an integer of at least 1, got 0", key_heads=0)
    refused("key_heads must divide the 5 rows of q_weight, got 3", key_heads=3)
    odd = inputs["kv"][..., :16]
    refused("kv must have 5 channels of keys and a multiple of 2 of values, got 16", kv=odd)
    refused("a must have the shape", a=inputs["a"][:, :3])
    refused("A_log must have the shape", A_log=inputs["A_log"][:1])
    refused("kv_tail must have the shape", kv_tail=inputs["kv_tail"][:, :1])
    refused("initial_state must have the shape", initial_state=inputs["initial_state"][:, :1])
    refused("mask must be a bool", mask=torch.ones(2, 7))
    refused("impl of .* must be one of .*got 'fast'", impl="fast")
