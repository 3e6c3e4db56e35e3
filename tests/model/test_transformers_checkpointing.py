"""transformers' switches for activation checkpointing, as Trainer, trl and peft turn them."""

from __future__ import annotations

import pytest
import torch
from small import small_ids, small_model

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.sleep.checkpointing import Checkpointing

IDS = small_ids(2, 13)


def step(model: HybridSleepForCausalLM) -> dict[str, torch.Tensor]:
    """The gradients of a training step with sleeps between windows."""
    model.train().zero_grad()
    labels = IDS.clone()
    labels[:, :10] = -100
    model(IDS, labels=labels).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "enable",
    [
        lambda m: m.gradient_checkpointing_enable(),
        lambda m: m.activation_checkpointing_enable(),
        lambda m: m.gradient_checkpointing_enable({"use_reentrant": True}),
        lambda m: m.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=1),
    ],
)
def test_what_turns_it_on_and_off_is_our_own(enable):
    model = small_model()
    assert model.supports_gradient_checkpointing and not model.is_activation_checkpointing
    enable(model)
    assert model.is_activation_checkpointing and model.model.is_activation_checkpointing
    assert model.model.checkpointing == Checkpointing(group=1)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    model.model.gradient_checkpointing_enable()
    assert model.is_activation_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("own", [{"distinct_layers": 2}, {"distinct_passes": 3}])
def test_gradients_are_the_same_bits(eviction, own):
    model = small_model(sleep_passes=3, eviction=eviction, loop=(1, 3), **own)
    want = step(model)
    model.gradient_checkpointing_enable()
    got = step(model)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_what_is_set_already_stays():
    model = small_model()
    model.set_activation_checkpointing("window")
    model.gradient_checkpointing_enable()
    assert model.model.checkpointing == Checkpointing(window=True)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"gradient_checkpointing_kwargs": {"context_fn": None}}, "context_fn=None"),
        ({"gradient_checkpointing_kwargs": {"selective": True}}, "selective=True"),
        ({"every_n_layers": 2}, "every_n_layers=2"),
        ({"offload": True}, "offload=True"),
    ],
)
def test_what_means_nothing_here_is_refused(given, named):
    model = small_model()
    with pytest.raises(ValueError, match=f"{named}: the model .*set_activation_checkpointing"):
        model.gradient_checkpointing_enable(**given)
    assert not model.is_activation_checkpointing


def test_frozen_embeddings_that_require_gradients_learn_the_same():
    """What peft does before adapters are trained: everything frozen, inputs that require grad."""
    gradients = []
    for enable in (False, True):
        model = small_model(sleep_passes=2)
        model.requires_grad_(False)
        model.model.layers[0].mixer.q_proj.requires_grad_(True)
        if enable:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        gradients.append(step(model))
    assert list(gradients[0]) == ["model.layers.0.mixer.q_proj.weight"] == list(gradients[1])
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])
