"""GSM-Infinite as a task: layout, floor, reading back, bad parameters."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.gsm_infinite import task as task_module
from hybrid_sleep.eval.tasks.gsm_infinite.graph import Definition, Quantity
from hybrid_sleep.eval.tasks.gsm_infinite.problems import problems, solve


def load(**params):
    return tasks.load("gsm_infinite", **params)


BARE = {"ops": [1, 2, 3], "length": 72, "windows": 2, "noise": False}
NOISE = {"ops": [2, 4, 6, 8], "length": 512}


def test_an_example_is_fill_text_cue_answer():
    for params in (BARE, {**BARE, "question_first": False}, {**BARE, "solution": True, "windows": 1,
                                                            "length": 200}):  # fmt: skip
        task = load(**params)
        words = task.vocabulary.tokens
        assert tasks.load(task.name, **task.params).params == task.params
        for example in task.examples("train", 3, 60):
            meta, ids = example["meta"], example["input_ids"]
            assert len(ids) == len(example["labels"]) == task.length
            text = [words[i] for i in ids[: params["length"]]]
            parts = [meta["question"], meta["problem"]]
            if not task.question_first:
                parts.reverse()
            written = re.findall(r"[A-Za-z]+|\d|[^\w\s]", " ".join(parts))
            assert text == ["<fill>"] * (params["length"] - len(written)) + written
            assert meta["length"] == len(written)
            tail = [words[i] for i in ids[params["length"] :]]
            said = meta["solution"] if task.solution else str(meta["answer"])
            cue = "Solution" if task.solution else "Answer"
            answer = [*re.findall(r"[A-Za-z]+|\d|[^\w\s]", said), "<end>"]
            assert tail[: 2 + len(answer)] == [cue, ":", *answer]
            assert set(tail[2 + len(answer) :]) <= {"<fill>"}
            first = params["length"] + 2
            assert example["labels"][first : first + len(answer)] == ids[first:][: len(answer)]
            assert sum(label != -100 for label in example["labels"]) == len(answer)
            for part in (meta["problem"], meta["question"], meta["solution"]):
                assert task.decode(task.encode(part)) == part
            described = task.describe(example)
            assert meta["question"] in described and meta["solution"] in described


def test_windows_hold_text_or_the_answer_but_never_both():
    task = load(length=512, windows=4)
    assert (task.window, task.length) == (128, 519)
    for example in task.examples("train", 0, 20):
        supervised = {i // task.window for i, y in enumerate(example["labels"]) if y != -100}
        assert supervised == {4}


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("params", [BARE, NOISE], ids=["bare", "noise"])
def test_a_batch_is_the_same_examples(split, params):
    task = load(**params)
    batch = task.batch(split, 11, 60)
    examples = list(task.examples(split, 11, 60))
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert batch["input_ids"].tolist() == [example["input_ids"] for example in examples]
    assert batch["labels"].tolist() == [example["labels"] for example in examples]
    assert [*itertools.islice(load(**params).examples(split, 11), 60)] == examples
    assert task.batch(split, 11, 7)["input_ids"].equal(batch["input_ids"][:7])
    assert not task.batch(split, 12, 60)["input_ids"].equal(batch["input_ids"])


def test_noise_and_layout_leave_the_questions_alone():
    """Floors are measured without distractors, so those must not change what is drawn."""
    for changed in ({"solution": True, "length": 400}, {"question_first": False}):
        base = {**BARE, "ops": [1, 2], "windows": 1, "length": 400}
        one, other = load(**base), load(**{**base, **changed})
        for a, b in zip(one.examples("test", 4, 40), other.examples("test", 4, 40), strict=True):
            told = [{**e["meta"], "messages": None} for e in (a, b)]
            assert told[0] == told[1]
    counts = []
    for noise in (False, True):
        task = load(ops=[3], length=150, windows=1, noise=noise, modes=["forward"])
        counts.append(Counter(e["meta"]["answer"] for e in task.examples("train", 0, 800)))
    for answer in range(1, 7):
        assert abs(counts[0][answer] - counts[1][answer]) < 5 * (counts[0][answer] ** 0.5 + 3)


def test_the_stream_never_changes():
    """A seed in an old result must mean the same problems for ever."""
    (example,) = load(**BARE).examples("test", 0, 1)
    meta = example["meta"]
    assert (meta["question"], meta["problem"], meta["answer"]) == GOLDEN


GOLDEN = (
    "How many art shelves does Amber Archive have?",
    "The number of art shelves in Amber Archive equals 2 plus the number of language shelves in "
    "Raven Archive. The number of language shelves in Raven Archive equals 2.",
    4,
)


def test_floor_is_what_guessing_scores(monkeypatch):
    monkeypatch.setattr(task_module, "SAMPLED", 3000)
    task_module._statistics.cache_clear()
    task = load(ops=[1, 2], length=72, windows=2, noise=False)
    floor, majority = task.floor(), task.majority()
    task_module._statistics.cache_clear()
    batch = task.batch("test", 5, 1500)
    guess = majority.guess
    guesses = torch.zeros_like(batch["input_ids"])
    guesses[:, 74 : 74 + len(guess)] = torch.tensor(guess)
    error = 5 * (majority.exact * (1 - majority.exact) / 3000 + 0.25 / 1500) ** 0.5
    score = task.score(guesses, batch)
    assert score["exact"] == pytest.approx(majority.exact, abs=error)
    # Constants are drawn evenly from 1..4.
    assert list(floor) == [1, 2] and floor[1] == pytest.approx(0.25, abs=0.05)
    rows = task.batch("train", 0, 3000)["labels"][:, 74:].tolist()
    assert majority.exact == max(Counter(map(tuple, rows)).values()) / 3000
    two = [e for e in task.examples("train", 0, 3000) if e["meta"]["op"] == 2]
    answers = Counter(example["meta"]["answer"] for example in two)
    assert floor[2] == max(answers.values()) / len(two)
    follows = Counter((j, row[j - 1] if j else None, row[j]) for row in rows for j in range(5))
    labels = {key: n for key, n in follows.items() if key[2] != -100}
    best = sum(max(labels[k] for k in labels if k[:2] == b) for b in {k[:2] for k in labels})
    assert majority.per_label == best / sum(labels.values())


def test_floors_are_of_problems_that_distractors_can_fill(monkeypatch):
    """At 62 tokens they cannot fill all; sums of sentences of 11, 18 and 20 tokens must do."""
    monkeypatch.setattr(task_module, "SAMPLED", 3000)
    task_module._statistics.cache_clear()
    task = load(ops=[2], length=62, windows=1)
    floor, majority = task.floor(), task.majority()
    task_module._statistics.cache_clear()
    drawn = [*itertools.islice(problems(replace(task.recipe, noise=False), "train", 0), 3000)]
    sums = {sum(parts) for n in range(5) for parts in itertools.product((11, 18, 20), repeat=n)}
    reached = {room for room in range(62) if any(0 <= room - total <= 3 for total in sums)}
    assert {62 - problem.length for problem in drawn} <= reached
    free = [*itertools.islice(load(**task.params | {"noise": False}).examples("train", 0), 300)]
    assert not {62 - example["meta"]["length"] for example in free} <= reached
    answers = Counter(problem.answer for problem in drawn)
    assert floor == {2: max(answers.values()) / 3000} and majority.exact == floor[2]


def test_only_keeps_tokens_and_layout():
    task = load(**{**BARE, "solution": True, "length": 400})
    one = task.only(2)
    assert (one.length, one.window, one.vocab_size) == (task.length, task.window, task.vocab_size)
    assert {e["meta"]["op"] for e in one.examples("test", 0, 20)} == {2}
    with pytest.raises(ValueError, match=r"difficulty must .*ops=\[1, 2, 3\], got 4"):
        task.only(4)


def test_themes_say_how_counts_averages_and_totals_are_called():
    themes = load().themes
    assert list(themes) == ["orchard", "harbour", "library"]
    for theme in themes.values():
        assert set(theme.phrases) == {"count", "average", "total", "grand"}
        assert len(set(theme.kinds)) == 16 and theme.places == 128
    assert themes["orchard"].phrases == {
        "count": "number of {kind} trees in {place}",
        "average": "average number of nests per {kind} tree in {place}",
        "total": "total number of trees in {place}",
        "grand": "total number of nests in {place}",
    }
    for theme in themes:
        drawn = load(themes=[theme], d=3).examples("train", 0, 9)
        text = " ".join(example["meta"]["problem"] for example in drawn)
        for other, words in themes.items():
            assert (f"{words.parts} per " in text) == (theme == other)


PUBLISHED = {"problem", "question", "solution", "op", "id", "template", "mode", "length", "d"}


def test_meta_has_the_fields_of_the_published_problems():
    for example in load(**NOISE).examples("train", 0, 20):
        meta = example["meta"]
        assert set(meta) >= PUBLISHED | {"answer", "messages"}
        assert meta["template"] == meta["theme"]
        (message,) = meta["messages"]
        assert message == {"role": "user", "content": f"{meta['question']}\n{meta['problem']}"}
    assert len({e["meta"]["id"] for e in load(**NOISE).examples("train", 0, 200)}) == 200


@pytest.mark.parametrize(
    "params",
    [BARE, {**NOISE, "question_first": False, "d": 3}, {**BARE, "solution": True, "length": 600}],
    ids=["bare", "noise", "solution"],
)
def test_a_sequence_is_read_back(params):
    task = load(**params)
    for example in task.examples("test", 2, 60):
        meta, read = example["meta"], task.parse(example["input_ids"])
        assert {key: read[key] for key in ("question", "problem", "answer")} == {
            key: meta[key] for key in ("question", "problem", "answer")
        }
        said = [
            f"The {name} exists, and its number is greater than 0."
            if right is None
            else f"The {name} equals {right}."
            for name, right in read["statements"]
        ]
        assert " ".join(said) == meta["problem"]
        assert (meta["mode"] == "reverse") == any(r is None for _, r in read["statements"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text, tail: (text[1:], tail), r"\d+ tokens, not"),
        (lambda text, tail: (["<fill>" if w == "equals" else w for w in text], tail), r"fill or"),
        (lambda text, tail: ([*text[:-1], "+"], tail), r"a problem that ends in"),
        (lambda text, tail: (["What" if w == "How" else w for w in text], tail), r"question"),
        (lambda text, tail: (["plus" if w == "equals" else w for w in text], tail), r"sentence"),
        (lambda text, tail: (text, tail[1:] + ["<fill>"]), r"the end"),
        (lambda text, tail: (text, ["<fill>" if w == "<end>" else w for w in tail]), r"the end"),
        (lambda text, tail: (text, [*tail[:3], "equals", "<end>", *tail[5:]]), r"reply"),
    ],
)
def test_what_is_no_sequence_is_refused(change, message):
    task = load(**{**BARE, "modes": ["forward"]})
    example = next(e for e in task.examples("train", 0) if e["meta"]["question"][:3] == "How")
    words = [task.vocabulary.tokens[i] for i in example["input_ids"]]
    changed = [task.vocabulary.ids[w] for part in change(words[:72], words[72:]) for w in part]
    with pytest.raises(ValueError, match=rf"input_ids must .*gsm_infinite.*got .*{message}"):
        task.parse(changed)
    with pytest.raises(ValueError, match=r"outside 0\.\.\d+"):
        task.parse([task.vocab_size] * task.length)


def test_solve_refuses_what_has_no_single_answer():
    a, b, total = Quantity("count", 0, 0), Quantity("count", 0, 1), Quantity("total", 0)
    leaf = Definition(2, "", "", ())
    stated = {a: leaf, b: Definition(3, "times", "", (a,))}
    assert solve(stated, b) == 6
    assert solve(stated, total) == 8
    assert solve(stated, a, unknown=a, last=(total, 12)) == 3
    assert solve(stated, a, unknown=a, last=(total, 13)) is None
    assert solve(stated, a, unknown=a, last=(total, 0)) is None
    # A thing more at the place changes its total.
    assert solve({**stated, Quantity("count", 0, 2): leaf}, total) == 10
    assert solve({b: stated[b]}, b) is None
    assert solve({a: Definition(0, "", "", (b,)), b: stated[b]}, b) is None
    flat = {a: leaf, b: Definition(0, "", "difference", (a, a))}
    assert solve(flat, a, unknown=a, last=(b, 0)) is None
    assert solve({a: Definition(1001, "", "", ())}, a) is None
    average = Quantity("average", 0, 0)
    square = {a: leaf, average: Definition(0, "", "", (a,))}
    assert solve(square, Quantity("grand", 0)) == 4
    assert solve(square, a, unknown=a, last=(Quantity("grand", 0), 4)) is None
    assert solve({**square, b: leaf}, Quantity("grand", 0)) is None


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: load(ops=[]), r"ops must .*1\.\.30, each once, got \[\]"),
        (lambda: load(ops=[0]), r"ops must .*got \[0\]"),
        (lambda: load(ops=[31]), r"ops must .*got \[31\]"),
        (lambda: load(ops=[2, 2]), r"ops must .*got \[2, 2\]"),
        (lambda: load(ops=[2.0]), r"ops must .*got \[2\.0\]"),
        (lambda: load(ops=4), r"ops must .*list.*got 4"),
        (lambda: load(d=4), r"d must .*at least 2 and at most 3, got 4"),
        (lambda: load(d=1), r"d must .*got 1"),
        (lambda: load(length=0), r"length must .*got 0"),
        (
            lambda: load(ops=[3], modes=["forward"], length=50, windows=1),
            r"length must .*noise=False.* \d+, got 50$",
        ),
        (lambda: load(length=65536), r"length must .*32768, got 65536"),
        (lambda: load(length=40, windows=1), r"length must be at least \d+ for op=8, got 40"),
        (lambda: load(length=512, windows=3), r"windows must divide length=512 .*got 3"),
        (lambda: load(length=512, windows=128), r"windows must .*at least 7 .*got 128"),
        (lambda: load(length=512, windows=4, solution=True), r"windows must .*solution.*got 4"),
        (lambda: load(windows=0), r"windows must .*got 0"),
        (lambda: load(modes=["sideways"]), r"modes must .*forward, reverse.*got \['sideways'\]"),
        (lambda: load(modes="forward"), r"modes must .*list.*got 'forward'"),
        (lambda: load(themes=["zoo"]), r"themes must .*orchard, harbour, library.*got \['zoo'\]"),
        (lambda: load(noise=1), r"noise must be True or False, got 1"),
        (lambda: load(question_first="no"), r"question_first must .*got 'no'"),
        (lambda: load(solution=None), r"solution must .*got None"),
        (lambda: load(steps=4), r"ops.*got steps=4"),
        (lambda: load().examples("dev", 0, 1), r"split must be one of 'train', 'test', got 'dev'"),
        (lambda: load().examples("test", -1, 1), r"seed must .*got -1"),
        (lambda: load().batch("test", 0, 0), r"count must .*got 0"),
        (lambda: load().encode("The zebra equals 3."), r"'zebra'"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
