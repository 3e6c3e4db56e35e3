"""A stream of facts: each task is a session that tells new ones and changes some that were told.

A row is a first token, a statement of four tokens and the object. Each fact is told in all of
`FORMS` but one, and asked in that one, which others are told in: no row for training begins as a
question does. What a session tells may change. Contradicted, a fact is told with one object in the
first half of the session's training and with another in the second, and the later one holds;
updated, it gets another object in a later session.

Every fact belongs to the test of one task: of the session that told it last. So no test has an
answer that turns wrong later, and forgetting is of what is still true. What became of the answers
that are no longer true is measured apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybrid_sleep.eval.continual.stream import TaskStream, answered
from hybrid_sleep.eval.tasks.sampling import Stream
from hybrid_sleep.validation import check_count

BEGIN, IS, OWNS, OF, AS, HAS, FIRST = range(7)
SUBJECT, RELATION = -1, -2
FORMS = (
    (SUBJECT, OWNS, RELATION, IS),
    (RELATION, OF, SUBJECT, IS),
    (SUBJECT, HAS, AS, RELATION),
    (AS, RELATION, SUBJECT, HAS),
    (OF, SUBJECT, RELATION, IS),
)
WORDS = ("<s>", "is", "'s", "of", "as", "has")


@dataclass(frozen=True)
class Telling:
    """What a session says of a subject and a relation: the object that holds behind it.

    first: the object that it says before, where it contradicts itself. former: that of an earlier
    session, where it updates one. All are numbers from 0.
    """

    subject: int
    relation: int
    object: int
    first: int | None = None
    former: int | None = None

    @property
    def of(self) -> tuple[int, int]:
        """Subject and relation."""
        return self.subject, self.relation


@dataclass(frozen=True)
class FactStream(TaskStream):
    """`sessions` sessions; each tells one fact for each of `relations` about `subjects` new
    subjects, `contradictions` of them with two objects, and updates `updates` earlier facts.

    objects: of each relation. controls: subjects of the first session of which nothing is ever
    contradicted or updated. seed: of who, what and which. Raises ValueError for numbers that cannot
    be, or that leave a session without a fact that holds to the end.
    """

    name: ClassVar[str] = "facts"

    sessions: int = 3
    subjects: int = 12
    relations: int = 2
    objects: int = 16
    updates: int = 4
    contradictions: int = 4
    controls: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("sessions", self.sessions)
        check_count("subjects", self.subjects)
        check_count("relations", self.relations)
        check_count("objects", self.objects, 2)
        check_count("seed", self.seed, 0)
        check_count("controls", self.controls, 0, self.subjects)
        most = (self.subjects - self.controls) * self.relations
        check_count("updates", self.updates, 0, most)
        check_count("contradictions", self.contradictions, 0, most)
        for session in range(self.sessions):
            if not self.questions(session):
                raise ValueError(
                    "updates must leave every session a fact that none changes, got "
                    f"{self.updates}, which leave session {session + 1} none"
                )

    @property
    def tasks(self) -> list[str]:
        """Sessions, from 1."""
        return [f"session {i + 1}" for i in range(self.sessions)]

    @property
    def measured(self) -> str:
        """Each fact counts once."""
        return (
            "facts that a session told last, each asked in the one form in which it is never told, "
            "of which the object is the likeliest token"
        )

    @property
    def about(self) -> str:
        """How many facts, and what happens to them."""
        return (
            f"{self.sessions} sessions of {self.subjects * self.relations} new facts with "
            f"{self.objects} possible objects; each contradicts {self.contradictions} of its own, "
            f"the later holds, and from the second on updates {self.updates} of earlier ones. "
            f"Controls: the {self.controls * self.relations} facts about subjects of which nothing "
            "changes. Apart from the tests: of facts that were updated, or contradicted, how many "
            "are answered with the one object and the other; and how many of all that hold are "
            f"known in the forms in which they were told. Facts of seed {self.seed}."
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    @property
    def vocab_size(self) -> int:
        """First token, words, subjects, relations, and objects of each relation."""
        return self._objects + self.relations * self.objects

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return len(FORMS[0]) + 2

    @property
    def begin(self) -> int:
        """The first token."""
        return BEGIN

    @cached_property
    def told(self) -> list[list[Telling]]:
        """What each session says, one telling for a fact; updates behind what is new."""
        source = Stream(self.seed)
        holds: dict[tuple[int, int], Telling] = {}
        sessions = []
        for session in range(self.sessions):
            new = [
                Telling(session * self.subjects + i, relation, source.below(self.objects))
                for i in range(self.subjects)
                for relation in range(self.relations)
            ]
            free = [i for i, x in enumerate(new) if x.subject >= self.controls]
            for at in source.distinct(len(free), self.contradictions):
                i = free[at]
                new[i] = replace(new[i], first=self._other(new[i].object, source))
            updates = []
            earlier = [x for x in holds.values() if x.subject >= self.controls]
            for at in source.distinct(len(earlier), self.updates if session else 0):
                x = earlier[at]
                changed = self._other(x.object, source)
                updates.append(Telling(x.subject, x.relation, changed, former=x.object))
            sessions.append(new + updates)
            holds.update({x.of: x for x in sessions[-1]})
        return sessions

    def questions(self, task: int) -> list[Telling]:
        """The test of `task`: what its session told and no later one changed."""
        later = {x.of for told in self.told[task + 1 :] for x in told}
        return [x for x in self.told[task] if x.of not in later]

    def asked(self, fact: Telling) -> tuple[int, ...]:
        """The form that is kept for the question, whichever session tells the fact."""
        return FORMS[(fact.subject * self.relations + fact.relation) % len(FORMS)]

    def told_in(self, fact: Telling) -> list[tuple[int, ...]]:
        """All other forms."""
        return [form for form in FORMS if form != self.asked(fact)]

    def rows(self, facts: Sequence[Telling], forms: Sequence[tuple[int, ...]]) -> Tensor:
        """Each of `facts` in the form of the same place: ids `[count, length]`."""
        return torch.tensor(
            [[*self._form(x, form), self.id(x.relation, x.object)]
             for x, form in zip(facts, forms, strict=True)]
        )  # fmt: skip

    def id(self, relation: int, object: int) -> int:
        """The token of an object of a relation."""
        return self._objects + relation * self.objects + object

    def words(self, row: Sequence[int]) -> str:
        """A row as text: subjects s0, s1..., relations r0..., objects o0..."""
        ends = (FIRST + self.sessions * self.subjects, self._objects)
        return " ".join(
            WORDS[i] if i < FIRST
            else f"s{i - FIRST}" if i < ends[0]
            else f"r{i - ends[0]}" if i < ends[1]
            else f"o{(i - ends[1]) % self.objects}"
            for i in row
        )  # fmt: skip

    def batch(
        self,
        task: int,
        count: int,
        source: Stream,
        *,
        progress: float | None = 1.0,
        after: int | None = None,
    ) -> Tensor:
        """`count` rows for training, drawn with replacement, each in a form that is drawn as well.

        A contradicted fact has its first object below a `progress` of a half, and the one or the
        other without any.
        """
        changed = {x.of for told in self.told[task + 1 : after or 0] for x in told}
        facts = [x for x in self.told[task] if x.of not in changed]
        drawn, forms = [], []
        for _ in range(count):
            fact = source.pick(facts)
            forms.append(source.pick(self.told_in(fact)))
            if fact.first is not None and (
                source.below(2) == 0 if progress is None else progress < 0.5
            ):
                fact = replace(fact, object=fact.first)
            drawn.append(fact)
        return self.rows(drawn, forms)

    def accuracy(self, model: nn.Module, task: int, *, context: Sequence[int] = ()) -> float:
        """The share of the task's facts of which the object is the likeliest token, when asked."""
        facts = self.questions(task)
        said = self._said(model, facts, list(map(self.asked, facts)), context)
        return sum(a == x.object for a, x in zip(said, facts, strict=True)) / len(facts)

    def apart(
        self, model: nn.Module, learned: int, context: Callable[[int], Sequence[int]]
    ) -> dict[str, float | None]:
        """Shares of the facts that hold when `learned` sessions are over.

        Of updated ones those asked and answered with the new object, and with the former; of
        contradicted ones with the later object, and with the earlier; of controls with theirs; and
        of all of them, asked as they were told.
        """
        holds = {x.of: (session, x) for session in range(learned) for x in self.told[session]}
        facts: list[Telling] = []
        said: list[int] = []
        as_told: list[bool] = []
        for session in range(learned):
            told = [x for at, x in holds.values() if at == session]
            if not told:
                continue
            front = context(session)
            facts += told
            said += self._said(model, told, list(map(self.asked, told)), front)
            each = [(x, form) for x in told for form in self.told_in(x)]
            answers = self._said(model, [x for x, _ in each], [form for _, form in each], front)
            as_told += [a == x.object for a, (x, _) in zip(answers, each, strict=True)]

        def share(
            chosen: Callable[[Telling], bool], answer: Callable[[Telling], int | None]
        ) -> float | None:
            pairs = [(a, answer(x)) for a, x in zip(said, facts, strict=True) if chosen(x)]
            return sum(a == b for a, b in pairs) / len(pairs) if pairs else None

        def updated(x: Telling) -> bool:
            return x.former is not None

        def contradicted(x: Telling) -> bool:
            return x.first is not None

        return {
            "updates: new": share(updated, lambda x: x.object),
            "updates: former": share(updated, lambda x: x.former),
            "contradictions: later": share(contradicted, lambda x: x.object),
            "contradictions: earlier": share(contradicted, lambda x: x.first),
            "controls": share(lambda x: x.subject < self.controls, lambda x: x.object),
            "asked as told": sum(as_told) / len(as_told) if as_told else None,
        }

    def floor(self, task: int) -> float:
        """The share that the best object for each relation, whoever is asked about, gets right."""
        facts = self.questions(task)
        best = 0
        for relation in range(self.relations):
            objects = [x.object for x in facts if x.relation == relation]
            best += max(map(objects.count, objects), default=0)
        return best / len(facts)

    @property
    def _objects(self) -> int:
        return FIRST + self.sessions * self.subjects + self.relations

    def _form(self, fact: Telling, form: tuple[int, ...]) -> list[int]:
        """First token and statement, the object left out."""
        ids = {
            SUBJECT: FIRST + fact.subject,
            RELATION: FIRST + self.sessions * self.subjects + fact.relation,
        }
        return [BEGIN, *(ids.get(part, part) for part in form)]

    def _said(
        self,
        model: nn.Module,
        facts: Sequence[Telling],
        forms: Sequence[tuple[int, ...]],
        context: Sequence[int],
    ) -> list[int]:
        """The object that is answered for each of `facts`, another number where it is none."""
        prompts = torch.tensor([self._form(x, f) for x, f in zip(facts, forms, strict=True)])
        said = answered(model, prompts, context, lambda logits: logits[:, -1].argmax(-1))
        return [
            token - self.id(x.relation, 0) for token, x in zip(said.tolist(), facts, strict=True)
        ]

    def _other(self, object: int, source: Stream) -> int:
        """One of the other objects."""
        return (object + 1 + source.below(self.objects - 1)) % self.objects
