"""The Triton kernels of Mamba-2 in Triton's interpreter, against the fp64 references.

It runs one program after another and knows neither bf16 nor races: tests/gpu has those.
"""

from __future__ import annotations

import pytest
import torch

from hybrid_sleep.kernels.mamba2 import mamba2
from hybrid_sleep.kernels.ssd import ssd

pytest.importorskip("triton")

# Imported here, so that `guarded` finds what they allocate with.
from hybrid_sleep.kernels.common.triton_launch import recording
from hybrid_sleep.kernels.mamba2 import triton as _mixer  # noqa: F401
from hybrid_sleep.kernels.ssd import triton as path

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of `wanted` where that is above 1."""
    found, wanted = found.detach().double(), wanted.detach().double()
    assert found.shape == wanted.shape
    worst = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    return float(worst.nan_to_num(float("inf")))


def results(op, inputs, dtype=torch.float64, only=None, guard=None, **options):
    """What op returns by name and its gradients, of one random function of what `only` names."""
    leaves = {name: x.clone().to(dtype).requires_grad_() for name, x in inputs.items()}
    given = leaves if guard is None else {name: guard(x) for name, x in leaves.items()}
    returned = op(**given, **options)
    names = ("o", "S", "q_tail", "kv_tail")
    found = {name: x for name, x in zip(names, returned, strict=False) if x is not None}
    drawn = torch.Generator().manual_seed(1)
    random = {"generator": drawn, "dtype": torch.float64}
    grad_outputs = {name: torch.randn(x.shape, **random) for name, x in found.items()}
    used = [name for name in found if only in (None, name)]
    torch.autograd.backward([found[n] for n in used], [grad_outputs[n].to(dtype) for n in used])
    return found | {f"d{name}": x.grad for name, x in given.items() if x.grad is not None}


def compare(wanted, found, dtype=torch.float64):
    """A gradient that one side leaves out must be zero on the other."""
    for name in wanted.keys() ^ found.keys():
        assert not (wanted | found)[name].any(), name
    both = wanted.keys() & found.keys()
    assert {n: e for n in both if (e := error(found[n], wanted[n])) > TOLERANCE[dtype]} == {}


CASES = {
    "one chunk": dict(T=9, K=5, V=3),
    "one long chunk, large heads": dict(T=64, K=40, V=20, chunk_size=64),
    "two chunks, odd": dict(T=77, K=16, V=33, B=1, G=2, chunk_size=64),
    "three chunks": dict(T=129, K=24, V=16, B=1, chunk_size=100),
    "four short chunks, groups": dict(T=55, K=17, V=16, B=1, G=2, chunk_size=16),
    "chunks of 32": dict(T=70, K=12, V=7, H=1, chunk_size=40),
}


@pytest.mark.parametrize(
    "state, dtype", [(True, torch.float64), (True, torch.float32), (False, torch.float64)]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(make, case, state, dtype):
    inputs = make(ssd, **{"B": 2, "H": 2} | {n: x for n, x in case.items() if n != "chunk_size"})
    if not state:
        del inputs["initial_state"]
    wanted = results(ssd, inputs, impl="reference", scale=0.7)
    chunk_size = case.get("chunk_size")
    found = results(ssd, inputs, dtype, impl="triton", scale=0.7, chunk_size=chunk_size)
    compare(wanted, found, dtype)


@pytest.mark.parametrize("pads", ["left", "anywhere", "a whole row"])
def test_pads_write_nothing_and_leak_nothing(make, guarded, pads):
    B, T = 3, 40
    inputs = make(ssd, B, T, 2, 20, 18)
    mask = torch.rand(B, T) > 0.3
    if pads == "left":
        mask = torch.arange(T) >= torch.tensor([[0], [13], [36]])
    elif pads == "a whole row":
        mask[1] = False
    wanted = results(ssd, inputs, impl="reference", mask=mask)
    for name, x in inputs.items():
        if name != "initial_state":
            inputs[name] = torch.where(mask[(...,) + (None,) * (x.ndim - 2)], x, float("nan"))
    found = results(ssd, inputs, impl="triton", mask=mask, guard=guarded)
    guarded.check()
    compare(wanted, found)
    assert not found["o"][~mask].any()
    for name in ("dq", "dk", "dv", "dg"):
        assert not found[name][~mask].any(), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_segments_change_nothing_and_stay_inside(make, guarded, segments, dtype):
    inputs = make(ssd, 1, 75, 2, 18, 21, G=2)

    def in_segments(q, k, v, g, initial_state):
        return path.ssd(q, k, v, g, initial_state, None, 1.0, 16, True, segments)

    wanted = results(ssd, inputs, impl="reference")
    found = results(in_segments, inputs, dtype, guard=guarded)
    guarded.check()
    compare(wanted, found, dtype)


@pytest.mark.parametrize("segments", [1, 2, 4])
@pytest.mark.parametrize("state", [True, False])
def test_the_state_does_not_depend_on_whether_outputs_are_read(make, segments, state):
    inputs = make(ssd, 1, 90, 2, 16, 20)
    given = [inputs[name].float() for name in ("q", "k", "v", "g", "initial_state")]
    if not state:
        given[-1] = None
    _, S = path.ssd(*given, None, 1.0, 16, True, segments)
    nothing, alone = path.ssd(*given, None, 1.0, 16, False, segments)
    assert nothing is None
    assert torch.equal(S, alone)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("only", ["o", "S"])
def test_a_gradient_from_one_result_alone(make, only, segments):
    inputs = make(ssd, 1, 40, 2, 9, 10)

    def in_segments(q, k, v, g, initial_state):
        return path.ssd(q, k, v, g, initial_state, None, 1.0, 16, True, segments)

    wanted = results(ssd, inputs, impl="reference", only=only)
    compare(wanted, results(in_segments, inputs, only=only))


def test_without_outputs_the_state_has_its_gradients(make):
    inputs = make(ssd, 2, 50, 1, 8, 9)
    wanted = results(ssd, inputs, impl="reference", output=False)
    found = results(ssd, inputs, impl="triton", output=False, chunk_size=16)
    assert "dq" not in found
    compare(wanted, found)


def test_split_is_whole(make):
    inputs = make(ssd, 2, 100, 1, 12, 8)
    o, S = ssd(**inputs, impl="triton")
    state, parts = inputs["initial_state"], []
    for part in (slice(0, 33), slice(33, 34), slice(34, 100)):
        tokens = {n: x[:, part] for n, x in inputs.items() if n != "initial_state"}
        out, state = ssd(**tokens, initial_state=state, impl="triton")
        parts.append(out)
    assert error(torch.cat(parts, 1), o) < 1e-12
    assert error(state, S) < 1e-12


def test_views_with_any_strides_are_read_as_they_are(make):
    inputs = make(ssd, 2, 20, 2, 6, 5)
    wanted = results(ssd, inputs, impl="reference")

    def part_of_a_wider_one(x):
        return torch.cat([x, x], -1)[..., : x.shape[-1]]

    for view in (part_of_a_wider_one, lambda x: x.mT.contiguous().mT):

        def of_views(view=view, **leaves):
            return ssd(**{n: view(x) for n, x in leaves.items()}, impl="triton")

        compare(wanted, results(of_views, inputs))


def test_a_reset_keeps_the_small_decays_that_follow_it(make):
    inputs = make(ssd, 1, 60, 1, 8, 8)
    inputs["g"][:, ::17] = -1e4
    wanted = results(ssd, inputs, impl="reference")
    compare(wanted, results(ssd, inputs, torch.float32, impl="triton"), torch.float32)


def test_segments_fill_a_gpu_only_where_heads_do_not():
    def segments(B, T, H, V=128):
        k, v = torch.empty(B, T, 1, 128, device="meta"), torch.empty(B, T, H, V, device="meta")
        how = path.precision(torch.bfloat16, torch.float32)
        return path.sizes_of(k, v, how).segments

    assert segments(8, 8192, 16) == 1
    assert segments(1, 2048, 8) == 8
    assert segments(1, 2048, 2) == 16
    assert segments(1, 100, 1) == 1


W = 4


def mixer_inputs(B=2, T=20, H=2, G=1, K=6, V=5, width=W, state=True):
    """Keyword arguments of `mamba2` in fp64, all of them tensors."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    key_width, kv_width = G * K, G * K + H * V
    inputs = {
        "q": normal(B, T, key_width),
        "kv": normal(B, T, kv_width),
        "a": normal(B, T, H),
        "q_weight": normal(key_width, width) / 2,
        "kv_weight": normal(kv_width, width) / 2,
        "A_log": normal(H),
        "dt_bias": normal(H),
        "skip": normal(H),
    }
    if state:
        inputs["initial_state"] = normal(B, H, K, V)
        inputs["q_tail"] = normal(B, width - 1, key_width)
        inputs["kv_tail"] = normal(B, width - 1, kv_width)
    return inputs


