"""GSM-Infinite as a task: layout, floor, free-text answers, bad parameters."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
import torch

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.gsm_infinite import official_problems, parse_answer
from hybrid_sleep.eval.tasks.gsm_infinite import task as task_module
from hybrid_sleep.eval.tasks.gsm_infinite.generator import solve
from hybrid_sleep.eval.tasks.gsm_infinite.graph import Definition, Quantity


def load(**params):
    return tasks.load("gsm_infinite", **params)


BARE = {"ops": [1, 2, 3], "length": 72, "windows": 2, "noise": False}
SETTINGS = [
    BARE,
    {"ops": list(range(1, 9)), "d": 3, "length": 300, "windows": 1, "noise": False},
    {"ops": [2, 4, 6, 8], "length": 512},
    {"ops": [2, 5, 9], "d": 3, "length": 600},
]


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
@pytest.mark.parametrize("params", SETTINGS[::2], ids=["bare", "noise"])
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
            assert a["meta"] == b["meta"]
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
    task_module._floor.cache_clear()
    task = load(ops=[1, 2], length=72, windows=2, noise=False)
    floor = task.floor()
    task_module._floor.cache_clear()
    batch = task.batch("test", 5, 1500)
    guess = [*task.encode(str(floor["majority"])), task.vocabulary.end]
    guesses = torch.zeros_like(batch["input_ids"])
    guesses[:, 74 : 74 + len(guess)] = torch.tensor(guess)
    error = 5 * (floor["standard_error"] ** 2 + 0.25 / 1500) ** 0.5
    score = task.score(guesses, batch)
    assert score["exact"] == pytest.approx(floor["exact"], abs=error)
    assert floor["of"] == 3000
    # Constants are drawn evenly from 1..4.
    assert floor["slices"]["op"]["1"] == pytest.approx(0.25, abs=0.05)
    assert set(floor["slices"]["mode"]) == {"forward", "reverse"}
    rows = task.batch("train", 0, 3000)["labels"][:, 74:].tolist()
    assert floor["exact"] == max(Counter(map(tuple, rows)).values()) / 3000
    follows = Counter((j, row[j - 1] if j else None, row[j]) for row in rows for j in range(5))
    labels = {key: n for key, n in follows.items() if key[2] != -100}
    best = sum(max(labels[k] for k in labels if k[:2] == b) for b in {k[:2] for k in labels})
    assert floor["per_label"] == best / sum(labels.values())


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
    "reply, answer",
    [
        ("Answer: 12.", 12),
        ("**Answer:** 12", 12),
        ("answer = 7", 7),
        ("The answer is 12", 12),
        ("the final answer is: **1,000**", 1000),
        (r"so \boxed{12}", 12),
        (r"\boxed{1{,}000} is it", 1000),
        (r"first \boxed{3}, no, \boxed{4}. Answer: 5", 4),
        ("\boxed{6}", 6),
        ("Solution: 9", 9),
        ("A = 2; so B = 4. Answer: 4. I hope 99 helps", 4),
        ("Answer: 3. Wait. Answer: 5.", 5),
        ("It has 3 and 4, so the total is 7 of them", 7),
        ("x = 3, y = 8", 8),
        ("12", 12),
        ("there are 3 here and 15 there", 15),
        ("Answer: 12.0", 12),
        ("Answer: 12.5", None),
        ("Answer: -3", -3),
        ("Answer: $12$", 12),
        ("Answer: x = 12", 12),
        ("is 1, 2 or 3", 1),
        ("Answer: 1,2", 1),
        ("no idea", None),
        ("", None),
    ],
)
def test_free_text_replies(reply, answer):
    assert parse_answer(reply) == answer


def test_written_solutions_parse_to_their_answers():
    for example in load(**BARE).examples("train", 8, 100):
        assert parse_answer(example["meta"]["solution"]) == example["meta"]["answer"]


def published(**changed):
    return {
        "problem": "The number of adult crow in Oak Ranch equals 2.",
        "question": "What is the total number of adult animals in Oak Ranch?",
        "solution": "Define adult crow in Oak Ranch as A; so A = 2. Answer: 2.",
        "op": 2,
        "id": 7,
        "template": "crazy_zootopia",
        "mode": "normalforward",
        "length": "zero_context",
        "d": 2,
        **changed,
    }


def test_published_problems_are_read_from_a_local_copy(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    unsound = "The number of A exists, and its number is greater than 0."
    rows = [
        published(),
        published(problem=f"{unsound} {unsound}", solution="Answer: 3. No, Answer: 14."),
    ]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data/ops_2-00000-of-00001.parquet")
    lost = datasets.Dataset.from_list([published(solution="Define A; so A = 2.")])
    lost.to_parquet(tmp_path / "data/ops_3-00000-of-00001.parquet")
    first, second = official_problems(tmp_path, 2)
    assert (first["answer"], first["sound"], first["op"], first["d"]) == (2, True, 2, 2)
    content = f"{rows[0]['problem']}\n{rows[0]['question']}"
    assert first["messages"] == [{"role": "user", "content": content}]
    assert (second["answer"], second["sound"]) == (14, False)
    assert official_problems(tmp_path, 2, limit=1) == [first]
    with pytest.raises(ValueError, match=r"ops_3, row 0.*Answer"):
        official_problems(tmp_path, 3)
    with pytest.raises(ValueError, match=r"op=0"):
        official_problems(tmp_path, 0)
    symbolic = tmp_path / "symbolic/data"
    symbolic.mkdir(parents=True)
    row = {"problem": "assign V1 = 2.", "question": "?", "answer_list": ["V1"]}
    datasets.Dataset.from_list([row]).to_parquet(symbolic / "ops_1-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"lacks solution, op.*medium or hard"):
        official_problems(symbolic.parent, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: load(ops=[]), r"ops=\[\].*1\.\.30"),
        (lambda: load(ops=[0]), r"ops=\[0\]"),
        (lambda: load(ops=[31]), r"ops=\[31\]"),
        (lambda: load(ops=[2, 2]), r"ops=\[2, 2\]"),
        (lambda: load(ops=[2.0]), r"ops=\[2\.0\]"),
        (lambda: load(ops=4), r"ops=4.*list"),
        (lambda: load(d=4), r"d=4.*2 or 3"),
        (lambda: load(d=1), r"d=1"),
        (lambda: load(length=0), r"length=0"),
        (lambda: load(length=65536), r"length=65536.*32768"),
        (lambda: load(length=40, windows=1), r"length=40 is too short for op=8.*at least \d+"),
        (lambda: load(length=512, windows=3), r"windows=3.*length=512.*divisor"),
        (lambda: load(length=512, windows=128), r"windows=128.*at least 7"),
        (lambda: load(length=512, windows=4, solution=True), r"windows=4.*solution"),
        (lambda: load(windows=0), r"windows=0"),
        (lambda: load(modes=["sideways"]), r"modes=.*forward, reverse"),
        (lambda: load(modes="forward"), r"modes='forward'.*list"),
        (lambda: load(themes=["zoo"]), r"themes=.*orchard, harbour, library"),
        (lambda: load(noise=1), r"noise=1.*true or false"),
        (lambda: load(question_first="no"), r"question_first='no'"),
        (lambda: load(solution=None), r"solution=None"),
        (lambda: load(steps=4), r"steps=4.*ops"),
        (lambda: load().examples("dev", 0, 1), r"split='dev'.*train, test"),
        (lambda: load().examples("test", -1, 1), r"seed=-1"),
        (lambda: load().batch("test", 0, 0), r"count=0"),
        (lambda: load().encode("The zebra equals 3."), r"'zebra'"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
