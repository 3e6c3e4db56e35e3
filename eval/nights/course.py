"""The nights of one seed: what is taught by day, and what is measured after each sleep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hybrid_sleep.eval.facts.measured import Knowledge, Point, bytes_of, known_pairs, look
from hybrid_sleep.eval.facts.settings import SETTINGS
from hybrid_sleep.eval.facts.subjects import WORLD, Subject, subject_of
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.facts import SLOT, Fact
from hybrid_sleep.parametric.measure import ask, chat_prompt, mentions
from hybrid_sleep.parametric.memory import Memory
from hybrid_sleep.parametric.mix import Shares
from hybrid_sleep.parametric.options import MemoryOptions
from hybrid_sleep.parametric.record import Record
from hybrid_sleep.support.resume import Row

REPLY = 24  # tokens

# The small world's models write nothing that parses as a dream: what was said is repeated instead.
STUDY = StudyOptions(
    band=(0, 100), share=1.0, dreams=0, shares=Shares(0.1, 0.0, 0.9), tokens=64000, passes=45.0,
    rate=2.5e-4, rehearsed=0.15, strength=10.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evening:
    """One night, with the day before it, and what was measured afterwards; night 0: before any.

    facts: see `facts.measured.Point`, of all facts so far. told: of each day so far, the share of
    what was told that day and is answered when asked as it was told; reworded: in other words.
    experience: how the sleep over experience ended. reported: what its records say of the weights
    in the end. store: bytes of facts, edits and experience; weights: bytes of trained weights that
    are kept for `undo`; folder: of all. learned: seconds at wake.
    """

    night: int
    facts: Point
    told: list[float]
    reworded: list[float]
    experience: str
    reported: dict[str, float | None]
    store: int
    weights: int
    folder: int
    learned: float


def options(study: StudyOptions, seed: int = 0) -> MemoryOptions:
    """Of the small world's memory."""
    return replace(SETTINGS["world"].memory, study=study, seed=seed)


def subject(seed: int, facts: int) -> Subject:
    """The small world of `seed`, with so many facts to learn."""
    return subject_of(WORLD, seed, 0, facts)


def told_facts(found: Subject, count: int) -> list[Fact]:
    """`count` facts about people that no other fact is about, for users to tell."""
    assert found.world is not None
    taken = {fact.subject for fact in (*found.facts, *found.more)}
    spare = found.world.unseen_facts(count + len(taken), seed=1)
    return [fact for fact in spare if fact.subject not in taken][:count]


def said_of_the_end(*records: Record) -> dict[str, float | None]:
    """What the records of a night, the first one first, say of the weights that it ended with.

    What was measured of a sleep that was taken back is of weights that are gone.
    """
    found: dict[str, float | None] = {}
    for record in records:
        found = record.gate.get("after" if record.outcome == "committed" else "before", found)
    return found


class Course:
    """A memory in `folder` that learns `facts` facts and is told `told` ones, a day and night."""

    def __init__(self, key: Row, folder: Path):
        self.key, self.folder = key, folder
        self.subject = subject(key["seed"], key["nights"] * key["facts"])
        self.told = told_facts(self.subject, key["nights"] * key["told"])
        self.waiting: list[Fact] = []
        self.relations = {relation.name: relation for relation in self.subject.relations}

    def run(self) -> Row:
        """All nights; what a `NightsRow` says beside its key."""
        key, found = self.key, self.subject
        with Memory.open(
            self.folder,
            found.load(),
            found.tokenizer,
            relations=found.relations,
            known=known_pairs(found),
            corpus=found.corpus,
            ordinary=found.ordinary,
            options=MemoryOptions.from_dict(key["settings"]),
        ) as self.memory:
            evenings = [self._evening(0, 0.0, None, None)]
            evenings += [self._night(night) for night in range(1, key["nights"] + 1)]
        return {
            "parameters": sum(p.numel() for p in self.memory.model.parameters()),
            "evenings": [asdict(evening) for evening in evenings],
        }

    def _night(self, night: int) -> Evening:
        key, memory = self.key, self.memory
        began = time.perf_counter()
        for fact in self._of(self.subject.facts, night, key["facts"]):
            memory.learn(fact)
        heard = self._of(self.told, night, key["told"])
        for fact in heard:
            memory.experience(fact.object, prompt=self._asked(fact), consent=True)
        learned = time.perf_counter() - began
        began = time.perf_counter()
        # With what an earlier night was over and did not keep.
        self.waiting += heard
        questions = [(self._asked(fact), fact.object) for fact in self.waiting]
        first = memory.sleep(kind="experience", questions=questions)
        if first.outcome == "committed":
            self.waiting = []
        done = memory.sleep()
        return self._evening(night, learned, time.perf_counter() - began, (first, done))

    def _of(self, facts: Sequence[Fact], night: int, each: int) -> Sequence[Fact]:
        return facts[(night - 1) * each : night * each]

    def _asked(self, fact: Fact, *, reworded: bool = False) -> str:
        relation = self.relations[fact.relation]
        asked = relation.held_out_questions if reworded else relation.questions
        return asked[0].replace(SLOT, fact.subject)

    def _evening(
        self,
        night: int,
        learned: float,
        seconds: float | None,
        records: tuple[Record, Record] | None,
    ) -> Evening:
        key, memory = self.key, self.memory
        live = self.subject.facts[: night * key["facts"]]
        experience, outcome, reported = "", "", {}
        if records is not None:
            first, last = records
            experience, outcome = first.ended, last.ended
            reported = said_of_the_end(first, last)
        point = look(
            f"night {night}" if night else "before",
            memory.model,
            self.subject,
            live or self.subject.facts,
            Knowledge(memory.probes, memory.baseline),
            taught=len(live),
            changed=max(memory.edited.change().values(), default=0.0),
            bytes=bytes_of(self.folder),
            seconds=seconds,
            outcome=outcome,
        )
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        weights = sum(p.stat().st_size for p in files if p.name.startswith("weights-"))
        return Evening(
            night=night,
            facts=point,
            told=self._answered(night, reworded=False),
            reworded=self._answered(night, reworded=True),
            experience=experience,
            reported=reported,
            store=bytes_of(self.folder) - weights,
            weights=weights,
            folder=sum(path.stat().st_size for path in files),
            learned=learned,
        )

    def _answered(self, nights: int, *, reworded: bool) -> list[float]:
        """Of each day up to `nights`, the share of what was told that is answered."""
        memory, each = self.memory, self.key["told"]
        facts = self.told[: nights * each]
        if not facts:
            return []
        prompts = [
            chat_prompt(memory.tokenizer, self._asked(fact, reworded=reworded)) for fact in facts
        ]
        said = ask(memory.model, memory.tokenizer, prompts, tokens=REPLY)
        right = [mentions(text, fact.object) for text, fact in zip(said, facts, strict=True)]
        return [sum(right[i : i + each]) / each for i in range(0, len(right), each)]
