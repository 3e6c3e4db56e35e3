"""Gradients through windows and passes: finite differences, the specification, checkpointing."""

from __future__ import annotations

import pytest
import torch
from marks import halved
from small import Row, gap, small_config, small_ids, small_model
from torch.func import functional_call

from hybrid_sleep.configuration import STATE_SPACES
from hybrid_sleep.sleep.minimal import MinimalModel
from hybrid_sleep.sleep.options import EVICTIONS

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


@pytest.mark.parametrize(
    ("schedule", "state_space", "eviction"),
    halved(["context_windows", "every_window"], STATE_SPACES, EVICTIONS),
)
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


@pytest.mark.parametrize(
    ("loop", "state_space", "eviction"), halved([None, (0, 1), (1, 3)], STATE_SPACES, EVICTIONS)
)
def test_gradients_equal_the_specification(state_space, eviction, loop):
    """Backpropagation through the oracle's own loops gives every parameter the same gradient."""
    model = small_model(state_space=state_space, eviction=eviction, loop=loop, window=3)
    ids = small_ids(2, 8)
    weigh = torch.randn(2, 8, model.config.vocab_size, dtype=torch.float64)
    (model(ids, sleep_passes=3).logits * weigh).sum().backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    oracle = MinimalModel(model.config, weights)
    total = 0
    for b in range(2):
        logits = torch.stack(oracle.read(Row(3).read(ids[b].tolist(), 3).windows).logits)
        total = total + (logits * weigh[b]).sum()
    total.backward()
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        assert parameter.grad is not None and wanted is not None, name
        assert gap(parameter.grad, wanted) <= 1e-9, name


def test_detach_cuts_the_graph_between_windows():
    model = small_model(small_config(window=3))
    tokens = torch.randn(1, 6, 12, dtype=torch.float64, requires_grad=True)
    for cut in (False, True):
        cache = model(inputs_embeds=tokens[:, :3], sleep_passes=2).cache
        if cut:
            assert cache.detach() is cache
        out = model(inputs_embeds=tokens[:, 3:], cache=cache, sleep_passes=2)
        grad = torch.autograd.grad(out.logits.square().sum(), tokens)[0]
        assert bool(grad[:, :3].any()) is not cut
        assert grad[:, 3:].any()
