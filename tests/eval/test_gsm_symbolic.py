"""GSM-Infinite's symbolic subset: problems read by patterns and evaluated anew here."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

import pytest
import torch

from hybrid_sleep.eval.tasks import IGNORED, SPLITS
from hybrid_sleep.eval.tasks.gsm_infinite import GsmSymbolic, parse_set, symbolic
from hybrid_sleep.eval.tasks.sampling import TEST_SHARE

ROOT = re.compile(r"assign (V\d+) = (\d+)\.")
STEP = re.compile(r"assign (V\d+) = (V\d+)(?: ([+-]) 1)?\.")

SMALL = {"ops": [1, 2, 3], "length": 96, "windows": 2, "answers": 4}
BARE = {**SMALL, "noise": False}
SETTINGS = [
    SMALL,
    {**BARE, "digits": 2, "question_first": False},
    {"ops": [2, 4, 6, 8], "length": 512},
    {"ops": [5, 20, 50], "length": 2048, "digits": 6, "answers": 8, "question_first": False},
]


class Reading:
    """Values of all variables, and the trees they stand in, from the text alone."""

    def __init__(self, problem: str, question: str):
        self.said = re.findall(r"[^.]+\.", problem)
        self.said = [sentence.strip() for sentence in self.said]
        roots = {m[1]: int(m[2]) for s in self.said if (m := ROOT.fullmatch(s))}
        steps = {m[1]: (m[2], m[3]) for s in self.said if (m := STEP.fullmatch(s))}
        assert len(roots) + len(steps) == len(self.said)
        assert set(roots.values()) <= set(range(11))
        self.asked = int(re.fullmatch(r"Which variables equal (\d+)\?", question)[1])
        self.derived, self.value, self.root = set(steps), {}, {}
        for name in [*roots, *steps]:
            chain = [name]
            while chain[-1] in steps:
                assert len(chain) <= len(steps)
                chain.append(steps[chain[-1]][0])
            changes = Counter(steps[link][1] for link in chain[:-1])
            self.value[name] = roots[chain[-1]] + changes["+"] - changes["-"]
            self.root[name] = chain[-1]

    def answers(self) -> set[str]:
        return {name for name, value in self.value.items() if value == self.asked}

    def core(self) -> list[str]:
        """Statements of the trees with an answer, in alphabetical order."""
        trees = {self.root[name] for name in self.answers()}
        names = {name for name, root in self.root.items() if root in trees}
        return sorted(s for s in self.said if s.split()[1] in names)

    def operations(self) -> int:
        return sum(sentence.split()[1] in self.derived for sentence in self.core())


def check(meta: dict, most: int) -> Reading:
    """Everything that holds for each problem."""
    reading = Reading(meta["problem"], meta["question"])
    assert set(meta["answer_list"]) == reading.answers()
    assert meta["answer_list"] == sorted(meta["answer_list"])
    assert 1 <= len(meta["answer_list"]) <= most
    assert reading.answers() & reading.derived
    assert reading.operations() == meta["op"] == meta["difficulty"]
    assert (meta["n"], meta["d"]) == (len(reading.value), 1)
    assert meta["answer_q"] == reading.asked
    assert min(reading.value.values()) >= 0
    return reading


def test_the_reading_of_a_problem_made_by_hand():
    problem = (
        "assign V07 = V03 + 1. assign V03 = 9. assign V10 = V07. assign V11 = V10 - 1. "
        "assign V20 = 10. assign V21 = V20 - 1. assign V30 = 0. assign V31 = V30 + 1."
    )
    reading = Reading(problem, "Which variables equal 9?")
    assert reading.answers() == {"V03", "V11", "V21"}
    assert reading.operations() == 4
    assert len(reading.core()) == 6
    pairs = [symbolic.read_assignment(s.removesuffix(".")) for s in reading.said]
    values = {"V03": 9, "V07": 10, "V10": 10, "V11": 9, "V20": 10, "V21": 9, "V30": 0, "V31": 1}
    assert symbolic.evaluate(pairs) == values
    assert symbolic.evaluate([*pairs, ("V31", "2")]) is None
    assert symbolic.evaluate([*pairs, ("V50", "V51")]) is None
    assert symbolic.evaluate([*pairs, ("V50", "V51"), ("V51", "V50 + 1")]) is None


@pytest.mark.parametrize("params", SETTINGS, ids=["small", "bare", "noise", "long"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_problem_has_the_answers_it_says(params, split):
    task = GsmSymbolic(**params)
    examples = list(task.examples(split, 3, 150 if params["length"] < 1000 else 30))
    for example in examples:
        meta = example["meta"]
        reading = check(meta, task.params["answers"])
        written = re.findall(r"[A-Za-z]+|\d|[^\w\s]", f"{meta['problem']} {meta['question']}")
        assert meta["length"] == len(written) <= params["length"]
        if task.recipe.noise:
            assert meta["length"] >= 0.95 * params["length"]
            assert params["length"] - meta["length"] < 5 + task.recipe.digits  # a root
            assert meta["op"] == params["ops"][-1] or len(reading.core()) < meta["n"]
        else:
            assert len(reading.core()) == meta["n"]
        assert all(len(name) == 1 + task.params["digits"] for name in reading.value)
    assert {example["meta"]["op"] for example in examples} == set(params["ops"])


def test_several_trees_hold_answers_and_all_kinds_of_steps_occur():
    trees, signs, sizes = Counter(), Counter(), Counter()
    for example in GsmSymbolic(ops=[4], length=256, windows=2).examples("train", 0, 300):
        meta = example["meta"]
        reading = Reading(meta["problem"], meta["question"])
        trees[len({reading.root[name] for name in reading.answers()})] += 1
        sizes[len(meta["answer_list"])] += 1
        signs.update(re.findall(r"= (?:V\d+)?([^V]*?)1?\.", meta["problem"]))
    assert set(trees) == {1, 2, 3, 4}
    assert set(sizes) >= {1, 2, 3, 4, 5}
    assert min(signs[kind] for kind in ("", " + ", " - ")) > 500


@pytest.mark.parametrize("length", [96, 100, 128, 250, 512])
@pytest.mark.parametrize("digits", [2, 3, 5])
def test_lengths_are_reached_within_five_percent(length, digits):
    task = GsmSymbolic(ops=[1, 2], length=length, windows=1, digits=digits, answers=2)
    for example in task.examples("train", 1, 60):
        assert 0.95 * length <= example["meta"]["length"] <= length


def test_an_example_is_fill_text_cue_names():
    for params in SETTINGS[:2]:
        task = GsmSymbolic(**params)
        words = task.vocabulary.tokens
        assert GsmSymbolic(**task.params).params == task.params
        assert task.length == 96 + 2 + 4 * (task.params["digits"] + 2)
        for example in task.examples("train", 3, 40):
            meta, ids = example["meta"], example["input_ids"]
            parts = [meta["question"], meta["problem"]]
            text = " ".join(parts if task.question_first else parts[::-1])
            tokens = re.findall(r"[A-Za-z]+|\d|[^\w\s]", text)
            assert [words[i] for i in ids[:96]] == ["<fill>"] * (96 - len(tokens)) + tokens
            said = re.findall(r"V|\d|,", ", ".join(meta["answer_list"]))
            tail = [words[i] for i in ids[96:]]
            assert tail[: 3 + len(said)] == ["Answer", ":", *said, "<end>"]
            assert set(tail[3 + len(said) :]) <= {"<fill>"}
            labels = [i if 98 <= at <= 98 + len(said) else IGNORED for at, i in enumerate(ids)]
            assert example["labels"] == labels
            assert meta["messages"][0]["content"].replace("\n", " ") == text
            described = task.describe(example)
            assert meta["solution"] in described and meta["question"] in described


def test_exact_is_equality_of_sets():
    task = GsmSymbolic(**SMALL)
    examples = list(task.examples("test", 0, 30))
    batch = task.batch("test", 0, 30)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert batch["input_ids"].tolist() == [example["input_ids"] for example in examples]
    assert batch["labels"].tolist() == [example["labels"] for example in examples]
    assert task.score(batch["labels"], examples)["exact"] == 1
    for change in (lambda names: names[:-1], lambda names: [*names[:-1], "V000"]):
        predictions = batch["labels"].clone()
        for row, example in enumerate(examples):
            names = ", ".join(change(example["meta"]["answer_list"]))
            said = [*task.encode(names), task.vocabulary.end]
            predictions[row, 98:] = 0
            predictions[row, 98 : 98 + len(said)] = torch.tensor(said)
        assert task.score(predictions, examples)["exact"] == 0


def test_splits_never_meet():
    """Trees with an answer decide; of the smallest, draws see many of those that there are."""
    cores = {split: set() for split in SPLITS}
    for split, noise in itertools.product(SPLITS, (False, True)):
        task = GsmSymbolic(ops=[1], length=40, windows=1, digits=2, answers=2, noise=noise)
        for example in task.examples(split, 0, 2000):
            meta = example["meta"]
            cores[split].add(tuple(Reading(meta["problem"], meta["question"]).core()))
    assert not cores["train"] & cores["test"]
    # 100 * 99 pairs of names, 11 roots, 3 steps but -1 of 0: 4000 draws seldom meet.
    possible = 9900 * 32 / TEST_SHARE
    expected = possible * (1 - math.exp(-4000 / possible))
    assert len(cores["test"]) == pytest.approx(expected, rel=0.05)


def test_the_stream_never_changes():
    """A seed in an old result must mean the same problems for ever."""
    (example,) = GsmSymbolic(**BARE).examples("test", 0, 1)
    meta = example["meta"]
    assert (meta["question"], meta["problem"], meta["solution"], meta["id"]) == GOLDEN
    task = GsmSymbolic(**SMALL)
    assert [*task.examples("train", 5, 9)] == [*itertools.islice(task.examples("train", 5), 9)]
    assert not task.batch("train", 6, 4)["input_ids"].equal(task.batch("train", 5, 4)["input_ids"])


GOLDEN = (
    "Which variables equal 8?",
    "assign V898 = V679. assign V450 = V898 + 1. assign V344 = V679 + 1. assign V679 = 8.",
    "V679 = 8. V344 = V679 + 1 = 9. V898 = V679 = 8. V450 = V898 + 1 = 9. Answer: V679, V898.",
    96654109839299,
)


def test_a_sequence_is_read_back():
    for params in SETTINGS:
        task = GsmSymbolic(**params)
        for example in task.examples("test", 2, 10):
            meta, read = example["meta"], task.parse(example["input_ids"])
            assert {key: read[key] for key in ("question", "problem", "answer_q")} == {
                key: meta[key] for key in ("question", "problem", "answer_q")
            }
            assert read["answer"] == meta["answer_list"]
            said = [f"assign {name} = {right}." for name, right in read["statements"]]
            assert " ".join(said) == meta["problem"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text, tail: (text[1:], tail), r"\d+ tokens, not"),
        (lambda text, tail: ([*text[:-1], "<fill>"], tail), r"fill or an end"),
        (lambda text, tail: ([*text[:-1], "+"], tail), r"a problem that ends in"),
        (lambda text, tail: (["?" if w == "Which" else w for w in text], tail), r"question"),
        (lambda text, tail: (["-" if w == "assign" else w for w in text], tail), r"sentence"),
        (lambda text, tail: (["1" if w.isdigit() else w for w in text], tail), r"assigned twice"),
        (lambda text, tail: (text, tail[1:] + ["<fill>"]), r"the end"),
        (lambda text, tail: (text, ["<fill>" if w == "<end>" else w for w in tail]), r"the end"),
        (lambda text, tail: (text, tail[:2] + ["<end>"] + ["<fill>"] * (len(tail) - 3)), r"reply"),
    ],
)
def test_what_is_no_sequence_is_refused(change, message):
    task = GsmSymbolic(**SMALL)
    (example,) = task.examples("train", 0, 1)
    words = [task.vocabulary.tokens[i] for i in example["input_ids"]]
    changed = [task.vocabulary.ids[w] for part in change(words[:96], words[96:]) for w in part]
    with pytest.raises(ValueError, match=rf"input_ids must .*gsm_symbolic.*got .*{message}"):
        task.parse(changed)
    with pytest.raises(ValueError, match=r"outside 0\.\.24"):
        task.parse([25] * task.length)


def test_floor_is_what_guessing_scores(monkeypatch):
    monkeypatch.setattr(symbolic, "SAMPLED", 3000)
    symbolic._statistics.cache_clear()
    task = GsmSymbolic(**BARE)
    floor, majority = task.floor(), task.majority()
    one = task.only(1)
    assert one.floor()[1] == one.majority().exact == pytest.approx(2 / 3 / 1000, rel=0.1)
    symbolic._statistics.cache_clear()
    rows = task.batch("train", 0, 3000)["labels"][:, 98:].tolist()
    sizes = Counter(row.count(task.vocabulary.ids["V"]) for row in rows)
    assert majority.exact == pytest.approx(sizes[1] / 3000 / 1000)
    sets = [1000, 499_500, 166_167_000, 41_417_124_750]
    assert all(sizes[k] / n <= sizes[1] / 1000 for k, n in enumerate(sets, 1))
    assert task.chance() == pytest.approx(1 / sum(sets))
    follows = Counter((j, row[j - 1] if j else None, row[j]) for row in rows for j in range(20))
    labels = {key: n for key, n in follows.items() if key[2] != IGNORED}
    best = sum(max(labels[k] for k in labels if k[:2] == b) for b in {k[:2] for k in labels})
    assert majority.per_label == pytest.approx(best / sum(labels.values()))
    assert list(floor) == [1, 2, 3]
    # A copy, or a step with the root at another value: one answer in two cases of three.
    assert floor[1] == pytest.approx(2 / 3 / 1000, rel=0.1)


def test_only_keeps_tokens_and_layout():
    task = GsmSymbolic(**SMALL)
    one = task.only(3)
    assert (one.length, one.window, one.vocab_size) == (task.length, task.window, task.vocab_size)
    assert {e["meta"]["op"] for e in one.examples("test", 0, 20)} == {3}
    with pytest.raises(ValueError, match=r"difficulty must .*ops=\[1, 2, 3\], got 4"):
        task.only(4)


def test_written_solutions_hold_and_parse_to_their_answers():
    for example in GsmSymbolic(**SETTINGS[2]).examples("train", 8, 60):
        meta = example["meta"]
        assert parse_set(meta["solution"]) == set(meta["answer_list"])
        values = Reading(meta["problem"], meta["question"]).value
        *steps, end = re.findall(r"[^.]+(?=\.)", meta["solution"])
        assert end == f" Answer: {', '.join(meta['answer_list'])}"
        known = {}
        for step in steps:
            name, *rights = step.strip().split(" = ")
            for right in rights:
                assert eval(right, {}, known) == values[name]
            known[name] = values[name]


@pytest.mark.parametrize(
    "reply, names",
    [
        ("Answer: V12, V3", "V12 V3"),
        ("ANSWER: V1, V2, V1.", "V1 V2"),  # a set has no repetition
        ("The answer is V3 and V12.", "V3 V12"),
        ("The variables that equal 7 are V12, V3, and V5.", "V12 V3 V5"),
        ("V1, V2 and V3 equal 7", "V1 V2 V3"),
        ("v12", "V12"),
        ("Answer: V007", "V007"),  # another variable than V7
        ("**Answer:** `V1`, `V2`", "V1 V2"),
        ("[V1, V2]", "V1 V2"),
        ('{"answer": ["V1", "V2"]}', "V1 V2"),
        ("Answer: {V1; V2 & V3}", "V1 V2 V3"),
        ("Answer:\n- V1\n- V2\n", "V1 V2"),
        ("Answer:\n\n1. V1\n2. V2", "V1 V2"),  # numbers of a list are no names
        ("Answer: V12 = 4 and V7 = 4", "V12 V7"),
        ("Answer: The following variables equal 3:\n\nV1\nV2", "V1 V2"),
        ("Answer: those equal to 7 are V1 and V2. I also looked at V9.", "V1 V2"),
        ("The answer is V1, V2, not V3", "V1 V2"),
        ("V12 = 3. V45 = V12 + 1 = 4. So V45 and V7.", "V45 V7"),
        ("Answer: V1. Wait. Answer: V2, V3.", "V2 V3"),  # the last word counts
        (r"\boxed{V_{12}, V_3}", "V12 V3"),
        (r"so \boxed{\{V12, \text{V3}\}} it is. V9 is not.", "V12 V3"),
        (r"\boxed{V1} no, \boxed{V2}", "V2"),
        (r"\boxed{V1, V2", "V1 V2"),  # cut off
        (r"\boxed{\emptyset}", ""),
        ("Answer: none", ""),
        ("V3 is 4, V5 is 6. Answer: None of them.", ""),
        ("No variables equal 7.", ""),
        ("Answer: {}", ""),
        ("Answer: V\u2081\u2082", "V12"),
        ("it is 12", None),
        ("VV12, V12a, W3", None),
        ("", None),
    ],
)
def test_free_text_sets(reply, names):
    assert parse_set(reply) == (None if names is None else frozenset(names.split()))


@pytest.mark.parametrize(
    "params, message",
    [
        ({"ops": []}, r"ops must .*1\.\.50, each once, got \[\]"),
        ({"ops": [51]}, r"ops must .*got \[51\]"),
        ({"digits": 1}, r"digits must .*got 1"),
        ({"digits": 7}, r"digits must .*at least 2 and at most 6, got 7"),
        ({"digits": 2, "length": 2048}, r"digits must be at least 3 .*length=2048.*got 2"),
        ({"answers": 0}, r"answers must .*got 0"),
        ({"length": 0}, r"length must .*got 0"),
        ({"length": 65536}, r"length must .*32768, got 65536"),
        ({"length": 64, "windows": 1}, r"length must be at least \d+ for op=8, got 64"),
        ({"length": 512, "windows": 3}, r"windows must divide .*got 3"),
        ({"length": 512, "windows": 32}, r"windows must .*at least 32 tokens.*got 32"),
        (
            {"ops": [1], "length": 30, "windows": 1, "answers": 1},
            r"length must .*noise=False.* 34, got 30",
        ),
        ({"noise": 1}, r"noise must be True or False, got 1"),
        ({"question_first": None}, r"question_first must .*got None"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=message):
        GsmSymbolic(**params)


@pytest.mark.slow
def test_ten_thousand_problems_have_the_answers_they_say():
    cores = {split: set() for split in SPLITS}
    for (params, count), split in itertools.product(
        zip(SETTINGS, (2000, 2000, 1000, 100), strict=True), SPLITS
    ):
        for example in GsmSymbolic(**params).examples(split, 9, count):
            meta = example["meta"]
            cores[split].add(tuple(check(meta, params.get("answers", 6)).core()))
            if params.get("noise", True):
                assert 0.95 * params["length"] <= meta["length"] <= params["length"]
    assert not cores["train"] & cores["test"]
