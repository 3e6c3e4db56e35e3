"""A whole model on the Triton kernels, in the interpreter, against the PyTorch paths."""

from __future__ import annotations

import contextlib

import pytest
import torch
from marks import slow
from small import small_model

from hybrid_sleep.kernels.common import dispatch, triton_paths

pytestmark = pytest.mark.skipif(
    not triton_paths.interpreting(), reason="needs Triton's interpreter"
)


@contextlib.contextmanager
def on_triton():
    """Every mixer and norm within the block is a Triton kernel."""
    with contextlib.ExitStack() as stack:
        for op in ("gated_delta_net", "mamba2", "gated_norm"):
            stack.enter_context(dispatch.forced(op, "triton"))
        yield


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(params=["gated_deltanet", slow("mamba2")])
def model(request):
    return small_model(state_space=request.param, window=7, sleep_attention="causal").double()


def read(model, ids, mask):
    out = model(ids, attention_mask=mask, sleep_passes=3)
    return out.logits, out.cache


@torch.no_grad()
def test_reading_sleeping_and_generating(model):
    ids, mask = torch.randint(11, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[1, :2] = 0
    wanted, cache = read(model, ids, mask)
    report = model.sleep(cache, passes=3)
    with on_triton():
        found, other = read(model, ids, mask)
        again = model.sleep(other, passes=3)
        assert dispatch.explain("gated_norm")["implementation"] == "triton"
    assert relative(found[mask.bool()], wanted[mask.bool()]) < 1e-10
    assert again.tokens == report.tokens
    for layer, S in cache.fast_weights.items():
        assert relative(other.fast_weights[layer], S) < 1e-10
        for one, two in zip(again.change[layer], report.change[layer], strict=True):
            assert one == pytest.approx(two, rel=1e-6)
    options = {"max_new_tokens": 4, "do_sample": False, "sleep_passes": 2}
    text = model.generate(ids[:1, :5], **options)
    with on_triton():
        assert torch.equal(model.generate(ids[:1, :5], **options), text)


@pytest.mark.slow
def test_gradients_through_sleeps(model):
    model.train()
    ids = torch.randint(11, (2, 18))
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = ids[:, -4:]
    grads = []
    for context in (contextlib.nullcontext(), on_triton()):
        model.zero_grad()
        with context:
            model(ids, labels=labels, sleep_passes=3).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    wanted, found = grads
    assert {n: e for n, x in wanted.items() if not (e := relative(found[n], x)) < 1e-8} == {}
