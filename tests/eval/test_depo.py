"""Depo: a sequence read by hand, walks round the cycle, laws of the draws, exact floors."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.eval import tasks

SMALL = {"nodes": 8, "hops": 4, "queries": 4, "alphabet": 8, "longest": 1}
TINY = {"nodes": 5, "hops": 4, "queries": 2, "alphabet": 3}
VARIANTS = [
    {},
    {"variant": "depo1", "nodes": 30},
    {"variant": "depo2", "nodes": 20, "hops": 12},
    {"nodes": 4, "hops": 32, "queries": 6},
    TINY,
    SMALL,
]
# 99.9 % quantiles of chi-square, by degrees of freedom.
CHI_SQUARE = {3: 16.27, 4: 18.47, 9: 27.88, 15: 37.70}


def by_params(params):
    return ",".join(f"{key}={value}" for key, value in params.items()) or "default"


def chi_square(seen, expected) -> float:
    seen, expected = np.asarray(seen, float), np.asarray(expected, float)
    expected = expected * seen.sum() / expected.sum()
    return float(((seen - expected) ** 2 / expected).sum())


def read(task, tokens):
    """Edges and questions, by splitting after every last letter; an independent `parse`."""
    a, k0, answer = task.alphabet, 2 * task.alphabet, 2 * task.alphabet + task.hops + 1
    text = ""
    for token in tokens:
        if k0 < token < answer:
            text += f"?{token - k0} "
        elif token == answer:
            text += "= "
        elif 0 < token <= k0:
            text += f"{token}" + (" " if token > a else "-")
    cycle, *questions = text.split("?")
    names = cycle.split()
    asked = [question.replace("=", "").split() for question in questions]
    edges = list(zip(names[::2], names[1::2], strict=True))
    return edges, [(int(k), start, target) for k, start, target in asked]


def test_a_sequence_read_by_hand():
    task = tasks.load("depo", **TINY)
    # Letters 1-3, last letters 4-6, k steps: 6 + k, answer: 11. Cycle: 5 > 2,4 > 6 > 5.
    cycle = [2, 4, 6, 5, 2, 4, 6, 5]
    questions = [8, 5, 11, 6, 10, 2, 4, 11, 6]
    tokens = [0] * (task.context - 8) + cycle + questions + [0] * 3
    assert len(tokens) == task.length == 36
    edges = [((2, 4), (6,)), ((5,), (2, 4)), ((6,), (5,))]
    queries = [(2, (5,), (6,)), (4, (2, 4), (6,))]
    assert task.parse(tokens) == {"edges": edges, "queries": queries}
    assert task.parse(torch.tensor(tokens)) == task.parse(tokens)
    assert task.describe({"input_ids": tokens}) == (
        "cycle of 3: 2-4 > 6 > 5\n2 steps from 5: 6\n4 steps from 2-4: 6"
    )


def test_the_stream_never_changes():
    """A seed in an old result must mean the same examples for ever."""
    task = tasks.load("depo", **TINY)
    (example,) = task.examples("train", 0, 1)
    # 3 nodes: 6 > 1,6 > 2,5 > 6, and both questions go once round.
    assert example["input_ids"] == GOLDEN
    labels = [-100] * task.length
    labels[28:30], labels[33] = [2, 5], 6
    assert example["labels"] == labels
    assert example["meta"] == {"task": "depo", **task.params, "n": 3, "difficulty": [3, 3]}


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_every_answer_is_where_a_walk_ends(params, split):
    task = tasks.load("depo", **params)
    original = task.variant != "paper"
    for example in task.examples(split, 3, 60):
        tokens, labels = example["input_ids"], example["labels"]
        edges, questions = read(task, tokens)
        follows = dict(edges)
        n = len(follows)
        assert len(edges) == n == example["meta"]["n"]
        assert n == task.nodes if split == "test" else 3 <= n <= task.nodes
        walk = [edges[0][0]]
        for _ in range(n):
            walk.append(follows[walk[-1]])
        assert len(set(walk)) == n and walk[-1] == walk[0]
        for name in walk:
            letters = [int(letter) for letter in name.split("-")]
            assert task.shortest <= len(letters) <= task.longest
            assert all(letter <= task.alphabet for letter in letters[:-1])
        assert len({start for _, start, _ in questions}) == len(questions) == min(n, task.queries)
        for k, start, target in questions:
            for _ in range(k):
                start = follows[start]
            assert start == target
            assert k in (task.test_hops if split == "test" else range(1, task.hops + 1))
        assert example["meta"]["difficulty"] == [k for k, _, _ in questions]
        # What is supervised: the tokens of the answers, in order, and where the release has it so
        # the token before them.
        expected = []
        for _, _, target in questions:
            expected += [task.answer] if original else []
            expected += [int(letter) for letter in target.split("-")]
        assert [label for label in labels if label != -100] == expected
        assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))


@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_pads_stand_left_of_the_cycle_and_right_of_the_questions(params):
    task = tasks.load("depo", **params)
    for example in task.examples("train", 1, 100):
        tokens = example["input_ids"]
        cycle, questions = tokens[: task.context], tokens[task.context :]
        first = next(i for i, token in enumerate(cycle) if token)
        assert 0 not in cycle[first:]
        assert max(cycle[first + (task.variant != "paper") :]) <= 2 * task.alphabet
        assert (cycle[first] == task.vocab_size - 1) == (task.variant != "paper")
        used = [i for i, token in enumerate(questions) if token]
        assert used == list(range(len(used)))
        assert 2 * task.alphabet < questions[0] < task.answer
        assert max(tokens) < task.vocab_size


@pytest.mark.parametrize(
    "params, context, questions, window, vocab_size",
    [
        ({}, 300, 60, 75, 118),
        ({"variant": "depo1"}, 904, 60, 226, 111),  # 1 + 225 * 4 = 901
        ({"variant": "depo2"}, 1052, 160, 263, 25),  # 1 + 75 * 14 = 1051
        (SMALL, 16, 16, 16, 22),
        (TINY, 24, 12, 12, 12),  # 20 of cycle
    ],
)
def test_windows_hold_whole_parts(params, context, questions, window, vocab_size):
    task = tasks.load("depo", **params)
    assert (task.context, task.length, task.window) == (context, context + questions, window)
    assert task.context % task.window == 0 and questions <= task.window
    assert task.vocab_size == vocab_size
    assert tasks.load("depo", **task.params).params == task.params


def test_questions_open_a_fresh_window_however_short_the_cycle():
    """Without a state-space layer nothing of the cycle is left when it is asked about."""
    task = tasks.load("depo", **SMALL)
    batch = task.batch("train", 0, 12)
    assert len({int((row[:16] > 0).sum()) for row in batch["input_ids"]}) > 2
    torch.manual_seed(0)
    config = HybridSleepConfig(
        vocab_size=task.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        layer_types=["full_attention"],
        window=task.window,
    )
    model = HybridSleepForCausalLM(config).eval()
    other = batch["input_ids"].clone()
    other[:, : task.context] = other[torch.randperm(12), : task.context]
    other[:, -1] = 1
    with torch.no_grad():
        logits, changed = (model(input_ids=ids).logits for ids in (batch["input_ids"], other))
    assert not logits[:, : task.context].equal(changed[:, : task.context])
    assert logits[:, task.context : -1].equal(changed[:, task.context : -1])


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_a_batch_is_the_same_examples(split, params):
    task = tasks.load("depo", **params)
    batch = task.batch(split, 11, 70)
    examples = list(task.examples(split, 11, 70))
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert batch["input_ids"].tolist() == [example["input_ids"] for example in examples]
    assert batch["labels"].tolist() == [example["labels"] for example in examples]
    # The stream does not depend on how much of it is asked for.
    endless = itertools.islice(task.examples(split, 11), 70)
    assert [example["input_ids"] for example in endless] == batch["input_ids"].tolist()
    assert task.batch(split, 11, 7)["input_ids"].equal(batch["input_ids"][:7])
    assert not task.batch(split, 12, 70)["input_ids"].equal(batch["input_ids"])


def test_sizes_follow_the_law_of_the_release():
    task = tasks.load("depo", nodes=12, alphabet=50, longest=1)
    tokens = task.batch("train", 0, 20_000)["input_ids"]
    sizes = (tokens[:, : task.context] > 0).sum(1) // 2
    seen = np.bincount(sizes, minlength=13)[3:]
    assert chi_square(seen, [1 / (n + 12**0.5) for n in range(3, 13)]) < CHI_SQUARE[9]
    assert chi_square(seen, np.ones(10)) > CHI_SQUARE[9]


STEPS = {1: [1], 12: [1, 2, 4, 8, 12], 16: [1, 2, 4, 8, 16], 32: [1, 2, 4, 8, 16, 24, 32]}


@pytest.mark.parametrize("hops, asked", STEPS.items())
def test_steps_asked_for_in_the_test(hops, asked):
    task = tasks.load("depo", **{**SMALL, "hops": hops})
    tokens = task.batch("test", 0, 1000)["input_ids"]
    seen = np.bincount(tokens[(tokens > 16) & (tokens < task.answer)] - 16, minlength=hops + 1)
    assert np.flatnonzero(seen).tolist() == asked
    if len(asked) == 5:
        assert chi_square(seen[asked], np.ones(5)) < CHI_SQUARE[4]


def test_steps_asked_for_in_training():
    task = tasks.load("depo", **{**SMALL, "hops": 16})
    tokens = task.batch("train", 0, 5000)["input_ids"]
    seen = np.bincount(tokens[(tokens > 16) & (tokens < task.answer)] - 16)[1:]
    assert chi_square(seen, np.ones(16)) < CHI_SQUARE[15]


def test_splits_never_share_a_cycle_however_it_is_printed():
    """5040 cycles of 8 nodes, few enough to see nearly all test cycles many times."""
    task = tasks.load("depo", **SMALL)
    cycles, printed = {}, {}
    for split, count in (("test", 4000), ("train", 12_000)):
        tokens = torch.cat([task.batch(split, seed, count // 2)["input_ids"] for seed in (0, 1)])
        rows = [tuple(row) for row in tokens[:, : task.context].tolist() if row[0]]
        printed[split] = set(rows)
        cycles[split] = {frozenset(zip(row[::2], row[1::2], strict=True)) for row in rows}
    assert not cycles["train"] & cycles["test"]
    assert len(cycles["test"]) == pytest.approx(5040 / 16, rel=0.15)
    assert len(printed["test"]) > 5 * len(cycles["test"])
    assert len(cycles["train"]) > 1000


def test_a_cycle_keeps_its_split_whatever_is_asked_of_it():
    one, other = (tasks.load("depo", **{**SMALL, "hops": hops}) for hops in (1, 9))
    assert one.batch("test", 0, 100)["input_ids"][:, :16].equal(
        other.batch("test", 0, 100)["input_ids"][:, :16]
    )


def test_names_are_drawn_one_after_another_until_they_differ():
    """As the release draws them: short names are few, so that fewer than half come out short."""
    task = tasks.load("depo", nodes=12, alphabet=6)
    tokens = task.batch("test", 0, 3000)["input_ids"][:, : task.context]
    share = 1 - (((tokens > 0) & (tokens <= 6)).sum() / (tokens > 6).sum()).item()
    draws, short = random.Random(0), 0
    for _ in range(3000):
        names = set()
        while len(names) < 12:
            names.add(tuple(draws.randint(1, 6) for _ in range(draws.randint(1, 2))))
        short += sum(len(name) == 1 for name in names)
    assert share == pytest.approx(short / 36_000, abs=0.006)
    assert share < 0.45


def brute_force_letters(alphabet, lengths, nodes):
    """Expected letters of a name, over every sequence of draws that ends in `nodes` names."""
    names = [w for n in lengths for w in itertools.product(range(alphabet), repeat=n)]
    odds = {w: 1 / len(lengths) / alphabet ** len(w) for w in names}

    def expected(drawn):
        if len(drawn) == nodes:
            return sum(map(len, drawn)) / nodes
        free = [w for w in names if w not in drawn]
        total = sum(odds[w] for w in free)
        return sum(odds[w] / total * expected((*drawn, w)) for w in free)

    return expected(())


@pytest.mark.parametrize("variant", ["paper", "depo1"])
@pytest.mark.parametrize(
    "alphabet, shortest, longest, nodes", [(2, 1, 3, 4), (3, 1, 2, 5), (20, 1, 1, 4), (3, 2, 3, 3)]
)
def test_majority_equals_a_count_over_all_draws(variant, alphabet, shortest, longest, nodes):
    task = tasks.load(
        "depo", variant=variant, nodes=nodes, alphabet=alphabet, shortest=shortest, longest=longest
    )
    letters = longest
    if shortest < longest:
        letters = brute_force_letters(alphabet, range(shortest, longest + 1), nodes)
    marked = variant != "paper"
    often = {task.answer: marked, 1: (letters - 1) / alphabet, alphabet + 1: 1 / alphabet}
    majority = task.majority()
    best = max(often.values())
    assert majority.per_label == pytest.approx(best / (letters + marked), rel=1e-12)
    assert [often[token] for token in majority.guess] == [best]


@pytest.mark.parametrize("queries", [1, 2, 3, 4])
@pytest.mark.parametrize("hops", [1, 2, 4, 6])
def test_majority_of_whole_examples_by_enumeration(queries, hops):
    """Every choice of starts and steps on a ring of 5; the node they meet in has 1 name of 8."""
    asked = [k for k in (1, 2, 4, 6) if k <= hops]
    right = total = 0
    for starts in itertools.permutations(range(5), queries):
        for steps in itertools.product(asked, repeat=queries):
            ends = {(start + k) % 5 for start, k in zip(starts, steps, strict=True)}
            right, total = right + (len(ends) == 1), total + 1
    task = tasks.load("depo", nodes=5, hops=hops, queries=queries, alphabet=8, longest=1)
    assert task.majority().exact == pytest.approx(right / total / 8, rel=1e-12)


@pytest.mark.parametrize("params", [{}, {"variant": "depo2", "nodes": 20}, SMALL], ids=by_params)
def test_guessing_scores_the_majority(params):
    task = tasks.load("depo", **params)
    batch = task.batch("test", 0, 2000)
    majority = task.majority()
    score = task.score(torch.full_like(batch["labels"], *majority.guess), batch)
    assert score["exact"] == majority.exact == 0
    assert score["per_label"] == pytest.approx(majority.per_label, abs=0.005)


@pytest.mark.parametrize("nodes, hops", [(8, 4), (8, 16), (4, 12), (75, 16)])
def test_chance_knows_the_nodes_but_not_their_order(nodes, hops):
    task = tasks.load("depo", **{**SMALL, "alphabet": 100, "nodes": nodes, "hops": hops})
    drawn, right, asked = random.Random(0), 0, 0
    for example in task.examples("test", 0, 1500):
        edges, questions = read(task, example["input_ids"])
        names = [name for name, _ in edges]
        for k, start, target in questions:
            rest = [name for name in names if name != start]
            right += (start if k % nodes == 0 else drawn.choice(rest)) == target
            asked += 1
    error = (task.chance() / asked) ** 0.5
    assert right / asked == pytest.approx(task.chance(), abs=4 * error)


@pytest.mark.parametrize("variant", ["paper", "depo1"])
def test_score_counts_questions_and_slices_them_by_steps(variant):
    task = tasks.load("depo", variant=variant, **TINY, shortest=2)
    examples = list(task.examples("test", 0, 40))
    predictions = torch.tensor([example["labels"] for example in examples])
    # Missed: both letters of every question of 4 steps, and the last letter of some first ones.
    right, asked, clean = dict.fromkeys((1, 2, 4), 0), dict.fromkeys((1, 2, 4), 0), 0
    for i, example in enumerate(examples):
        at = [t for t, label in enumerate(example["labels"]) if label != -100]
        size = len(at) // 2
        for q, k in enumerate(example["meta"]["difficulty"]):
            here = at[q * size : (q + 1) * size]
            missed = here[-2:] if k == 4 else here[-1:] if q == 0 and i % 2 else []
            predictions[i, missed] = 0
            asked[k] += 1
            right[k] += not missed
        clean += 4 not in example["meta"]["difficulty"] and i % 2 == 0
    shares = {k: right[k] / asked[k] for k in (1, 2, 4)}
    assert shares[4] == 0 < shares[1] < 1
    score = task.score(predictions, examples)
    assert score.pop("by_difficulty") == shares
    assert score.pop("questions") == asked
    assert score["per_question"] == sum(right.values()) / 80
    assert score["exact"] == clean / 40 > 0
    assert task.score(predictions, task.batch("test", 0, 40)) == score


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: tasks.load("depo", variant="depo3"),
            r"variant must .*'paper', 'depo1', 'depo2', got 'depo3'",
        ),
        (lambda: tasks.load("depo", width=3), r"variant, nodes, hops, queries.*got width=3"),
        (lambda: tasks.load("depo", nodes=2), r"nodes must .*at least 3 .*10000, got 2"),
        (lambda: tasks.load("depo", hops=0), r"hops must .*at least 1 .*100000, got 0"),
        (lambda: tasks.load("depo", queries=1.5), r"queries must be an integer.*got 1\.5"),
        (lambda: tasks.load("depo", alphabet=0), r"alphabet must .*at least 1 .*got 0"),
        (
            lambda: tasks.load("depo", shortest=0),
            r"shortest must .*at least 1 and at most 32, got 0",
        ),
        (lambda: tasks.load("depo", shortest=3), r"longest must .*shortest=3\.\.5, got 2"),
        (lambda: tasks.load("depo", longest=4), r"longest must .*shortest=1\.\.3, got 4"),
        (
            lambda: tasks.load("depo", alphabet=8),
            r"nodes=75 names.*got alphabet=8, longest=2: 72 names",
        ),
        (
            lambda: tasks.load("depo", alphabet=10**5),
            r"\(alphabet \+ 1\)\*\*longest be at most .*longest=2",
        ),
        (
            lambda: tasks.load("depo", nodes=7, alphabet=7, longest=1),
            r"nodes must .*1024.*got 7 .*720",
        ),
        (lambda: TASK.examples("dev", 0, 1), r"split must be one of 'train', 'test', got 'dev'"),
        (lambda: TASK.examples("test", -1, 1), r"seed must .*at least 0, got -1"),
        (lambda: TASK.examples("test", 0, -1), r"count must .*at least 0, got -1"),
        (lambda: TASK.batch("test", 0, 0), r"count must .*at least 1, got 0"),
        (lambda: TASK.score(torch.zeros(2, 5), TASK.batch("test", 0, 2)), r"shape.*got \(2, 5\)"),
        (lambda: TASK.parse([5, 6, 5]), r"input_ids must be pairs of names.*got \[5, 6, 5\]"),
        (lambda: TASK.parse([5, 6, 2]), r"input_ids must .*got \[5, 6, 2\]"),
        (lambda: TASK.parse([5, 6, 8, 5, 11]), r"input_ids must .*got \[5, 6, 8, 5, 11\]"),
        (lambda: TASK.parse([5, 6, 8, 5, 9, 6]), r"input_ids must .*got \[5, 6, 8, 5, 9, 6\]"),
        (lambda: TASK.parse([5, 6, 8, 5, 11, 12]), r"input_ids must .*got \[5, 6, 8, 5, 11, 12\]"),
        (lambda: TASK.parse([5, 6, 11, 5, 11, 6]), r"input_ids must .*got \[5, 6, 11, 5, 11, 6\]"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TASK = tasks.load("depo", **TINY)
GOLDEN = [0] * 14 + [1, 6, 2, 5, 6, 1, 6, 2, 5, 6, 9, 2, 5, 11, 2, 5, 9, 6, 11, 6, 0, 0]
