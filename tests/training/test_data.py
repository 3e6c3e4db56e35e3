"""Batches of a task: the same steps for any number of processes and micro-batches."""

import pytest
import torch

from hybrid_sleep.eval import tasks
from hybrid_sleep.training.data import TaskBatches, derive_seed, labelled_columns


class Small(tasks.Rule110):
    """Ten examples from one seed, so that a step takes several blocks, the last one cut."""

    block = 10


@pytest.fixture(scope="module")
def task():
    return Small(width=16, states=2, steps=1)


def steps_of(task, world: int, accumulate: int) -> list[torch.Tensor]:
    """The examples of three steps, in the order of micro-batch and rank."""
    shares = [
        TaskBatches(
            task,
            length=3 * accumulate,
            size=24 // (world * accumulate),
            seed=5,
            rank=rank,
            world=world,
            accumulate=accumulate,
        )
        for rank in range(world)
    ]
    return [
        torch.cat(
            [
                share[step * accumulate + part]["input_ids"]
                for part in range(accumulate)
                for share in shares
            ]
        )
        for step in range(3)
    ]


def test_cells_are_drawn_from_seeds_of_their_own(task):
    (first, second, _) = steps_of(task, 1, 1)
    by_hand = [
        task.batch("train", derive_seed("train", 5, step, block), count)["input_ids"]
        for step in (0, 1)
        for block, count in enumerate((10, 10, 4))
    ]
    assert torch.equal(torch.cat([first, second]), torch.cat(by_hand))
    assert len({tuple(row) for row in torch.cat([first, second]).tolist()}) == 48


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 4), (3, 2), (4, 3), (24, 1)])
def test_steps_do_not_depend_on_how_they_are_shared(task, world, accumulate):
    whole = steps_of(task, 1, 1)
    assert all(map(torch.equal, steps_of(task, world, accumulate), whole))


def test_an_item_is_the_same_whatever_was_read_before(task):
    items = TaskBatches(task, length=12, size=6, seed=0, rank=1, world=2, accumulate=2)
    in_order = [items[i]["labels"] for i in range(12)]
    backwards = [items[i]["labels"] for i in reversed(range(12))]
    assert all(map(torch.equal, in_order, reversed(backwards)))
    with pytest.raises(IndexError, match="batch must be in 0..11, got 12"):
        items[12]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 3)])
def test_groups_have_the_same_contexts_one_below_other(world, accumulate):
    class Few(tasks.Ancestor):
        block = 5

    task = Few(nodes=16, hops=(1, 2, 4))
    groups = [(1,), (2, 4), None]
    size = 12 // (world * accumulate)
    plain, grouped = (
        [
            TaskBatches(
                task, length=accumulate, size=size, seed=1, rank=rank, world=world,
                accumulate=accumulate, asked=asked,
            )
            for rank in range(world)
        ]
        for asked in (lambda step: (None,), lambda step: groups)
    )  # fmt: skip
    for part in range(accumulate):
        for rank in range(world):
            whole = plain[rank][part]["input_ids"]
            batch = grouped[rank][part]
            for asked, ids in zip(groups, batch["input_ids"].chunk(3), strict=True):
                assert torch.equal(ids[:, : 2 * task.nodes], whole[:, : 2 * task.nodes])
                hops = {k for row in ids.tolist() for k, _, _ in task.parse(row)["queries"]}
                assert hops == set(asked or (1, 2, 4))
            assert torch.equal(batch["input_ids"][-size:], whole)
            assert batch["labels"].shape == batch["input_ids"].shape


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 2)])
def test_examples_that_ask_about_one_context_stand_in_groups_of_their_own(world, accumulate):
    task = tasks.load("ancestor", nodes=16, hops=(1, 2), queries=3, apart=True)
    size = 24 // (world * accumulate)
    seen = []
    for rank in range(world):
        batches = TaskBatches(
            task, length=accumulate, size=size, seed=1, rank=rank, world=world,
            accumulate=accumulate, asked=lambda step: [(1,), (1, 2)],
        )  # fmt: skip
        assert batches.depths((1, 4)) == (1, 1, 1, 4, 4, 4)
        assert batches.depths(2) == (2, 2, 2)
        for part in range(accumulate):
            groups = batches[part]["input_ids"].chunk(6)
            assert all(torch.equal(g[:, :32], groups[0][:, :32]) for g in groups)
            assert len({tuple(row) for row in groups[0][:, :32].tolist()}) == size // 3
            assert set(torch.cat(groups[:3])[:, 32].tolist()) == {16}
            seen += torch.cat(groups[:3]).tolist()
    by_hand = task.only(1).batch("train", derive_seed("train", 1, 0, 0), 24)["input_ids"]
    assert sorted(seen) == sorted(by_hand.tolist())
    with pytest.raises(ValueError, match="size must be a multiple of the 3 examples .*, got 8"):
        TaskBatches(task, length=1, size=8)


@pytest.mark.parametrize(
    ("labels", "others", "kept"),
    [
        # Column 3 is predicted from column 2, the third of the last three.
        ([[-100, -100, -100, 7, -100], [-100, -100, -100, -100, 7]], {}, 3),
        ([[-100, 7, -100, -100, -100]], {}, None),
        ([[7, -100, -100, -100, 7]], {}, None),
        ([[-100] * 5], {}, None),
        ([[-100, -100, -100, -100, 7]], {"attention_mask": torch.ones(1, 5)}, None),
        (None, {}, None),
    ],
)
def test_the_columns_whose_logits_labels_need(labels, others, kept):
    given = {} if labels is None else {"labels": torch.tensor(labels)}
    assert labelled_columns({**given, **others}) == kept
