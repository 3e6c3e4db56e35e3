"""Word problems: products worked out by hand and by sympy, both layouts, floors by enumeration."""

from __future__ import annotations

import itertools
import math
from functools import reduce

import numpy as np
import pytest
import torch
from sympy.combinatorics import Permutation
from sympy.combinatorics.named_groups import AlternatingGroup

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.eval import tasks

VARIANTS = [
    {},
    {"group": "S3", "elements": 24, "windows": 3, "prefixes": [24, 1, 17]},
    {"group": "A5", "elements": 12},
    {"group": "Z60", "elements": 8, "prefixes": [8]},
    {"group": "S3", "elements": 7, "layout": "tagging"},
    {"group": "Z60", "elements": 20, "layout": "tagging", "windows": 3},
]
POWERS = [1, 2, 4, 8, 16, 32]
S3 = ["012", "021", "102", "120", "201", "210"]


def by_params(params):
    return ",".join(f"{key}={value}" for key, value in params.items()) or "default"


def elements_of(group):
    """The elements in the order of their numbers, as sympy has them, and the product."""
    if group == "Z60":
        return list(range(60)), lambda a, b: (a + b) % 60
    if group == "A5":
        arrays = sorted(p.array_form for p in AlternatingGroup(5).elements)
        return [Permutation(array) for array in arrays], lambda a, b: a * b
    degree = int(group[1])
    ranked = [Permutation.unrank_lex(degree, i) for i in range(math.factorial(degree))]
    return ranked, lambda a, b: a * b


def prefixes(group, word):
    elements, product = elements_of(group)
    running = itertools.accumulate((elements[x] for x in word), product)
    return [elements.index(p) for p in running]


@pytest.mark.parametrize("name", ["S3", "S5", "A5"])
def test_tables_are_those_of_sympy(name):
    """Its a * b applies a first."""
    elements, _ = elements_of(name)
    arrays = np.array([p.array_form for p in elements])
    number = {p: i for i, p in enumerate(elements)}
    task = tasks.load("word_problem", group=name, layout="tagging")
    assert task.order == len(elements) == {"S3": 6, "S5": 120, "A5": 60}[name]
    assert [list(map(int, word)) for word in task.group.words] == arrays.tolist()
    pairs = itertools.product(range(len(elements)), repeat=2)
    for a, b in list(pairs)[:: 1 if name == "S3" else 7]:
        assert task.group.table[a, b] == number[elements[a] * elements[b]]