@pytest.mark.parametrize(
    "state, pads, G, dtype",
    [
        (True, True, 1, torch.float64),
        (True, False, 2, torch.float32),
        (False, True, 2, torch.float32),
        (False, False, 1, torch.float64),
    ],
)
def test_mixer_is_its_parts(guarded, state, pads, G, dtype):
    inputs = mixer_inputs(B=1, T=37, K=10, V=18, G=G, state=state)
    mask = torch.rand(1, 37) > 0.3 if pads else None
    options = {"key_heads": G, "mask": mask}
    wanted = results(mamba2, inputs, impl="reference", **options)
    if pads:
        for name in ("q", "kv", "a"):
            inputs[name] = torch.where(mask[..., None], inputs[name], float("nan"))
    found = results(mamba2, inputs, dtype, impl="triton", guard=guarded, **options)
    guarded.check()
    compare(wanted, found, dtype)
    if pads:
        assert not found["o"][~mask].any()
        assert not found["da"][~mask].any()


@pytest.mark.parametrize("only", ["o", "S"])
def test_mixer_has_a_gradient_from_one_result_alone(only):
    inputs = mixer_inputs(B=1, T=17, H=1)
    wanted = results(mamba2, inputs, impl="reference", key_heads=1, only=only)
    compare(wanted, results(mamba2, inputs, impl="triton", key_heads=1, only=only))


