"""What earlier answers of a Depo example give away, by enumeration in plain counts."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from fractions import Fraction

import pytest

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks import depo_floor


def follow(cycle, start, k):
    return cycle[(cycle.index(start) + k) % len(cycle)]


def counted(nodes, questions, hops):
    """Over every cycle, every choice of starts and every sequence of k, with exact fractions."""
    answers = [defaultdict(Counter) for _ in range(questions)]
    for rest in itertools.permutations(range(1, nodes)):
        cycle = (0, *rest)
        for starts in itertools.permutations(range(nodes), questions):
            for steps in itertools.product(hops, repeat=questions):
                asked = list(zip(starts, steps, strict=True))
                said = [follow(cycle, start, k) for start, k in asked]
                for i in range(questions):
                    answers[i][(*asked[: i + 1], *said[:i])][said[i]] += 1
    right, total = Counter(), Counter()
    for i, by_history in enumerate(answers):
        for history, counts in by_history.items():
            right[history[i][1]] += max(counts.values())
            total[history[i][1]] += sum(counts.values())
    return {k: Fraction(right[k], total[k]) for k in hops}


@pytest.mark.parametrize(
    "nodes, questions, hops",
    [(3, 3, (1, 2)), (4, 3, (1, 2, 4)), (5, 2, (1, 2, 4, 8)), (5, 3, (1, 2)), (4, 1, (1, 2, 4))],
)
def test_best_guess_equals_a_count(nodes, questions, hops):
    shares, error = depo_floor.best_guess(nodes, questions, hops)
    expected = counted(nodes, questions, hops)
    assert error == 0
    assert [k for k, _ in shares] == list(hops)
    for k, share in shares:
        assert share == pytest.approx(float(expected[k]), rel=1e-12)


def test_a_sample_says_how_far_it_may_be_off(monkeypatch):
    exact, _ = depo_floor.best_guess(6, 4, (1, 2, 4))
    monkeypatch.setattr(depo_floor, "MOST_SEQUENCES", 80)
    depo_floor.best_guess.cache_clear()
    sampled, error = depo_floor.best_guess(6, 4, (1, 2, 4))
    depo_floor.best_guess.cache_clear()
    assert 0 < error < 0.02
    for (k, share), (_, near) in zip(exact, sampled, strict=True):
        assert share == pytest.approx(near, abs=4 * error), k


def test_the_floor_is_what_a_guesser_of_drawn_examples_reaches():
    """8 nodes, names known: among the 5,040 cycles keep those that agree, guess what most say."""
    task = tasks.load("depo", nodes=8, hops=4, queries=4, alphabet=8, longest=1)
    cycles = [(0, *rest) for rest in itertools.permutations(range(1, 8))]
    right, asked = Counter(), Counter()
    for example in task.examples("test", 0, 80):
        left = cycles
        for k, (start,), (answer,) in task.parse(example["input_ids"])["queries"]:
            ends = [follow(cycle, start - 9, k) for cycle in left]
            often = Counter(ends).most_common(1)[0][1] / len(ends)
            left = [c for c, end in zip(left, ends, strict=True) if end == answer - 9]
            right[k] += often
            asked[k] += 1
    floor = task.floor()
    assert list(floor) == [1, 2, 4] and depo_floor.best_guess(8, 4, (1, 2, 4))[1] == 0
    for k, share in floor.items():
        assert right[k] / asked[k] == pytest.approx(share, abs=0.05)
        assert share > task.chance() + 0.03
    # What configs/runs/depo_cpu.yaml and the docstring of earlier results quote.
    assert sum(floor.values()) / 3 == pytest.approx(0.225, abs=0.001)


def test_of_more_nodes_it_is_that_of_first_questions():
    task = tasks.load("depo", nodes=12, hops=24, alphabet=20)
    assert task.floor() == {k: 1 / 11 for k in (1, 2, 4, 8, 16)} | {24: 1.0}
    assert task.chance() == pytest.approx(sum(task.floor().values()) / 6, rel=1e-12)


@pytest.mark.parametrize("split", ["train", "test"])
def test_depo_can_be_limited_to_one_number_of_steps(split):
    task = tasks.load("depo", nodes=6, hops=4, queries=3, alphabet=8, longest=1)
    limited = task.only(3)
    for whole, example in zip(
        task.examples(split, 0, 40), limited.examples(split, 0, 40), strict=True
    ):
        assert example["input_ids"][: task.context] == whole["input_ids"][: task.context]
        read = task.parse(example["input_ids"])
        follows = dict(read["edges"])
        for steps, start, answer in read["queries"]:
            assert steps == 3
            assert follows[follows[follows[start]]] == answer
    assert list(limited.floor()) == [3]
    assert task.test_hops == [1, 2, 4]
    with pytest.raises(ValueError, match=r"difficulty must .*hops=\[1, 2, 3, 4\], got 5"):
        task.only(5)