def test_products_worked_out_by_hand():
    """012 021 102 120 201 210 are 0..5. 021 then 102: 0 to 0 to 1, 1 to 2 to 2, 2 to 1 to 0."""
    table = tasks.load("word_problem", group="S3").group.table
    assert table[1, 2] == 3 and table[2, 1] == 4
    assert table[3, 3] == 4 and table[3, 4] == table[5, 5] == 0 and table[5, 1] == 3
    assert table[0].tolist() == table[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    word, products = [1, 2, 3, 3, 5, 1], [1, 3, 4, 0, 5, 3]
    task = tasks.load("word_problem", group="S3", elements=6, layout="tagging")
    assert task.parse([*word, 6]) == {"word": word, "queries": [*enumerate(products, 1)]}
    assert task.describe({"input_ids": [*word, 6]}) == (
        "word: 021 102 120 120 210 021\ntags: 021 120 201 012 210 120"
    )
    task = tasks.load("word_problem", group="S3", elements=6, prefixes=[2, 4, 6])
    tokens = [*word, 7, 0, 6, 3, 8, 3]
    assert task.parse(tokens) == {"word": word, "queries": [(4, 0), (2, 3), (6, 3)]}
    assert task.describe({"input_ids": tokens}) == (
        "word: 021 102 120 120 210 021\n"
        "product of the first 4: 012\nproduct of the first 2: 120\nproduct of the first 6: 120"
    )


def test_the_stream_never_changes():
    """A seed in an old result must mean the same examples for ever."""
    task = tasks.load("word_problem", group="S3", elements=8, prefixes=[1, 4, 8])
    (example,) = task.examples("test", 0, 1)
    # 021 102 201 201 102 201 012 012
    assert example["input_ids"] == [1, 2, 4, 4, 2, 4, 0, 0, 8, 2, 7, 4, 6, 1]
    assert example["labels"] == [-100] * 9 + [2, -100, 4, -100, 1]
    assert example["meta"] == {"task": "word_problem", **task.params, "difficulty": [8, 4, 1]}


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_every_label_is_the_product_up_to_there(params, split):
    task = tasks.load("word_problem", **params)
    group, size = task.params["group"], task.elements
    for example in task.examples(split, 3, 12):
        tokens, labels = example["input_ids"], example["labels"]
        word = tokens[:size]
        assert 0 <= min(word) and max(word) < task.order
        products = prefixes(group, word)
        if task.layout == "tagging":
            assert tokens[size:] == [task.order]
            assert labels[0] == -100
            # Unshifted, as the literature has them: each element's own tag.
            assert labels[1:] == products
            counts = list(range(1, size + 1))
        else:
            ascending = sorted(params.get("prefixes") or {t for t in POWERS if t < size} | {size})
            counts = [ascending[token - task.order] for token in tokens[size::2]]
            assert sorted(counts) == ascending
            answers = [products[t - 1] for t in counts]
            assert tokens[size + 1 :: 2] == answers
            assert labels == [-100] * size + [x for a in answers for x in (-100, a)]
        read = task.parse(tokens)
        assert read == {"word": word, "queries": [(t, products[t - 1]) for t in counts]}
        if task.layout == "tagging":
            counts = [min(size, next(p for p in POWERS if p >= t)) for t in counts]
        assert example["meta"]["difficulty"] == counts


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_a_batch_is_the_same_examples(split, params):
    task = tasks.load("word_problem", **params)
    batch = task.batch(split, 11, 70)
    examples = list(task.examples(split, 11, 70))
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert batch["input_ids"].tolist() == [example["input_ids"] for example in examples]
    assert batch["labels"].tolist() == [example["labels"] for example in examples]
    assert batch["input_ids"].shape == (70, task.length)
    assert batch["input_ids"].max() < task.vocab_size
    endless = itertools.islice(task.examples(split, 11), 70)
    assert [example["input_ids"] for example in endless] == batch["input_ids"].tolist()
    assert task.batch(split, 11, 7)["input_ids"].equal(batch["input_ids"][:7])
    assert not task.batch(split, 12, 70)["input_ids"].equal(batch["input_ids"])
    assert tasks.load("word_problem", **task.params).params == task.params


@pytest.mark.parametrize(
    "params, window, length, vocab_size",
    [
        ({}, 32, 44, 126),
        ({"group": "A5", "elements": 32, "windows": 4, "prefixes": [8, 32]}, 8, 36, 62),
        ({"group": "S3", "elements": 12, "layout": "tagging"}, 13, 13, 7),
        ({"group": "S3", "elements": 12, "layout": "tagging", "windows": 2}, 7, 13, 7),
    ],
)
def test_sizes(params, window, length, vocab_size):
    task = tasks.load("word_problem", **params)
    assert (task.window, task.length, task.vocab_size) == (window, length, vocab_size)


def test_the_word_has_left_when_it_is_asked_for():
    """Without a state-space layer nothing of it is left."""
    task = tasks.load("word_problem", group="S3", elements=16, windows=2, prefixes=[3, 9, 16])
    batch = task.batch("train", 0, 12)
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
    other[:, :16] = other[torch.randperm(12), :16]
    with torch.no_grad():
        logits, changed = (model(input_ids=ids).logits for ids in (batch["input_ids"], other))
    assert not logits[:, :16].equal(changed[:, :16])
    assert logits[:, 16:].equal(changed[:, 16:])


def test_elements_and_orders_of_questions_are_drawn_evenly():
    task = tasks.load("word_problem", group="S3", elements=16, prefixes=[2, 5, 11, 16])
    tokens = task.batch("train", 0, 20_000)["input_ids"].numpy()
    seen = np.bincount(tokens[:, :16].ravel())
    assert ((seen - seen.mean()) ** 2 / seen.mean()).sum() < 20.52  # 99.9 %, 5 degrees of freedom
    orders = np.unique(tokens[:, 16::2], axis=0, return_counts=True)[1]
    assert len(orders) == 24
    assert ((orders - orders.mean()) ** 2 / orders.mean()).sum() < 49.73  # 23 degrees


def test_splits_never_share_a_word_and_miss_none():
    task = tasks.load("word_problem", group="S3", elements=5, prefixes=[5])
    words = {
        split: {tuple(row) for row in task.batch(split, 0, count)["input_ids"][:, :5].tolist()}
        for split, count in (("train", 80_000), ("test", 6000))
    }
    assert not words["train"] & words["test"]
    assert len(words["train"] | words["test"]) > 0.999 * 6**5
    assert len(words["test"]) == pytest.approx(6**5 / 16, rel=0.1)


def test_a_word_keeps_its_split_whatever_is_asked_of_it():
    ways = ({"prefixes": [5]}, {"prefixes": [1, 3]}, {"layout": "tagging"})
    each = [tasks.load("word_problem", group="S3", elements=5, **way) for way in ways]
    words = [
        {tuple(row) for row in task.batch("test", 0, 5000)["input_ids"][:, :5].tolist()}
        for task in each
    ]
    assert words[0] == words[1] == words[2]


def test_floor_of_questions_by_enumeration():
    """Every word of five elements of S3 and every two questions: the answers before help nobody."""
    words = list(itertools.product(range(6), repeat=5))
    number = {name: i for i, name in enumerate(S3)}
    table = [[number["".join(b[int(i)] for i in a)] for b in S3] for a in S3]
    products = [list(itertools.accumulate(word, lambda a, b: table[a][b])) for word in words]
    for t in range(1, 5):
        task = tasks.load("word_problem", group="S3", elements=5, prefixes=[t, 5])
        joint = np.zeros((6, 6))
        for product in products:
            joint[product[t - 1], product[4]] += 1
        assert joint.max() == joint.min()
        assert task.majority().per_label == pytest.approx(joint.sum(0).max() / len(words))
        assert task.majority().exact == pytest.approx(joint[0, 0] / len(words), rel=1e-12)
        # The best guess for the whole word when the product of its first t is known.
        best = joint.max(axis=1).sum() / len(words)
        assert task.floor()[5] == pytest.approx(best, rel=1e-12)
        assert task.chance() == 1 / 6 and list(task.floor()) == [t, 5]
    alone = tasks.load("word_problem", group="S3", elements=5, prefixes=[5])
    assert list(alone.floor()) == [5] and alone.majority().exact == 1 / 6

    tagging = tasks.load("word_problem", group="S3", elements=5, layout="tagging")
    seen = {}
    for t in range(1, 6):
        joint = np.zeros((6, 6))
        for word, product in zip(words, products, strict=True):
            joint[word[t - 1], product[t - 1]] += 1
        best = joint.max(axis=1).sum() / len(words)
        assert tagging.floor()[{3: 4}.get(t, t)] == pytest.approx(best, rel=1e-12)
        seen[t] = best
    assert seen[1] == 1
    assert tagging.majority().exact == pytest.approx(6**-5, rel=1e-12)


@pytest.mark.parametrize("params", VARIANTS, ids=by_params)
def test_guessing_scores_the_floor(params):
    task = tasks.load("word_problem", **params)
    examples = list(task.examples("test", 0, 1500))
    majority = task.majority()
    guess = np.full((1500, task.length), *majority.guess)
    score = task.score(guess, examples)
    labels = 1500 * len(task.prefixes)
    error = math.sqrt(majority.per_label / labels)
    assert score["per_label"] == pytest.approx(majority.per_label, abs=4 * error)
    error = math.sqrt(majority.exact / 1500)
    assert score["exact"] == pytest.approx(majority.exact, abs=4 * error)
    assert set(score["by_difficulty"]) == set(task.floor())


def test_a_long_product_does_not_depend_on_where_it_is_cut():
    task = tasks.load("word_problem", group="A5", elements=64, prefixes=[64])
    table = task.group.table
    for example in task.examples("train", 0, 5):
        word = example["input_ids"][:64]
        halves = [reduce(lambda a, b: table[a, b], half) for half in (word[:29], word[29:])]
        assert table[halves[0], halves[1]] == example["labels"][-1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: load(group="S4"), r"group must .*'S3', 'S5', 'A5', 'Z60', got 'S4'"),
        (lambda: load(length=3), r"group, elements, layout.*got length=3"),
        (lambda: load(layout="both"), r"layout must .*'recall', 'tagging', got 'both'"),
        (lambda: load(group="S3", elements=4), r"elements must .*4096.*got 4.*1296"),
        (lambda: load(elements=0), r"elements must .*at least 2 .*got 0"),
        (lambda: load(windows=0), r"windows must .*at least 1, got 0"),
        (lambda: load(windows=3), r"windows must .*elements=32.*12 elements.*got 3"),
        (lambda: load(elements=16, windows=2), r"windows must .*10 elements.*5 questions.*got 2"),
        (lambda: load(prefixes=[]), r"prefixes must .*1\.\.32, got \[\]"),
        (lambda: load(prefixes=4), r"prefixes must .*1\.\.32, got 4$"),
        (lambda: load(prefixes=[0, 4]), r"prefixes must .*at least 1, got 0"),
        (lambda: load(prefixes=[4, 4]), r"prefixes must .*different.*got \[4, 4\]"),
        (lambda: load(prefixes=[4, 33]), r"prefixes must .*1\.\.32, got \[4, 33\]"),
        (lambda: load(layout="tagging", prefixes=[4]), r"prefixes must be None .*got \[4\]"),
        (lambda: load(layout="tagging", windows=33), r"windows must .*elements=32, got 33"),
        (lambda: TASK.examples("dev", 0, 1), r"split must be one of 'train', 'test', got 'dev'"),
        (lambda: TASK.batch("test", 0, 0), r"count must .*at least 1, got 0"),
        (lambda: TASK.only(4), r"difficulty must not .*cannot.*got 4"),
        (lambda: TASK.parse([1, 2, 3, 4, 5, 6, 3, 7]), r"5 elements below 6.*9 tokens"),
        (lambda: TASK.parse([1, 2, 3, 4, 6, 6, 3, 7, 1]), r"5 elements below 6"),
        (lambda: TASK.parse([1, 2, 3, 4, 5, 6, 3, 8, 1]), r"questions \(t, product\)"),
        (lambda: TASK.parse([1, 2, 3, 4, 5, 7, 3, 7, 1]), r"questions \(t, product\)"),
        (lambda: TASK.parse([1, 2, 3, 4, 5, 6, 6, 7, 1]), r"questions \(t, product\)"),
        (lambda: TAGS.parse([1, 2, 3, 4, 5, 5]), r"the stop token: 6 tokens"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def load(**params):
    return tasks.load("word_problem", **params)


TASK = load(group="S3", elements=5, prefixes=[2, 5])
TAGS = load(group="S3", elements=5, layout="tagging")
