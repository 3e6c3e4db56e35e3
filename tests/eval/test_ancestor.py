"""Ancestors: by hand and by walking, floors by another count, orders, splits that are apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from hybrid_sleep.eval import tasks

VARIANTS = [
    {},
    {"nodes": 12, "hops": [3, 1], "order": "random", "queries": 3},
    {"nodes": 9, "hops": 8, "back": 1, "windows": 2, "queries": 4},
    {"nodes": 40, "hops": [1, 5], "back": 7, "order": "random", "windows": 2},
    {"nodes": 12, "hops": [1, 2], "queries": 5, "compound": True},
    {"nodes": 10, "hops": [4, 17, 2], "order": "random", "back": None, "queries": 4},
    {"nodes": 8, "hops": [2, 8], "order": "random", "back": None, "queries": 7, "compound": True},
]


def by_params(params):
    return ",".join(f"{key}={value}" for key, value in params.items()) or "default"


def test_a_tree_worked_out_by_hand():
    """5 is the root; 2 and 0 point to it, 7 to 2, 3 to 7, 1 to 0, 4 to 3, 6 to 4."""
    task = tasks.load("ancestor", nodes=8, hops=[1, 2, 3], back=2, queries=3)
    assert (task.vocab_size, task.window, task.length) == (12, 16, 23)
    tree = [5, 5, 2, 5, 0, 5, 7, 2, 3, 7, 1, 0, 4, 3, 6, 4]
    tokens = [*tree, 10, 4, 8, 1, 9, 6, 11]
    assert task.parse(tokens) == {
        "pointers": [(5, 5), (2, 5), (0, 5), (7, 2), (3, 7), (1, 0), (4, 3), (6, 4)],
        "queries": [(3, 4, 2), (1, 1, 0), (2, 6, 3)],
    }
    assert task.describe({"input_ids": tokens}) == (
        "pointers: 5 to 5, 2 to 5, 0 to 5, 7 to 2, 3 to 7, 1 to 0, 4 to 3, 6 to 4\n"
        "3 hops above 4: 2\n1 hop above 1: 0\n2 hops above 6: 3"
    )


def test_a_cycle_of_compound_tokens_worked_out_by_hand():
    """3 to 1 to 0 to 7 to 5 to 2 to 6 to 4 to 3; first digits 8, 9 ask, 10 answers, 11 stops."""
    task = tasks.load(
        "ancestor", nodes=8, hops=[1, 4], order="random", back=None, queries=2, compound=True
    )
    assert task.token_fields == [12, 8]
    assert (task.vocab_size, task.window, task.length) == (96, 8, 11)
    pointers = [(2, 6), (0, 7), (3, 1), (6, 4), (5, 2), (1, 0), (7, 5), (4, 3)]
    tokens = [*(8 * node + points for node, points in pointers), 8 * 9 + 1, 8 * 8 + 6, 88]
    assert task.parse(tokens) == {"pointers": pointers, "queries": [(4, 1, 2), (1, 6, 4)]}
    for place, token in ((0, 17), (1, 2), (3, 8 * 6 + 5), (8, 8 * 10), (9, 3), (10, 80)):
        with pytest.raises(ValueError, match="input_ids must be 8 pointers that make a cycle"):
            task.parse([*tokens[:place], token, *tokens[place + 1 :]])
    two_cycles = [(2, 6), (6, 4), (4, 2), (0, 7), (7, 5), (5, 3), (3, 1), (1, 0)]
    with pytest.raises(ValueError, match="a cycle"):
        task.parse([*(8 * node + points for node, points in two_cycles), *tokens[8:]])


@pytest.mark.parametrize("compound", [True, False])
@pytest.mark.parametrize("back", [None, 2])
def test_questions_apart_are_those_together(back, compound):
    params = {"nodes": 12, "hops": [1, 2], "order": "random", "back": back, "compound": compound}
    whole = tasks.load("ancestor", queries=5, **params)
    alone = tasks.load("ancestor", queries=5, apart=True, **params)
    assert (whole.together, alone.together, alone.block % 5) == (1, 5, 0)
    made = [alone.parse(e["input_ids"]) for e in alone.examples("train", 4, 18)]
    asked = [whole.parse(e["input_ids"]) for e in whole.examples("train", 4, 4)]
    for row, one in enumerate(made):
        assert one["pointers"] == asked[row // 5]["pointers"]
        assert one["queries"] == [asked[row // 5]["queries"][row % 5]]
    for example in alone.examples("train", 4, 18):
        assert sum(label >= 0 for label in example["labels"]) == 1
        assert len(example["meta"]["difficulty"]) == 1
    # Nothing was asked before: one node is as likely as another, but for the one that is asked of.
    assert alone.floor() == pytest.approx(dict.fromkeys((1, 2), 1 / 11))
    assert alone.only(2).together == 5


@pytest.mark.parametrize("back", [None, 2])
def test_compound_tokens_say_what_two_tokens_say(back):
    params = {"nodes": 12, "hops": [1, 2], "order": "random", "back": back, "queries": 5}
    two, one = tasks.load("ancestor", **params), tasks.load("ancestor", compound=True, **params)
    pairs = zip(two.examples("train", 4, 20), one.examples("train", 4, 20), strict=True)
    for spelled, compound in pairs:
        assert two.parse(spelled["input_ids"]) == one.parse(compound["input_ids"])
        assert spelled["meta"]["difficulty"] == compound["meta"]["difficulty"]
    assert two.floor() == one.floor()
    assert two.majority().exact == one.majority().exact
    assert (two.majority().guess, one.majority().guess) == ((0,), (14 * 12,))


def test_the_floor_of_a_cycle_and_its_every_node():
    task = tasks.load("ancestor", nodes=8, hops=[1, 8, 3], order="random", back=None, queries=2)
    assert task.floor() == {1: 1 / 7, 3: 1 / 7, 8: 1.0}
    places = Counter()
    for example in task.examples("train", 0, 4000):
        for k, node, above in task.parse(example["input_ids"])["queries"]:
            places[k, (above - node) % 8] += 1
    assert places[8, 0] == sum(n for (k, _), n in places.items() if k == 8)
    for k in (1, 3):
        counts = [places[k, apart] for apart in range(8)]
        share = sum(counts) / 7
        assert counts[0] == 0
        assert all(abs(count - share) < 5 * np.sqrt(share) for count in counts[1:])


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_every_label_is_the_ancestor_that_is_asked_for(params, split):
    task = tasks.load("ancestor", **params)
    hops = Counter()
    for example in task.examples(split, 3, 40):
        tokens, labels = example["input_ids"], example["labels"]
        assert len(tokens) == len(labels) == task.length and max(tokens) < task.vocab_size
        read = task.parse(tokens)
        parents = dict(read["pointers"])
        roots = [node for node, parent in parents.items() if node == parent]
        assert len(roots) == (0 if params.get("back", 3) is None else 1)
        answers = []
        for k, node, above in read["queries"]:
            path = [node]
            for _ in range(k):
                assert path[-1] not in roots, "it has no such ancestor"
                path.append(parents[path[-1]])
            assert above == path[k]
            answers.append(above)
        # The label of a question stands behind its node, where the next one begins.
        if params.get("compound"):
            first = (task.nodes + len(task.hops)) * task.nodes
            assert labels[task.nodes + 1 :] == [first + node for node in answers]
            others = labels[: task.nodes + 1]
        else:
            assert labels[2 * task.nodes + 2 :: 2] == answers
            others = [*labels[: 2 * task.nodes + 2], *labels[2 * task.nodes + 3 :: 2]]
        assert set(others) == {-100}
        assert example["meta"]["difficulty"] == [k for k, _, _ in read["queries"]]
        hops.update(example["meta"]["difficulty"])
    assert sorted(hops) == list(task.hops)


def test_parents_are_even_among_those_before():
    """Of node 9 in the order of the tree: each of the 3 before it a third, within 5 deviations."""
    task = tasks.load("ancestor", nodes=16, hops=1, queries=1)
    steps = Counter()
    for example in task.examples("train", 0, 3000):
        nodes, parents = example["input_ids"][:32:2], example["input_ids"][1:32:2]
        steps[9 - nodes.index(parents[9])] += 1
        assert parents[0] == nodes[0] and parents[1] == nodes[0]
    assert sorted(steps) == [1, 2, 3]
    assert all(abs(n / 3000 - 1 / 3) < 5 * np.sqrt(2 / 9 / 3000) for n in steps.values())


def test_orders_hold_the_same_trees():
    made = {
        order: tasks.load("ancestor", order=order).parse(
            next(tasks.load("ancestor", order=order).examples("train", 5, 1))["input_ids"]
        )
        for order in ("topological", "random")
    }
    one, other = made["topological"], made["random"]
    assert one["queries"] == other["queries"]
    assert one["pointers"] != other["pointers"]
    assert sorted(one["pointers"]) == sorted(other["pointers"])


def test_the_floor_by_another_count():
    """Guess a label at random among those that no question so far has named."""
    task = tasks.load("ancestor", nodes=8, hops=[1, 2], back=2, queries=4)
    right, asked, rng = Counter(), Counter(), np.random.default_rng(0)
    for example in task.examples("train", 0, 30_000):
        tokens, labels = example["input_ids"][16:], example["labels"][16:]
        named = set()
        for place in range(0, 8, 2):
            named.add(tokens[place + 1])
            left = sorted(set(range(8)) - named)
            k = example["meta"]["difficulty"][place // 2]
            asked[k] += 1
            right[k] += left[rng.integers(len(left))] == labels[place + 2]
    floor = task.floor()
    for k in (1, 2):
        share = right[k] / asked[k]
        assert abs(floor[k] - share) < 5 * np.sqrt(share / asked[k]) + 1e-3
        # More than among all others, for what was asked about is seldom an ancestor.
        assert floor[k] > 1 / 7
    assert tasks.load("ancestor", queries=1).floor() == pytest.approx(
        dict.fromkeys((1, 2, 4, 8), 1 / 31), abs=1e-12
    )


def test_one_label_is_as_frequent_as_another():
    task = tasks.load("ancestor", nodes=12, hops=[1, 2], queries=4)
    labels = np.asarray(task.batch("train", 0, 20_000)["labels"])
    shares = np.bincount(labels[labels >= 0], minlength=12) / (labels >= 0).sum()
    # Answers of one tree are alike, so deviations are up to twice those of independent draws.
    assert np.abs(shares - 1 / 12).max() < 10 * np.sqrt(1 / 12 / 80_000)
    found = task.majority()
    assert (found.per_label, task.chance()) == (1 / 12, 1 / 12)
    answers = labels[:, 26::2]
    same = (answers == answers[:, :1]).all(axis=1).mean() / 12
    assert abs(found.exact - same) < 5 * np.sqrt(same / 20_000) / 12 + 1e-3


def test_splits_are_apart_and_drawn_the_same_however_sliced():
    task = tasks.load("ancestor", nodes=8, hops=1, back=1, queries=1, order="random")

    def trees(split, count):
        made = (task.parse(e["input_ids"])["pointers"] for e in task.examples(split, 0, count))
        return {tuple(sorted(pointers)) for pointers in made}

    # 8! paths in all; in 40,000 draws of a set some 5 % to 6 % of the other would have come up.
    train, test = trees("train", 40_000), trees("test", 10_000)
    assert not train & test and len(train) > 20_000 and len(test) > 2_000
    whole = task.batch("train", 7, 40)
    assert torch.equal(whole["input_ids"][:9], task.batch("train", 7, 9)["input_ids"])
    assert whole["labels"].tolist() == [e["labels"] for e in task.examples("train", 7, 40)]


def test_limited_to_some_hops_trees_stay_the_same():
    task = tasks.load("ancestor", order="random")
    hard = task.only(4)
    one, other = (t.batch("test", 2, 20)["input_ids"] for t in (task, hard))
    assert torch.equal(one[:, :64], other[:, :64])
    assert set(other[:, 64:-1:2].flatten().tolist()) == {32 + 2}
    assert list(hard.floor()) == [4]
    with pytest.raises(ValueError, match=r"difficulty must be one or several of hops=.*, got 3"):
        task.only(3)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"nodes": 7}, "nodes must be an integer of at least 8 and at most 1024, got 7"),
        ({"hops": 11}, "hops must be at most 10, so that every tree of 32 nodes with back=3"),
        ({"hops": [1, 1]}, "hops must be an integer or a list of one or more different ones"),
        ({"back": None}, r"order must be 'random' for a cycle \(back=None\), got 'topological'"),
        ({"compound": 1}, "compound must be True or False, got 1"),
        (
            {"queries": 32, "compound": True},
            "windows must divide the 32 tokens of a tree and leave at least 33",
        ),
        ({"order": "reverse"}, "order must be one of 'topological', 'random'"),
        ({"back": 0}, "back must be an integer of at least 1, got 0"),
        ({"windows": 3}, "windows must divide the 64 tokens of a tree and leave at least 21"),
        ({"queries": 32}, "leave at least 65, those of 32 questions, to a window, got 1"),
    ],
)
def test_bad_parameters_are_named(params, said):
    with pytest.raises(ValueError, match=said):
        tasks.load("ancestor", **params)


def test_what_is_no_tree_is_refused():
    task = tasks.load("ancestor", nodes=8, hops=[1, 2, 3], back=2, queries=3)
    tokens = [5, 5, 2, 5, 0, 5, 7, 2, 3, 7, 1, 0, 4, 3, 6, 4, 10, 4, 8, 1, 9, 6, 11]
    task.parse(tokens)
    for place, token in ((0, 2), (1, 2), (3, 9), (3, 7), (15, 6), (16, 11), (17, 8), (22, 10)):
        with pytest.raises(ValueError, match="input_ids must be 8 pointers that make a tree"):
            task.parse([*tokens[:place], token, *tokens[place + 1 :]])
    with pytest.raises(ValueError, match="23 tokens"):
        task.parse(tokens[:-1])
