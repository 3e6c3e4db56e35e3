"""The fused mixers against the composition of their parts, and what they refuse.

The composition itself is compared with a token-by-token formulation in tests/sleep.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from agreement import TOLERANCE, compare, error
from agreement import results as results_of
from marks import halved, slow

from hybrid_sleep.kernels.common import triton_paths
from hybrid_sleep.kernels.gated_delta_net import gated_delta_net
from hybrid_sleep.kernels.mamba2 import mamba2

if find_spec("triton") is not None:
    from hybrid_sleep.kernels.common.triton_launch import recording

SINGLE, DOUBLE = TOLERANCE

fused = pytest.mark.skipif(not triton_paths.interpreting(), reason="needs Triton's interpreter")
results = partial(results_of, names=("o", "S", "q_tail", "kv_tail"))


OPS = [gated_delta_net, mamba2]


@pytest.fixture(params=OPS, ids=lambda op: op.__name__, scope="session")
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


CASES = {
    "one token": dict(T=1, R=1),
    "one chunk, shared keys": dict(B=1, T=13, G=2, R=2, K=3, V=4),
    "shorter than the filter": dict(B=1, T=2, W=4),
    "no history": dict(B=1, T=20, state=False, tails=False),
    "three chunks": dict(T=37, B=1, K=9, V=17, R=1, W=2),
}


@fused
@pytest.mark.parametrize("dtype", [SINGLE, slow(DOUBLE)], ids=str)
@pytest.mark.parametrize(("op", "case"), halved(OPS, CASES))
def test_fused_is_composed(op, case, dtype):
    inputs, options = inputs_of(op, **CASES[case])
    wanted = results(op, inputs, impl="reference", **options)
    found = results(op, inputs, dtype=dtype, impl="triton", **options)
    compare(wanted, found, dtype, absent_is_zero=True)


@fused
@pytest.mark.parametrize("case", ["one token", "one chunk, shared keys", slow("three chunks")])
def test_fused_is_composed_where_eigenvalues_may_be_negative(case):
    inputs, options = inputs_of(gated_delta_net, **CASES[case])
    options["allow_neg_eigval"] = True
    wanted = results(gated_delta_net, inputs, impl="reference", **options)
    found = results(gated_delta_net, inputs, dtype=SINGLE, impl="triton", **options)
    compare(wanted, found, SINGLE, absent_is_zero=True)
    with torch.no_grad():
        token = {name: x[:, :1] if name in per_token(inputs) else x for name, x in inputs.items()}
        S = gated_delta_net(**token, **options, impl="triton").S
        assert error(S, gated_delta_net(**token, **options, impl="reference").S) < 1e-10


@pytest.mark.parametrize("impl", ["reference", "chunked", pytest.param("triton", marks=fused)])
def test_a_strength_of_two_flips_what_is_stored(impl):
    """Worked out by hand: k = 1, v = 0, no decay and b = 40, so S <- (1 - beta) S with beta 2 or 1.

    The sign of S is then the parity of the tokens, which no strength of at most 1 can show.
    """
    T = 5
    kv = torch.zeros(1, T, 2, dtype=torch.float64)
    kv[..., 0] = 40.0
    one = torch.zeros(1, 1, 1, 1, dtype=torch.float64) + 0.75
    taps = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    arguments = dict(
        q=kv[..., :1], kv=kv, a=torch.full((1, T, 1), -60.0, dtype=torch.float64),
        b=torch.full((1, T, 1), 40.0, dtype=torch.float64), q_weight=taps,
        kv_weight=taps.repeat(2, 1), A_log=torch.zeros(1, dtype=torch.float64),
        dt_bias=torch.zeros(1, dtype=torch.float64), key_heads=1, initial_state=one, impl=impl,
    )  # fmt: skip
    flips = gated_delta_net(**arguments, allow_neg_eigval=True)
    assert flips.o.flatten().tolist() == pytest.approx([-0.75, 0.75, -0.75, 0.75, -0.75], abs=1e-6)
    assert flips.S.item() == pytest.approx(-0.75, abs=1e-6)
    assert gated_delta_net(**arguments).S.item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="allow_neg_eigval must be True or False, got 2"):
        gated_delta_net(**arguments, allow_neg_eigval=2)


@fused
@pytest.mark.parametrize(("op", "only"), halved(OPS, ["o", "S", "kv_tail"]))
def test_a_gradient_from_one_result_alone(op, only):
    inputs, options = inputs_of(op, B=1, T=9)
    wanted = results(op, inputs, only=only, impl="reference", **options)
    found = results(op, inputs, only=only, impl="triton", **options)
    compare(wanted, found, absent_is_zero=True)


def with_nan_at_pads(inputs, mask):
    """The inputs with NaN wherever a pad stands."""
    hidden = {n: torch.where(mask[..., None], inputs[n], float("nan")) for n in per_token(inputs)}
    return inputs | hidden


def per_token(inputs):
    return {"q", "kv", "a", "b"} & inputs.keys()


@fused
@pytest.mark.parametrize("pads", ["anywhere", slow("left"), slow("a whole row")])
def test_pads_change_nothing_whatever_stands_there(op, guarded, pads):
    B, T = 2, 19
    inputs, options = inputs_of(op, B=B, T=T)
    mask = torch.rand(B, T) > 0.4
    if pads == "left":
        mask = torch.arange(T) >= torch.tensor([[5], [17]])
    elif pads == "a whole row":
        mask[1] = False
    wanted = results(op, inputs, impl="reference", mask=mask, **options)
    inputs = with_nan_at_pads(inputs, mask)
    found = results(op, inputs, impl="triton", mask=mask, guard=guarded, **options)
    guarded.check()
    compare(wanted, found, absent_is_zero=True)
    assert not found["o"][~mask].any()
    assert not any(found[f"d{name}"][~mask].any() for name in per_token(inputs))


@fused
@pytest.mark.parametrize(
    ("history", "padded", "dtype"),
    [
        (True, True, DOUBLE),
        (False, False, SINGLE),
        slow(True, False, SINGLE),
        slow(False, True, DOUBLE),
    ],
    ids=str,
)
def test_one_token_after_another_is_the_sequence(op, guarded, history, padded, dtype):
    T = 4
    sizes = dict(B=2, T=T, G=2, R=2, K=3, V=18) if history else dict(B=1, T=T, V=18)
    inputs, options = inputs_of(op, **sizes, state=history, tails=history)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool) if padded else None
    if padded and not history:
        mask = mask[:1]
    wanted = op(**inputs, **options, mask=mask, impl="reference")
    if padded:
        inputs = with_nan_at_pads(inputs, mask)
    inputs = {n: x.to(dtype) for n, x in inputs.items()}
    memory = {n: inputs.pop(n, None) for n in ("initial_state", "q_tail", "kv_tail")}
    inputs = {n: x if n in per_token(inputs) else guarded(x) for n, x in inputs.items()}
    outputs = []
    with torch.no_grad():
        for t in range(T):
            token = {n: guarded(inputs[n][:, t : t + 1].contiguous()) for n in per_token(inputs)}
            memory = {n: None if x is None else guarded(x) for n, x in memory.items()}
            now = None if mask is None else guarded(mask[:, t : t + 1])
            o, *after = op(**inputs | token | memory, **options, mask=now, impl="triton")
            memory = dict(zip(memory, after, strict=True))
            outputs.append(o)
    guarded.check()
    found = (torch.cat(outputs, 1), *memory.values())
    assert max(map(error, found, wanted)) < {SINGLE: 1e-5, DOUBLE: 1e-12}[dtype]


@fused
def test_a_step_takes_one_launch_and_writes_only_new_tensors(op):
    inputs, options = inputs_of(op, B=1, T=1)
    with recording() as launches:
        op(**inputs, **options, impl="triton")
    assert [launch.kernel.name for launch in launches] == ["step"]
    before = {name: x.clone() for name, x in inputs.items()}
    op(**inputs, **options, impl="triton")
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


@fused
@pytest.mark.parametrize("width", [1, 2])
def test_short_filters(op, width):
    inputs, options = inputs_of(op, B=1, T=1, W=width)
    found = op(**inputs, **options, impl="triton")
    wanted = op(**inputs, **options, impl="reference")
    assert max(map(error, found[:2], wanted[:2])) < 1e-12
    assert all(torch.equal(x, y) for x, y in zip(found[2:], wanted[2:], strict=True))


@fused
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_small_and_large_time_steps_have_gradients():
    inputs, options = inputs_of(mamba2, B=1, T=24, K=4, V=4)
    inputs["a"] = torch.linspace(-120, 10, 48, dtype=torch.float64).view(1, 24, 2)
    wanted = results(mamba2, inputs, impl="reference", **options)
    found = results(mamba2, inputs, dtype=SINGLE, impl="triton", **options)
    compare(wanted, found, SINGLE, absent_is_zero=True)


@pytest.mark.parametrize("impl", ["reference", "chunked", pytest.param("triton", marks=fused)])
@pytest.mark.parametrize("T", [1, 20])
def test_the_state_does_not_depend_on_what_else_is_computed(op, impl, T):
    inputs, options = inputs_of(op, B=1, T=T)
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
