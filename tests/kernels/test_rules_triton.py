"""The Triton kernels of the two rules, in Triton's interpreter, against the fp64 reference.

The interpreter runs one program after another and knows no bf16 and no races: tests/gpu has those.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from agreement import TOLERANCE, compare, error
from agreement import results as results_of
from marks import slow

from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.ssd import ssd

pytest.importorskip("triton")

from hybrid_sleep.kernels.common.triton_sizes import Sizes
from hybrid_sleep.kernels.gated_delta_rule import triton as gated_delta_rule_path
from hybrid_sleep.kernels.ssd import triton as ssd_path

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels")

results = partial(results_of, names=("o", "S"))


def in_segments(op, segments, output=True, **inputs):
    """A call whose rows are cut into so many segments, of chunks of 16 tokens."""
    run = gated_delta_rule_path.gated_delta_rule if op is gated_delta_rule else ssd_path.ssd
    return run(*inputs.values(), None, 1.0, 16, output, segments)


# Sizes, then chunk_size; keys in groups of heads where G says so.
CASES = {
    "one chunk": dict(B=2, T=9, K=5, V=3),
    "one long chunk, large heads": dict(T=64, K=40, V=20, chunk_size=64),
    "two chunks, odd": dict(T=77, K=16, V=33, G=2, chunk_size=64),
    "chunks of 32": dict(T=70, H=1, K=12, V=7, chunk_size=40),
    "four short chunks": dict(T=55, K=17, V=18, G=2, chunk_size=16),
    "three chunks": dict(B=2, T=129, K=24, V=16, chunk_size=100),
    "as many chunks as it likes": dict(B=2, T=49, K=16, V=16),
    "segments": dict(T=140, H=1, K=8, V=8, chunk_size=16),
}
SINGLE, DOUBLE = TOLERANCE
# Each case once, of either rule in turn; what is slow has every other combination.
FAST = [
    ("one chunk", True, SINGLE),
    ("one chunk", False, DOUBLE),
    ("one long chunk, large heads", True, SINGLE),
    ("two chunks, odd", False, SINGLE),
    ("chunks of 32", True, DOUBLE),
    ("four short chunks", True, SINGLE),
    ("segments", False, SINGLE),
]
REST = [(n, s, d) for n in CASES for s in (True, False) for d in TOLERANCE if (n, s, d) not in FAST]
FIRST = {gated_delta_rule: FAST[::2], ssd: FAST[1::2]}
CALLS = [
    pytest.param(op, *one) if one in FIRST[op] else slow(op, *one)
    for op in FIRST
    for one in FAST + REST
]


@pytest.mark.parametrize(("op", "case", "state", "dtype"), CALLS)
def test_values_and_gradients(op, make, case, state, dtype):
    sizes = {"B": 1, "H": 2} | CASES[case]
    chunk_size = sizes.pop("chunk_size", None)
    inputs = make(op, **sizes)
    if not state:
        del inputs["initial_state"]
    wanted = results(op, inputs, impl="reference", scale=0.7)
    options = {"impl": "triton", "scale": 0.7, "chunk_size": chunk_size}
    compare(wanted, results(op, inputs, dtype=dtype, **options), dtype)


@pytest.mark.parametrize("pads", ["anywhere", slow("left"), slow("a whole row")])
def test_pads_write_nothing_and_leak_nothing(op, make, guarded, pads):
    B, T = 3, 40
    inputs = make(op, B, T, 1, 20, 18)
    mask = torch.rand(B, T) > 0.3
    if pads == "left":
        mask = torch.arange(T) >= torch.tensor([[0], [13], [36]])
    elif pads == "a whole row":
        mask[1] = False
    wanted = results(op, inputs, impl="reference", mask=mask)
    for name, x in inputs.items():
        if name != "initial_state":
            inputs[name] = torch.where(mask[(...,) + (None,) * (x.ndim - 2)], x, float("nan"))
    found = results(op, inputs, impl="triton", mask=mask, guard=guarded)
    guarded.check()
    compare(wanted, found)
    assert not found["o"][~mask].any()
    for name in ("dq", "dk", "dv", "dg"):
        assert not found[name][~mask].any(), name
    if pads != "a whole row" and op is gated_delta_rule:
        assert torch.equal(found["dg"] != 0, mask[..., None])


@pytest.mark.parametrize(
    ("segments", "dtype"),
    [(1, SINGLE), (3, SINGLE), slow(1, DOUBLE), slow(2, SINGLE), slow(3, DOUBLE), slow(5, SINGLE)],
    ids=str,
)
def test_segments_change_nothing_and_stay_inside(op, make, guarded, segments, dtype):
    inputs = make(op, 1, 75, 2, 18, 21, G=2)
    wanted = results(op, inputs, impl="reference", scale=1.0)
    found = results(partial(in_segments, op, segments), inputs, dtype=dtype, guard=guarded)
    guarded.check()
    compare(wanted, found, dtype)


@pytest.mark.parametrize(
    ("segments", "state"), [(1, True), (4, False), slow(1, False), slow(4, True), slow(2, True)]
)
def test_the_state_does_not_depend_on_whether_outputs_are_read(op, make, segments, state):
    inputs = {name: x.float() for name, x in make(op, 1, 90, 2, 16, 20).items()}
    if not state:
        inputs["initial_state"] = None
    _, S = in_segments(op, segments, **inputs)
    nothing, alone = in_segments(op, segments, output=False, **inputs)
    assert nothing is None
    assert torch.equal(S, alone)


@pytest.mark.parametrize(
    ("only", "segments"), [("o", 2), ("S", 1), slow("o", 1), slow("S", 2)], ids=str
)
def test_a_gradient_from_one_result_alone(op, make, only, segments):
    inputs = make(op, 1, 40, 1, 9, 10)
    wanted = results(op, inputs, only=only, impl="reference", scale=1.0)
    found = results(partial(in_segments, op, segments), inputs, only=only)
    compare(wanted, found, absent_is_zero=True)


def test_without_outputs_the_state_has_its_gradients(op, make):
    inputs = make(op, 2, 30, 1, 8, 9)
    wanted = results(op, inputs, impl="reference", output=False)
    found = results(op, inputs, impl="triton", output=False, chunk_size=16)
    assert "dq" not in found
    compare(wanted, found, absent_is_zero=True)


def test_split_is_whole(op, make):
    inputs = make(op, 2, 70, 1, 12, 8)
    o, S = op(**inputs, impl="triton")
    state, parts = inputs["initial_state"], []
    for part in (slice(0, 33), slice(33, 34), slice(34, 70)):
        tokens = {n: x[:, part] for n, x in inputs.items() if n != "initial_state"}
        out, state = op(**tokens, initial_state=state, impl="triton")
        parts.append(out)
    assert error(torch.cat(parts, 1), o) < 1e-12
    assert error(state, S) < 1e-12


def test_views_with_any_strides_are_read_as_they_are(op, make):
    inputs = make(op, 2, 20, 2, 6, 5)
    wanted = results(op, inputs, impl="reference")

    def part_of_a_larger_one(x):
        return torch.cat([x, x], -1)[..., : x.shape[-1]]

    for view in (part_of_a_larger_one, lambda x: x.mT.contiguous().mT):

        def of_views(view=view, **leaves):
            return op(**{n: view(x) for n, x in leaves.items()}, impl="triton")

        compare(wanted, results(of_views, inputs))
    mask = torch.rand(20, 2).T > 0.3
    assert not mask.is_contiguous()
    wanted = op(**inputs, mask=mask, impl="reference")
    assert max(map(error, op(**inputs, mask=mask, impl="triton"), wanted)) < 1e-12


def test_a_reset_keeps_the_small_decays_that_follow_it(op, make):
    inputs = make(op, 1, 60, 1, 8, 8)
    inputs["g"][:, ::17] = -1e4
    wanted = results(op, inputs, impl="reference")
    found = results(op, inputs, dtype=SINGLE, impl="triton")
    limit = 1e-5 if op is ssd else 2e-5
    assert {n: e for n, x in wanted.items() if not (e := error(found[n], x)) <= limit} == {}


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
    def of_the_delta_rule(B, T, H):
        return gated_delta_rule_path.segment_count(Sizes(B, T, H, 1, 128, 128, 64, 1))

    def of_ssd(B, T, H):
        k = torch.empty(B, T, 1, 128, device="meta")
        v = torch.empty(B, T, H, 128, device="meta")
        how = ssd_path.precision(torch.bfloat16, torch.float32)
        return ssd_path.sizes_of(k, v, how).segments

    calls = [(8, 8192, 16), (1, 2048, 8), (1, 2048, 2), (1, 100, 1)]
    assert [of_the_delta_rule(*call) for call in calls] == [1, 2, 8, 1]
    assert [of_ssd(*call) for call in calls] == [1, 8, 16, 1]