@pytest.mark.parametrize("tails", [True, False])
@pytest.mark.parametrize("T", [1, 19])
def test_mixer_without_outputs(T, tails):
    inputs = mixer_inputs(T=T)
    if not tails:
        inputs["q"] = None
    options = {"key_heads": 1, "output": False, "tails": tails}
    wanted = mamba2(**inputs, impl="reference", **options)
    found = mamba2(**inputs, impl="triton", **options)
    assert found.o is None
    assert error(found.S, wanted.S) < 1e-12
    if not tails:
        assert found.q_tail is None and found.kv_tail is None
    else:
        assert max(error(found[n], wanted[n]) for n in (2, 3)) < 1e-12
        whole = mamba2(**inputs, impl="triton", key_heads=1)
        assert torch.equal(whole.S, found.S)


def test_small_and_large_time_steps_have_gradients():
    inputs = mixer_inputs(B=1, T=24, K=4, V=4)
    inputs["a"] = torch.linspace(-120, 10, 48, dtype=torch.float64).view(1, 24, 2)
    wanted = results(mamba2, inputs, impl="reference", key_heads=1)
    found = results(mamba2, inputs, torch.float32, impl="triton", key_heads=1)
    compare(wanted, found, torch.float32)


@pytest.mark.parametrize(
    "state, G, dtype",
    [(True, 1, torch.float64), (True, 2, torch.float32), (False, 1, torch.float32)],
)
def test_steps_are_the_sequence(guarded, G, state, dtype):
    B, steps = 3, 5
    inputs = mixer_inputs(B, steps, 2, G, K=7, V=18, state=state)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    wanted = mamba2(**inputs, key_heads=G, mask=mask, impl="reference")
    for name in ("q", "kv", "a"):
        inputs[name] = torch.where(mask[..., None], inputs[name], float("nan"))
    given = {name: x.to(dtype) for name, x in inputs.items()}
    carried = {n: given.pop(n) for n in ("initial_state", "q_tail", "kv_tail")} if state else {}
    weights = {n: guarded(x) for n, x in given.items() if n not in ("q", "kv", "a")}
    for t in range(steps):
        token = {n: guarded(given[n][:, t : t + 1]) for n in ("q", "kv", "a")}
        now = guarded(mask[:, t : t + 1])
        carried = {n: guarded(x) for n, x in carried.items()}
        o, S, q_tail, kv_tail = mamba2(
            **token, **weights, **carried, key_heads=G, mask=now, impl="triton"
        )
        guarded.check()
        assert error(o[:, 0], wanted.o[:, t]) < TOLERANCE[dtype]
        carried = {"initial_state": S, "q_tail": q_tail, "kv_tail": kv_tail}
    for name, x in zip(("S", "q_tail", "kv_tail"), carried.values(), strict=True):
        assert error(x, getattr(wanted, name)) < TOLERANCE[dtype], name


def test_a_step_takes_one_launch_and_writes_only_new_tensors():
    inputs = mixer_inputs(T=1)
    with recording() as launches:
        mamba2(**inputs, key_heads=1, impl="triton")
    assert [launch.kernel.name for launch in launches] == ["step"]
    before = {name: x.clone() for name, x in inputs.items()}
    mamba2(**inputs, key_heads=1, impl="triton")
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.parametrize("width", [1, 2])
def test_short_filters(width):
    inputs = mixer_inputs(T=1, width=width)
    found = mamba2(**inputs, key_heads=1, impl="triton")
    wanted = mamba2(**inputs, key_heads=1, impl="reference")
    assert max(map(error, found[:2], wanted[:2])) < 1e-12
    assert all(torch.equal(x, y) for x, y in zip(found[2:], wanted[2:], strict=True))
