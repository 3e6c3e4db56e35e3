"""GSM-Infinite's problems, read by patterns and solved by substitution, both written anew here."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from hybrid_sleep.eval import tasks

EXISTS = re.compile(r"The (.+) exists, and its number is greater than 0")
EQUALS = re.compile(r"The (.+?) equals (.+)")
SCALED = re.compile(r"(\d+) (plus|times) (.+)")
TOTAL = re.compile(r"total number of (\w+) in (.+)")
AVERAGE = re.compile(r"average number of (\w+) per (\w+) (\w+) in (.+)")
COUNT = re.compile(r"number of (\w+) (\w+) in (.+)")
ASKED = re.compile(r"How many (\w+) (\w+) does (.+) have\?")


class Reading:
    """What a problem says: `rules` (name: parts of its definition), `hidden`, `given` values."""

    def __init__(self, problem: str, question: str):
        self.rules, self.hidden, self.given, self.sentences = {}, None, {}, []
        for sentence in re.findall(r"[^.]+(?=\.)", problem):
            sentence = sentence.strip()
            if match := EXISTS.fullmatch(sentence):
                assert self.hidden is None
                self.hidden = match[1]
                self.sentences.append((match[1], sentence))
                continue
            name, right = EQUALS.fullmatch(sentence).groups()
            rule = self.rule(right)
            self.sentences.append((name, sentence))
            # Where a leaf is hidden, one more sentence gives the value of the last quantity.
            if name in self.rules and rule[3]:
                self.given[name] = self.rules[name][0]
                self.rules[name] = rule
            elif name in self.rules or name.startswith("total"):
                assert not rule[3]
                self.given[name] = rule[0]
            else:
                self.rules[name] = rule
        if self.hidden in self.rules:
            self.given[self.hidden] = self.rules.pop(self.hidden)[0]
        if match := ASKED.fullmatch(question):
            self.asked = f"number of {match[1]} {match[2]} in {match[3]}"
        else:
            self.asked = re.fullmatch(r"What is the (.+)\?", question)[1]

    @staticmethod
    def rule(right: str) -> tuple:
        """(constant or None, plus/times or None, sum/difference or None, names)."""
        if right.isdigit():
            return int(right), None, None, ()
        constant = sign = join = None
        if match := SCALED.fullmatch(right):
            constant, sign, right = int(match[1]), match[2], match[3]
        for word, lead in (("sum", "the sum of "), ("difference", "the difference between ")):
            if right.startswith(lead):
                join, right = word, right.removeprefix(lead)
        names = [name.removeprefix("the ") for name in re.split(r", and |, | and ", right)]
        assert (len(names) > 1) == (join is not None)
        return constant, sign, join, tuple(names)

    def mentioned(self) -> list[str]:
        return [*self.rules, *([self.hidden] if self.hidden else [])]

    def members(self, total: str) -> list[tuple[str, ...]]:
        """The names that a total adds up: counts, or pairs of a count and its average."""
        what, place = TOTAL.fullmatch(total).groups()
        counts = [m for n in self.mentioned() if (m := COUNT.fullmatch(n)) and m[3] == place]
        if any(m[2] == what for m in counts):
            return [(m[0],) for m in counts]
        pairs = []
        for m in counts:
            singular = {"shelves": "shelf"}.get(m[2], m[2].removesuffix("s"))
            pairs.append((m[0], f"average number of {what} per {m[1]} {singular} in {place}"))
        return pairs

    def reads(self, name: str) -> list[str]:
        if name.startswith("total"):
            return [part for member in self.members(name) for part in member]
        return [] if name == self.hidden else list(self.rules[name][3])

    def needed(self) -> set[str]:
        """Everything that the last quantity reads, and itself."""
        waiting, found = [*self.given] or [self.asked], set()
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.reads(name)
        return found

    def operations(self) -> int:
        """Numbers that needed definitions read: their names and their constants."""
        total = 0
        for name in self.needed():
            constant = name == self.hidden or (
                not name.startswith("total") and self.rules[name][0] is not None
            )
            total += len(self.reads(name)) + constant
        return total

    def values(self, guesses: np.ndarray) -> dict[str, np.ndarray]:
        """Every quantity, for each guess at the hidden one, by substituting what is known."""
        known = {self.hidden: guesses} if self.hidden else {}
        names = {n for rule in self.rules.values() for n in rule[3]}
        waiting = list(dict.fromkeys([*self.rules, self.asked, *self.given, *sorted(names)]))
        while waiting:
            ready = [n for n in waiting if n in known or all(r in known for r in self.reads(n))]
            assert ready, f"stuck at {waiting}"
            for name in ready:
                if name not in known:
                    known[name] = self.value(name, known) + 0 * guesses
            waiting = [n for n in waiting if n not in known]
        return known

    def value(self, name: str, known: dict[str, np.ndarray]) -> np.ndarray:
        if name.startswith("total"):
            products = [
                np.prod([known[p] for p in member], axis=0) for member in self.members(name)
            ]
            return np.sum(products, axis=0)
        constant, sign, join, names = self.rules[name]
        if not names:
            return np.array(constant)
        read = [known[n] for n in names]
        inner = read[0] - read[1] if join == "difference" else sum(read)
        if sign is None:
            return inner
        return constant + inner if sign == "plus" else constant * inner

    def answers(self, most: int = 1000) -> list[int]:
        """Every answer of 1..most for which all that is said holds, with values in 0..1000."""
        guesses = np.arange(1, most + 1) if self.hidden else np.zeros(1, dtype=int)
        known = self.values(guesses)
        holds = np.ones(len(guesses), dtype=bool)
        for name, value in self.given.items():
            holds &= known[name] == value
        at = np.flatnonzero(holds)
        if len(at) == 1:
            for name, value in known.items():
                assert 0 <= value[at[0]] <= 1000, name
        return known[self.asked][at].tolist()

    def core(self) -> tuple:
        """The last quantity and the definitions it needs, as if nothing were hidden.

        Operands of sums are in order.
        """
        (answer,) = self.answers()
        said = []
        for name in self.needed():
            if name == self.hidden:
                said.append((name, str((answer, None, None, ()))))
            elif not name.startswith("total"):
                *left, names = self.rules[name]
                names = names if left[2] == "difference" else tuple(sorted(names))
                said.append((name, str((*left, names))))
        (last,) = self.given or [self.asked]
        return last, *sorted(said)

    def without_noise(self) -> str:
        """The problem with needed sentences only."""
        needed = self.needed()
        return " ".join(f"{sentence}." for name, sentence in self.sentences if name in needed)


def check(meta: dict) -> Reading:
    """Everything that holds for each problem: one answer, as stated; op; noise that is noise."""
    reading = Reading(meta["problem"], meta["question"])
    assert reading.answers() == [meta["answer"]], meta
    assert reading.operations() == meta["op"], meta
    assert (reading.hidden is not None) == (meta["mode"] == "reverse")
    bare = reading.without_noise()
    assert Reading(bare, meta["question"]).answers() == [meta["answer"]]
    counted = Counter(name for name, _ in reading.sentences)
    assert all(n == 1 or (n == 2 and name in reading.given) for name, n in counted.items())
    return reading


def reached(length: int, target: int) -> bool:
    """Whether a length is within 5 % of its target, and lacks less than the shortest sentence."""
    return 0.95 * target <= length <= target and target - length < 11


def load(**params):
    return tasks.load("gsm_infinite", **params)


SETTINGS = [
    {"ops": [1, 2, 3], "length": 72, "windows": 2, "noise": False},
    {"ops": list(range(1, 9)), "d": 3, "length": 300, "windows": 1, "noise": False},
    {"ops": [2, 4, 6, 8], "length": 512},
    {"ops": [2, 5, 9], "d": 3, "length": 600},
]


def test_the_solver_reads_a_problem_made_by_hand():
    problem = (
        "The number of pear trees in Amber Hill equals 3 times the sum of the number of fig trees "
        "in Amber Hill, the number of plum trees in Birch Farm, and the average number of nests "
        "per fig tree in Amber Hill. The number of fig trees in Amber Hill equals 2. The number "
        "of plum trees in Birch Farm equals 1 plus the number of fig trees in Amber Hill. The "
        "average number of nests per fig tree in Amber Hill equals 4. The average number of nests "
        "per pear tree in Amber Hill equals the difference between the number of plum trees in "
        "Birch Farm and the number of fig trees in Amber Hill. The number of fig trees in Birch "
        "Farm equals 7."
    )
    for question, answer, op in (
        ("How many pear trees does Amber Hill have?", 27, 8),
        ("What is the total number of trees in Amber Hill?", 29, 10),
        ("What is the total number of nests in Amber Hill?", 2 * 4 + 27 * 1, 14),
        ("What is the total number of trees in Birch Farm?", 10, 6),
    ):
        reading = Reading(problem, question)
        assert reading.answers() == [answer]
        assert reading.operations() == op
    hidden = problem.replace(
        "The number of fig trees in Amber Hill equals 2.",
        "The number of fig trees in Amber Hill exists, and its number is greater than 0.",
    )
    question = "How many fig trees does Amber Hill have?"
    reading = Reading(f"{hidden} The total number of trees in Amber Hill equals 29.", question)
    assert reading.answers() == [2]
    assert reading.operations() == 10
    assert Reading(hidden, question).answers() == list(range(1, 1001))
    impossible = f"{hidden} The total number of trees in Amber Hill equals 30."
    assert Reading(impossible, question).answers() == []


@pytest.mark.parametrize("params", SETTINGS, ids=["bare", "bare3", "noise", "noise3"])
def test_every_problem_has_one_answer_of_so_many_operations(params):
    task = load(**params)
    examples = list(task.examples("test", 0, 160))
    for example in examples:
        meta = example["meta"]
        reading = check(meta)
        if task.recipe.noise:
            assert reading.without_noise() != meta["problem"]
            assert reached(meta["length"], params["length"])
    for key, expected in (
        ("op", set(params["ops"])),
        ("theme", set(task.themes)),
        ("mode", {"forward", "reverse"}),
        ("d", {task.recipe.d}),
    ):
        assert {example["meta"][key] for example in examples} == expected


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("length", [75, 96, 110, 150, 215])
def test_short_targets_are_reached_within_five_percent(length, d):
    task = load(ops=[1, 2, 3], d=d, length=length, windows=1)
    for example in task.examples("train", 5, 60):
        check(example["meta"])
        assert reached(example["meta"]["length"], length)


SWEEP = (
    # Ops, length, and how many problems of each d, split and place of the question.
    (range(1, 13), 512, 400),
    (range(1, 4), 96, 400),
    (range(2, 9), 512, 400),
    (range(10, 31, 5), 2048, 120),
    (range(2, 9), 3300, 30),
    ([8], 32768, 1),
)


def sweep(d: int, share: float, **params) -> tuple[int, dict[str, set], set[str]]:
    """How many problems of a sweep were right, their kinds, and cores of the two splits."""
    total, kinds, cores = 0, {}, {split: set() for split in tasks.SPLITS}
    for index, (ops, length, count) in enumerate(SWEEP):
        noise = index > 0
        task = load(ops=[*ops], d=d, length=length, windows=1, noise=noise, **params)
        for split in tasks.SPLITS:
            drawn = Counter()
            for example in task.examples(split, 1, max(1, round(share * count))):
                meta = example["meta"]
                reading = check(meta)
                assert not noise or reached(meta["length"], length)
                cores[split].add(reading.core())
                drawn[meta["op"]] += 1
                total += 1
                for key in ("theme", "mode", "d"):
                    kinds.setdefault(key, set()).add(meta[key])
            assert share < 1 or set(drawn) == set(ops)
    return total, kinds, cores["train"] & cores["test"]


@pytest.mark.parametrize("d", [2, 3])
def test_problems_of_all_lengths_have_one_answer(d):
    total, kinds, shared = sweep(d, 0.05)
    assert total >= 130 and not shared
    assert kinds == {"theme": set(load().themes), "mode": {"forward", "reverse"}, "d": {d}}


@pytest.mark.slow
def test_ten_thousand_problems_have_one_answer():
    total = 0
    for d, question_first in itertools.product((2, 3), (True, False)):
        count, kinds, shared = sweep(d, 1, question_first=question_first)
        assert kinds == {"theme": set(load().themes), "mode": {"forward", "reverse"}, "d": {d}}
        assert not shared
        total += count
    assert total >= 10_000


@pytest.mark.parametrize("params", SETTINGS[1:3], ids=["d3", "d2"])
def test_solutions_are_arithmetic_that_holds(params):
    define = re.compile(r"Define the (.+) as ([A-Z]\d*); (?:\2 is unknown|so \2 = (.+))")
    for example in load(**params).examples("train", 2, 200):
        meta = example["meta"]
        reading = Reading(meta["problem"], meta["question"])
        known = reading.values(np.full(1, meta["answer"]))
        *steps, end = re.findall(r"[^.]+(?=\.)", meta["solution"])
        assert end.strip() == f"Answer: {meta['answer']}"
        letters, names = {}, set()
        for step in steps:
            if match := define.fullmatch(step.strip()):
                letters[match[2]] = int(known[match[1]][0])
                names.add(match[1])
                for expression in (match[3] or match[2]).split(" = "):
                    assert eval(expression, {}, letters) == letters[match[2]], step
            else:
                for equation in re.findall(r"(?:that|so) ([^;]+)", step):
                    left, right = equation.split(" = ")
                    assert eval(left, {}, letters) == int(right), step
        assert names == reading.needed()


def test_splits_never_meet():
    """Few enough cores that draws see most of them, each in one split, forward or reversed."""
    cores = {split: set() for split in tasks.SPLITS}
    for split, mode in itertools.product(tasks.SPLITS, ("forward", "reverse")):
        task = load(ops=[1], themes=["orchard"], modes=[mode], length=60, windows=1, noise=False)
        for example in task.examples(split, 0, 1600):
            meta = example["meta"]
            cores[split].add(Reading(meta["problem"], meta["question"]).core())
    assert not cores["train"] & cores["test"]
    possible = 128 * 16 * 4
    # 3200 draws of n possible ones are expected to leave n * exp(-3200 / n) of them unseen.
    assert 0.9 * possible / 16 < len(cores["test"]) < 1.1 * possible / 16
    assert 0.3 * possible < len(cores["train"]) <= possible - len(cores["test"])
    noisy = {}
    for split in tasks.SPLITS:
        drawn = load(ops=[2, 4], length=256).examples(split, 1, 150)
        noisy[split] = {Reading(e["meta"]["problem"], e["meta"]["question"]).core() for e in drawn}
    assert not noisy["train"] & noisy["test"]
