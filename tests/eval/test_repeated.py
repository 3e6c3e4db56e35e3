"""Windows written several times: what stands where, and that all else is the task's own."""

from __future__ import annotations

import pytest
import torch

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.base import Task
from hybrid_sleep.eval.tasks.repeated import Repeated
from hybrid_sleep.training.config import run_config

TASKS = [
    ("rule110", {"width": 5, "states": 2, "steps": [0, 1]}),
    ("depo", {"nodes": 7, "hops": 2, "queries": 1, "alphabet": 9, "shortest": 1, "longest": 1}),
    ("circuit", {"wires": 2, "levels": 3, "windows": 2, "asked": 3}),
    ("word_problem", {"group": "S3", "elements": 12, "windows": 2, "prefixes": [12]}),
]


@pytest.mark.parametrize(("name", "params"), TASKS)
def test_each_window_of_the_context_stands_there_so_often(name, params):
    task = tasks.load(name, **params)
    thrice = Repeated(task, 3)
    own = task.window
    for split in tasks.SPLITS:
        pairs = zip(task.examples(split, 4, 6), thrice.examples(split, 4, 6), strict=True)
        for one, other in pairs:
            first = next(t for t, label in enumerate(one["labels"]) if label != -100)
            windows = first // own
            assert thrice.window == 3 * own
            assert len(other["input_ids"]) == len(other["labels"]) == thrice.length
            for n in range(windows):
                window = one["input_ids"][n * own : (n + 1) * own]
                for copy in range(3):
                    at = (3 * n + copy) * own
                    assert other["input_ids"][at : at + own] == window
            assert other["input_ids"][3 * windows * own :] == one["input_ids"][windows * own :]
            assert other["labels"][3 * windows * own :] == one["labels"][windows * own :]
            assert set(other["labels"][: 3 * windows * own]) == {-100}
            assert other["meta"] == one["meta"]
            assert thrice.parse(other["input_ids"]) == task.parse(one["input_ids"])
            assert thrice.describe(other) == task.describe(one)
        batch = thrice.batch(split, 4, 6)
        examples = list(thrice.examples(split, 4, 6))
        for key in ("input_ids", "labels"):
            assert batch[key].tolist() == [e[key] for e in examples]
        right = [[label for label in e["labels"]] for e in examples]
        assert thrice.score(right, examples)["exact"] == 1
    assert (thrice.floor(), thrice.majority(), thrice.chance()) == (
        task.floor(), task.majority(), task.chance(),
    )  # fmt: skip


def test_limited_to_one_difficulty():
    task = Repeated(tasks.load("rule110", width=5, states=2, steps=[0, 1]), 2)
    hard = task.only(1)
    assert list(hard.floor()) == [1] and hard.window == 10
    assert {e["meta"]["difficulty"] for e in hard.examples("test", 0, 9)} == {1}


def test_a_run_config_repeats():
    content = {
        "model": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        "task": {"name": "rule110", "params": {"width": 5, "states": 2, "steps": 1}, "repeats": 4},
        "sleep_passes": 1,
        "train": {"steps": 1, "batch_size": 2},
        "output_dir": "out",
    }  # fmt: skip
    run = run_config(content)
    assert run.model_config().window == 20 and run.load_task().length == 40 + 3
    assert run_config(run.to_dict()).load_task().length == 43
    once = run_config({**content, "task": {**content["task"], "repeats": 1}})
    assert once.model_config().window == 5 and not isinstance(once.load_task(), Repeated)
    with pytest.raises(ValueError, match="task.repeats must be an integer of at least 1, got 0"):
        run_config({**content, "task": {**content["task"], "repeats": 0}})
    tagged = {"name": "parity", "params": {"elements": 24, "layout": "tagging"}, "repeats": 2}
    with pytest.raises(ValueError, match="times must be 1 for a task whose first label, at 1"):
        run_config({**content, "task": tagged})


def test_what_was_not_repeated_is_refused():
    task = Repeated(tasks.load("rule110", width=5, states=2, steps=1), 2)
    ids = next(task.examples("test", 0, 1))["input_ids"]
    with pytest.raises(ValueError, match="must hold each window of 5 tokens 2 times"):
        task.parse([1 - ids[0], *ids[1:]])


def test_labels_in_some_contexts_are_refused():
    class Uneven(Task):
        """The second example has a label in its first window."""

        name, difficulty = "uneven", "none"
        vocab_size, length, window, params = 2, 6, 2, {}

        def _examples(self, split, seed, count):
            for at in range(count):
                labels = [-100] * 4 + [1, 1]
                labels[0] = 1 if at else -100
                yield {"input_ids": [0] * 6, "labels": labels}

        def _batch(self, split, seed, count):
            labels = [example["labels"] for example in self._examples(split, seed, count)]
            return {"input_ids": torch.zeros(count, 6).long(), "labels": torch.tensor(labels)}

        parse = floor = majority = chance = None

    task = Repeated(Uneven(), 2)
    with pytest.raises(ValueError, match="times must be 1 for a task with labels among the first"):
        list(task.examples("train", 0, 2))
    with pytest.raises(ValueError, match="times must be 1 for a task with labels among the first"):
        task.batch("train", 0, 2)
