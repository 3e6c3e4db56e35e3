"""Gradients at the passes of a sleep, against differences of the loss."""

from __future__ import annotations

import pytest
import torch
from small import TINY

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.measure.gradients import gradient_norms

TASK = tasks.load("rule110", width=4, states=2, steps=1)


def model_of(**changes):
    torch.manual_seed(0)
    sizes = {**TINY, "hidden_size": 8, "initializer_range": 0.3, **changes}
    config = HybridSleepConfig(vocab_size=TASK.vocab_size, **{"window": TASK.window, **sizes})
    return HybridSleepForCausalLM(config).double()


def losses_with(model, example, passes, call, shifts):
    """The loss of `example` when one of `shifts: [n, T, D]` is added to what goes into the first
    looped block at its `call`, [n]."""
    calls = []

    def add(block, arguments):
        calls.append(block)
        h, *rest = arguments
        return (h + shifts if len(calls) == call else h, *rest)

    start, end = model.model.options.loop
    first, later = model.model.blocks[start], model.model.later_layers[:: end - start]
    hooks = [block.register_forward_pre_hook(add) for block in (first, *later)]
    batch = {name: x.expand(len(shifts), -1) for name, x in example.items()}
    with torch.no_grad():
        logits = model(**batch, sleep_passes=passes, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    # The model's own loss is in fp32, and one of all rows.
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none"
    )
    return loss.sum(1) / (example["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, [1, 2, 3]),
        ({"sleep_carry": "fast_weights"}, [1, 2, 3]),
        # Layers 0 and 2 are one, and so are 1 and 3: two calls in each pass.
        ({"num_hidden_layers": 4, "layer_types": None, "distinct_layers": 2}, [1, 3, 5]),
        ({"num_hidden_layers": 3, "layer_types": None, "loop": [1, 3]}, [1, 2, 3]),
        ({"distinct_passes": 2}, [1, 2, 3]),
        # Layers 0 and 2 are one, so pass 1 takes two calls.
        (
            {"num_hidden_layers": 4, "layer_types": None, "distinct_layers": 2,
             "distinct_passes": 3},
            [1, 3, 4],
        ),
    ],
)
def test_norms_are_those_of_differences_of_the_loss(changes, calls):
    model, passes, eps = model_of(**changes), 3, 1e-5
    example = TASK.batch("train", 5, 1)
    found = gradient_norms(model, TASK, passes, count=1, seed=5)
    entries = TASK.window * model.config.hidden_size
    shifts = eps * torch.eye(entries, dtype=torch.float64).view(entries, TASK.window, -1)
    for call, norm in zip(calls, found, strict=True):
        up, down = (losses_with(model, example, passes, call, sign * shifts) for sign in (1, -1))
        assert norm == pytest.approx(float(((up - down) / (2 * eps)).norm()), rel=1e-5)
    assert len({round(norm, 12) for norm in found}) == passes and min(found) > 1e-9


def test_the_model_is_left_as_it_was():
    model = model_of().train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norms = gradient_norms(model, TASK, 2)
    assert model.training and all((p.grad == 1).all() for p in model.parameters())
    assert gradient_norms(model.requires_grad_(False), TASK, 2) == pytest.approx(norms, rel=1e-9)
    with pytest.raises(ValueError, match="passes must be an integer of at least 1, got 0"):
        gradient_norms(model, TASK, 0)


def test_a_window_that_does_not_sleep_is_refused():
    model = model_of(window=64)
    with pytest.raises(ValueError, match="task must have a first window that sleeps, got .* of 64"):
        gradient_norms(model, TASK, 2)
