"""Which implementation runs, and that it says so."""

from __future__ import annotations

import copy

import pytest
import torch
from marks import slow

from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.short_conv import short_conv
from hybrid_sleep.kernels.ssd import ssd


@pytest.fixture
def registry(monkeypatch):
    """A registry this test may add to."""
    entries = {op: copy.copy(entries) for op, entries in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", entries)
    monkeypatch.setattr(dispatch, "_last", {})


def call(op, **options):
    x = torch.randn(1, options.pop("T", 5), 2, 4)
    if op is short_conv:
        return op(x.flatten(2), torch.randn(8, 3), **options)
    inputs = [x, x, x, -x[..., 0].abs()]
    if op is gated_delta_rule:
        inputs.append(x[..., 0].sigmoid())
    return op(*inputs, **options)


OPS = [gated_delta_rule, ssd, short_conv]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_the_last_path_is_recorded_with_its_reason(registry, op):
    name = op.__name__
    assert dispatch.explain(name)["implementation"] is None
    call(op)
    taken = dispatch.explain(name)
    assert (taken["implementation"], taken["requested"]) == ("chunked", "auto")
    assert taken["call"] == {"device": "cpu", "dtype": "float32", "batch": 1, "tokens": 5}
    call(op, impl="reference")
    taken = dispatch.explain(name)
    assert (taken["implementation"], taken["requested"]) == ("reference", "reference")
    assert [path["op"] for path in dispatch.paths()] == list(dispatch.OPS)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_one_token_is_one_step(registry, op):
    call(op, T=1)
    taken = dispatch.explain(op.__name__)
    assert taken["implementation"] == "reference"
    assert "one token" in taken["reason"]
    assert dispatch.explain(op.__name__, tokens=1)["implementation"] == "reference"
    assert dispatch.explain(op.__name__, tokens=2)["implementation"] == "chunked"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_what_is_not_there_cannot_be_forced(registry, op):
    with pytest.raises(ValueError, match=f"impl of {op.__name__} must be one of .*got 'fast'"):
        call(op, impl="fast")
    registered = {entry.name for entry in dispatch._registry[op.__name__]}
    for name in set(dispatch.NAMES) - registered:
        refused = f"impl of {op.__name__} must be one of 'auto', .*got '{name}'"
        with pytest.raises(ValueError, match=refused):
            call(op, impl=name)
        # What another package has for other ops is not even named.
        missing = "not implemented" if name in dispatch.OWN else None
        assert dispatch.explain(op.__name__)["candidates"].get(name) == missing
    assert dispatch.explain(op.__name__)["implementation"] is None


def test_an_implementation_says_why_it_cannot_run(registry):
    dispatch._registry["ssd"] = [
        entry for entry in dispatch._registry["ssd"] if entry.name != "triton"
    ]
    ran = []

    def run(*args):
        ran.append(args)
        return None, None

    dispatch.register(
        "ssd",
        "triton",
        run,
        rank=1000,
        wants=lambda call: "fastest here",
        rejects=lambda call: "fewer than 16 tokens" if call.tokens < 16 else None,
    )
    with pytest.raises(ValueError, match="impl of ssd must .*got 'triton': fewer than 16 tokens"):
        call(ssd, impl="triton")
    call(ssd)
    taken = dispatch.explain("ssd")
    assert taken["implementation"] == "chunked"
    assert taken["candidates"]["triton"] == "fewer than 16 tokens"
    assert not ran
    call(ssd, T=16)
    assert len(ran) == 1
    assert dispatch.explain("ssd")["reason"] == "fastest here"
    assert dispatch.explain("ssd")["candidates"]["chunked"] == "triton is preferred"


def test_registering_refuses_what_nothing_could_name(registry):
    options = {"run": print, "rank": 0, "wants": lambda call: None}
    with pytest.raises(ValueError, match="op must be one of .*'ssd', .*got 'attention'"):
        dispatch.register("attention", "triton", **options)
    with pytest.raises(ValueError, match="name must be one of 'reference', 'chunked'.*got 'numba'"):
        dispatch.register("ssd", "numba", **options)
    with pytest.raises(ValueError, match="name must be one that ssd .* not .* yet, got 'chunked'"):
        dispatch.register("ssd", "chunked", **options)
    with pytest.raises(ValueError, match="op must be one of .*got 'attention'"):
        dispatch.explain("attention")


def test_nothing_that_takes_a_call_is_an_error(registry):
    dispatch._registry["ssd"] = []
    with pytest.raises(RuntimeError, match="no implementation of ssd takes"):
        call(ssd)


@pytest.mark.parametrize(("T", "pads"), [(40, True), (1, False), slow(40, False), slow(1, True)])
def test_every_op_compiles_into_one_graph(registry, T, pads):
    """With its gradient; the graph runs eagerly, so that no compiler is needed."""
    mask = torch.rand(2, T) > 0.3 if pads else None

    def ops(x, weight):
        y, tail = short_conv(x, weight, mask=mask)
        q, k, v = y.unflatten(2, (3, 2, 4)).unbind(2)
        g, beta = -q[..., 0].abs(), q[..., 1].sigmoid()
        o, S = gated_delta_rule(q, k, v, g, beta, mask=mask)
        o, S = ssd(o, q, v, g, mask=mask, initial_state=S)
        _, S = gated_delta_rule(k, k, v, g, beta, mask=mask, initial_state=S, output=False)
        return o.sum() + S.sum() + tail.sum()

    leaves = [torch.randn(2, T, 24, requires_grad=True), torch.randn(24, 4, requires_grad=True)]
    torch._dynamo.reset()
    compiled = torch.compile(ops, backend="eager", fullgraph=True)
    found, wanted = compiled(*leaves), ops(*leaves)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(result, leaves) for result in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
