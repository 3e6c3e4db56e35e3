"""Accuracy on batches of a task, as lists of examples or as tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.accuracy import Auto, measure_accuracy, parse_depths

TASK = tasks.load("rule110", width=6, states=2, steps=[1, 2, 3])


class Guesses(torch.nn.Module):
    """Predicts the token that came before, or, at an even depth, its opposite."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, sleep_passes, use_cache):
        assert not self.training and not torch.is_grad_enabled() and use_cache is False
        guess = (input_ids == 1).long()
        guess = guess if sleep_passes % 2 else 1 - guess
        return SimpleNamespace(logits=torch.nn.functional.one_hot(guess, 3).float())


def test_tensors_and_examples_are_measured_alike():
    examples = list(TASK.examples("test", 3, 50))
    whole = TASK.batch("test", 3, 50)
    tensors = [{name: rows[i : i + 20] for name, rows in whole.items()} for i in (0, 20, 40)]
    model, calls = Guesses().train(), []
    by_lists = measure_accuracy(
        model, TASK, [examples[:30], examples[30:]], [2, 1], progress=calls.append
    )
    assert model.training and calls == [60, 30, 40, 20]
    by_tensors = measure_accuracy(model, TASK, tensors, [2, 1])
    for depth in (1, 2):
        right = [
            [
                # Position t is predicted from the token at t-1.
                (example["input_ids"][t - 1] == 1) == (label == 1 if depth == 1 else label != 1)
                for t, label in enumerate(example["labels"])
                if label >= 0
            ]
            for example in examples
        ]
        for found in (by_lists[depth], by_tensors[depth]):
            assert found.exact == sum(map(all, right)) / 50
            assert found.per_label == pytest.approx(sum(map(sum, right)) / 100)
            assert found.passes == depth and found.seconds > 0
        assert sum(by_lists[depth].questions.values()) == 50
        assert by_lists[depth].by_difficulty.keys() == by_lists[depth].questions.keys()
        assert by_tensors[depth].by_difficulty == {}
    assert by_lists[1].per_label + by_lists[2].per_label == pytest.approx(1)


@pytest.mark.parametrize("depth", [1, Auto(0.1, 4)])
def test_no_batch_is_refused(depth):
    with pytest.raises(ValueError, match="batches must hold one or more batches of examples"):
        measure_accuracy(Guesses(), TASK, [], [depth])


def test_parse_depths():
    assert parse_depths("1-4") == [1, 2, 3, 4]
    assert parse_depths("8,1,2-3") == [1, 2, 3, 8]
    for wrong in ("", "0-3", "3-1", "1,1", "a", "1-", "-2", "1.5"):
        with pytest.raises(ValueError, match="^depths must be .*, got "):
            parse_depths(wrong)
