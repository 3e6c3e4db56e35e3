"""Gradients through windows and passes: finite differences, the specification, checkpointing."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from oracle import Oracle
from small import Row, gap, small_config, small_ids, small_model
from torch.func import functional_call

from hybrid_sleep.configuration import EVICTIONS, STATE_SPACES

TINY = {
    "vocab_size": 5,
    "hidden_size": 4,
    "intermediate_size": 3,
    "layer_types": ["full_attention", "linear_attention"],
    "num_attention_heads": 2,
    "head_dim": 2,
    "linear_num_value_heads": 1,
    "linear_key_head_dim": 2,
    "linear_value_head_dim": 2,
    "linear_conv_kernel_dim": 2,
    "window": 3,
}
GATES = ("A_log", "dt_bias", "q_conv", "kv_conv", "k_proj.weight", "o_norm.weight")


@pytest.mark.parametrize("schedule", ["context_windows", "every_window"])
@pytest.mark.parametrize(("state_space", "eviction"), [*product(STATE_SPACES, EVICTIONS)])
def test_gradcheck_through_two_sleeping_windows(schedule, state_space, eviction):
    """Three passes over each of two windows; the third predicts."""
    model = small_model(
        **TINY, sleep_schedule=schedule, state_space=state_space, eviction=eviction
    )
    tokens = torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.full((2, 8), -100)
    labels[:, 6:] = 1
    names = [f"model.layers.1.mixer.{name}" for name in GATES]
    held = dict(model.named_parameters())
    held = [held[name].detach().clone().requires_grad_() for name in names]

    def answers(tokens, *parameters):
        out = functional_call(
            model,
            dict(zip(names, parameters, strict=True)),
            (),
            {"inputs_embeds": tokens, "labels": labels, "sleep_passes": 3},
        )
        return out.logits[:, 6:]

    assert torch.autograd.gradcheck(answers, (tokens, *held), fast_mode=True)
    # What the first window says reaches the last one's answers only through sleeps.
    grad = torch.autograd.grad(answers(tokens, *held).square().sum(), tokens)[0]
    assert grad[:, :3].abs().min() > 0


@pytest.mark.parametrize("loop", [None, (0, 1), (1, 3)])
@pytest.mark.parametrize(("state_space", "eviction"), [*product(STATE_SPACES, EVICTIONS)])
def test_gradients_equal_the_specification(state_space, eviction, loop):
    """Backpropagation through the oracle's own loops gives every parameter the same gradient."""
    model = small_model(state_space=state_space, eviction=eviction, loop=loop, window=3)
    ids = small_ids(2, 8)
    weigh = torch.randn(2, 8, model.config.vocab_size, dtype=torch.float64)
    (model(ids, sleep_passes=3).logits * weigh).sum().backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    oracle = Oracle(model.config, weights)
    total = 0
    for b in range(2):
        logits = torch.stack(oracle.read(Row(3).read(ids[b].tolist(), 3).windows).logits)
        total = total + (logits * weigh[b]).sum()
    total.backward()
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        assert parameter.grad is not None and wanted is not None, name
        assert gap(parameter.grad, wanted) <= 1e-9, name


@pytest.mark.parametrize("granularity", ["block", "pass"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_checkpointing_changes_no_gradient(granularity, eviction):
    ids = small_ids(3, 14)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 9:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    for loop, state_space in product((None, (1, 3), (0, 2)), STATE_SPACES):
        model = small_model(
            loop=loop, eviction=eviction, state_space=state_space, sleep_schedule="every_window"
        )
        model.train()
        grads = []
        for choice in (None, granularity, None):
            model.zero_grad()
            model.set_activation_checkpointing(choice)
            out = model(ids, attention_mask=mask, labels=labels, sleep_passes=3)
            out.loss.backward()
            grads.append([out.loss, *(p.grad.clone() for p in model.parameters())])
        for plain, kept, again in zip(*grads, strict=True):
            assert torch.equal(plain, kept)
            assert torch.equal(plain, again)


def test_checkpointing_keeps_less():
    """What is saved for the backward shrinks from none to block to pass."""
    model = small_model(window=12, sleep_schedule="every_window").train()
    ids = small_ids(2, 48)
    kept = []
    for granularity in (None, "block", "pass"):
        model.set_activation_checkpointing(granularity)
        saved: dict[int, int] = {}

        def pack(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(ids, labels=ids, sleep_passes=3)
        kept.append(sum(saved.values()))
        del out
    assert kept[0] > 2 * kept[1]
    assert kept[1] > kept[2]


def test_transformers_checkpointing_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="set_activation_checkpointing"):
        model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="granularity"):
        model.set_activation_checkpointing("layer")
    assert model.model.granularity is None


def test_detach_cuts_the_graph_between_windows():
    model = small_model(small_config(window=3))
    tokens = torch.randn(1, 6, 12, dtype=torch.float64, requires_grad=True)
    for cut in (False, True):
        cache = model(inputs_embeds=tokens[:, :3], sleep_passes=2).past_key_values
        if cut:
            assert cache.detach() is cache
        out = model(inputs_embeds=tokens[:, 3:], past_key_values=cache, sleep_passes=2)
        grad = torch.autograd.grad(out.logits.square().sum(), tokens)[0]
        assert bool(grad[:, :3].any()) is not cut
        assert grad[:, 3:].any()
