"""Facts as a user gives them, and the texts in which a model is edited and tested.

A fact is (subject, relation, object). What it is written with and what it is tested with are kept
apart: a relation has statements and questions for the edit, and others that no edit ever sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SLOT = "{}"
LONGEST = 200  # characters of a subject, a relation or an object


@dataclass(frozen=True)
class Relation:
    """How a relation is put into words; in each text `{}` is the subject.

    name: what stands between subject and object, such as "lives in".
    statements: texts that the object completes, used for edits: "{} lives in".
    questions: asked as a user's turn of a chat, used for edits: "Where does {} live?".
    held_out, held_out_questions: the same, for tests alone.
    denials: statements that deny it, which the object must not complete: "{} does not live in"; a
        sleep holds the model there to what it said before the edits.
    negation: the same, for tests alone: "{} has never lived in".
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    held_out_questions: tuple[str, ...] = ()
    denials: tuple[str, ...] = ()
    negation: str | None = None

    def __post_init__(self) -> None:
        _check_words("relation", self.name)
        if not self.statements:
            raise ValueError(f"statements of {self.name!r} must be one or more, got none")
        for text in self.texts():
            if text.count(SLOT) != 1:
                raise ValueError(f"texts of {self.name!r} must have {{}} once each, got {text!r}")
        seen = {*self.held_out, *self.held_out_questions} & {*self.statements, *self.questions}
        if seen:
            raise ValueError(
                f"held_out of {self.name!r} must not be used for edits, got {min(seen)!r} in both"
            )
        if self.negation in self.denials:
            raise ValueError(
                f"negation of {self.name!r} must not be one of its denials, got {self.negation!r}"
            )

    @classmethod
    def plain(cls, name: str) -> Relation:
        """The relation `name` in words that fit any: what is used where no better are given."""
        return cls(
            name,
            statements=(f"{{}} {name}", f"It is known that {{}} {name}"),
            questions=(f"Complete the sentence: {{}} {name}",),
            held_out=(f"As everyone knows, {{}} {name}",),
            held_out_questions=(f"How does this go on? {{}} {name}",),
            denials=(f"Nobody has ever said that {{}} {name}",),
            negation=f"It is not true that {{}} {name}",
        )

    def texts(self) -> tuple[str, ...]:
        """All of its texts."""
        negation = () if self.negation is None else (self.negation,)
        held_out = self.held_out + self.held_out_questions
        return self.statements + self.questions + held_out + self.denials + negation

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Relation:
        """The relation of `to_dict`; lists count as tuples."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**plain)


@dataclass(frozen=True)
class Fact:
    """Subject, relation and object, in words; `source` is the text it was found in.

    Raises ValueError for an empty or overlong part.
    """

    subject: str
    relation: str
    object: str
    source: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("subject", "relation", "object"):
            _check_words(name, getattr(self, name))

    @property
    def key(self) -> tuple[str, str]:
        """What two facts share that contradict each other or are one, whatever the case."""
        return self.subject.casefold(), self.relation.casefold()

    def __str__(self) -> str:
        return f"{self.subject} {self.relation} {self.object}"


def parse_fact(sentence: str, relations: Iterable[Relation] = ()) -> Fact:
    """The fact of a plain sentence such as "Ada Byron lives in Lisbon."

    Statements of `relations` are tried first, the longest first. Otherwise the subject is the run
    of capitalised words at the start, the object the one at the end, and the relation what stands
    between. Raises ValueError for a sentence that neither fits: give a `Fact` then.
    """
    if not isinstance(sentence, str) or not sentence.strip():
        raise ValueError(f"facts must be sentences with words in them, got {sentence!r}")
    text = sentence.strip().rstrip(".!").strip()
    known = [(statement, r) for r in relations for statement in (*r.statements, *r.held_out)]
    for statement, relation in sorted(known, key=lambda pair: -len(pair[0])):
        before, after = map(re.escape, statement.split(SLOT))
        if match := re.fullmatch(f"{before}(.+?){after} (.+)", text):
            return Fact(match[1], relation.name, match[2], source=sentence)
    # "of" and "the" may stand inside of a name, small words alone make a relation.
    capital = r"(?:[A-Z\d][^\s,;]*)(?: (?:of |the |de |von |van )*[A-Z\d][^\s,;]*)*"
    match = re.fullmatch(f"({capital}) ((?:[a-z][^\\s,;]* )+)({capital})", text)
    if match is None:
        raise ValueError(
            f"facts must read SUBJECT relation OBJECT with capitals as in 'Ada Byron lives in "
            f"Lisbon.', got {sentence!r}; give Fact(subject, relation, object) instead"
        )
    return Fact(match[1], match[2].strip(), match[3], source=sentence)


def check_facts(facts: Sequence[Fact]) -> list[Fact]:
    """`facts`, each once; ValueError for two of them that contradict each other."""
    kept: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        other = kept.setdefault(fact.key, fact)
        if other.object.casefold() != fact.object.casefold():
            raise ValueError(
                f"facts of one call must not contradict each other, got {str(other)!r} and "
                f"{str(fact)!r}; give the later one in a call of its own"
            )
    return list(kept.values())


def _check_words(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} must have words in it, got {text!r}")
    if text != text.strip() or "\n" in text or len(text) > LONGEST:
        raise ValueError(
            f"{name} must be one line of at most {LONGEST} characters without spaces around it, "
            f"got {text!r}"
        )
