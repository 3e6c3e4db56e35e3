"""Accuracy by depth: scripted models whose accuracy is known, and a real one asked by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.measure.accuracy import measure_auto, measure_depth

TASK = tasks.load("rule110", width=6, states=2, steps=3)


class Scripted(torch.nn.Module):
    """Knows Rule 110, but takes one step of it a pass: right at depth `steps`, and only there."""

    def __init__(self, task, wrong_rows=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.task, self.wrong_rows, self.seen, self.modes = task, wrong_rows, [], []

    def forward(self, input_ids, sleep_passes, use_cache=None, labels=None):
        assert labels is None and not torch.is_grad_enabled()
        self.modes.append(self.training)
        self.seen.append((len(input_ids), sleep_passes))
        separator = self.task.width * self.task.states
        # The last label must not go in; all before it must.
        assert input_ids.shape[1] == self.task.length - 1
        assert (input_ids[:, separator] == 2).all()
        logits = torch.zeros(*input_ids.shape, 3)
        for row, tokens in enumerate(input_ids.tolist()):
            for state in range(self.task.states):
                ring = tokens[state * self.task.width : (state + 1) * self.task.width]
                answer = self.task.rollout(ring, sleep_passes)[0]
                logits[row, separator + state, answer] = 1
        logits[: self.wrong_rows] = logits[: self.wrong_rows].roll(1, dims=-1)
        return SimpleNamespace(logits=logits)


def test_a_model_that_needs_three_passes_is_right_at_depth_three_only():
    model = Scripted(TASK)
    model.train()
    result = measure_depth(model, TASK, [3, 1, 2], count=70, seed=5, batch_size=32)
    assert list(result) == [1, 2, 3]
    assert result[3].exact == result[3].per_label == 1.0
    for wrong in (1, 2):
        rows = TASK.examples("test", 5, 70)
        agree = [
            [
                TASK.rollout(ring, wrong)[0] == TASK.rollout(ring)[0]
                for ring in ex["meta"]["context"]
            ]
            for ex in rows
        ]
        assert result[wrong].exact == pytest.approx(sum(all(row) for row in agree) / 70)
        assert result[wrong].per_label == pytest.approx(sum(sum(row) for row in agree) / 140)
        assert result[wrong].exact < 1
    assert model.training and not any(model.modes)
    # One untimed forward, then every batch at every depth.
    assert model.seen[1:] == [(n, d) for n in (32, 32, 6) for d in (1, 2, 3)]
    assert all(seconds > 0 for seconds in (accuracy.seconds for accuracy in result.values()))


def test_one_wrong_row_in_each_batch_shows():
    model = Scripted(TASK, wrong_rows=1)
    result = measure_depth(model, TASK, [3], count=60, batch_size=20)
    assert result[3].exact == pytest.approx(57 / 60)


def test_progress_ends_complete():
    calls = []
    measure_depth(
        Scripted(TASK), TASK, [1, 3], count=10, batch_size=4,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (40, 40)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def tiny_model(window=6):
    config = HybridSleepConfig(
        vocab_size=3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        window=window,
        initializer_range=0.6,
    )
    torch.manual_seed(3)
    return HybridSleepForCausalLM(config).eval()


def test_accuracy_is_that_of_answering_freely():
    """`exact` from one forward equals generating the answers token by token, at every depth."""
    model, count = tiny_model(), 24
    result = measure_depth(model, TASK, [1, 2, 4], count=count, seed=1, batch_size=10)
    for passes in (1, 2, 4):
        right = 0
        for example in TASK.examples("test", 1, count):
            prompt = torch.tensor([example["input_ids"][: -TASK.states]])
            answer = model.generate(
                prompt, max_new_tokens=TASK.states, do_sample=False, sleep_passes=passes
            )[0, prompt.shape[1] :]
            right += answer.tolist() == example["meta"]["answers"]
        assert result[passes].exact == pytest.approx(right / count)
    assert 0 < sum(accuracy.exact for accuracy in result.values()) < 3


def test_depth_reaches_the_model():
    ids = TASK.batch("test", 0, 8)["input_ids"]
    model = tiny_model()
    with torch.no_grad():
        logits = [model(input_ids=ids[:, :-1], sleep_passes=n).logits[:, -2:] for n in (1, 2, 3)]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])


def test_adaptive_depth_between_two_passes_and_the_deepest():
    task = tasks.load("rule110", width=4, states=2, steps=[0, 1])
    torch.manual_seed(0)
    config = load_config_model(task)
    model = HybridSleepForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    fixed = measure_depth(model, task, [2, 5], 60)
    found = measure_auto(model, task, [1e9, 1e-9], max_passes=5, count=60, batch_size=25)
    # Everything changes by less than 1e9 in pass 2, and nothing by less than 1e-9.
    for tolerance, passes in ((1e9, 2), (1e-9, 5)):
        assert found[tolerance].passes == passes
        assert found[tolerance].per_question == fixed[passes].per_question
        assert found[tolerance].by_difficulty == fixed[passes].by_difficulty


def load_config_model(task):
    return HybridSleepConfig(
        vocab_size=task.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, window=task.window,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depths": [0]}, r"depths must be .* at least 1, got 0"),
        ({"depths": [1, 1]}, r"distinct"),
        ({"depths": []}, r"one or more"),
        ({"depths": [2.0]}, r"depths must be .*, got 2\.0"),
        ({"count": 0}, r"count must be .*, got 0"),
        ({"batch_size": 0}, r"batch_size must be .*, got 0"),
        ({"seed": -1}, r"seed must be .*, got -1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        measure_depth(Scripted(TASK), TASK, **{"depths": [1], "count": 4, **change})
