"""Facts that were only read, on a page of plain sentences: nights over it, and plain training.

Nobody says which facts the page has. In which words they will be asked is told to one night alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from hybrid_sleep.eval.facts.baselines import FineTuning, Method
from hybrid_sleep.eval.facts.measured import known_pairs
from hybrid_sleep.eval.facts.subjects import Subject
from hybrid_sleep.parametric.dreams.dream import ACQUISITION
from hybrid_sleep.parametric.facts import SLOT, Fact
from hybrid_sleep.parametric.memory import Memory
from hybrid_sleep.parametric.options import MemoryOptions
from hybrid_sleep.sleep.weights import rollback, snapshot


def lines(method: Method, facts: Sequence[Fact]) -> list[str]:
    """The page: each fact in the first statement of its relation, on a line of its own."""
    return [method.sentence(fact) for fact in facts]


class PageTuning(FineTuning):
    """Gradient steps on all parameters over the page's lines, until they are known."""

    name = "fine-tuning on the page"

    def texts(self, facts: Sequence[Fact]) -> list[tuple[list[int], int]]:
        """Every token of every line is to be learned."""
        return [self._row("", text) for text in lines(self, facts)]


class Night(Method):
    """The page is kept as experience, and one sleep is over it: dreams, foundations, EWC, the gate.

    record: of the sleep, once there was one.
    """

    name = "a night over the page"

    def __init__(self, model: Any, subject: Subject, options: MemoryOptions):
        super().__init__(model, subject.tokenizer, subject.relations)
        self.subject, self.options = subject, options
        self.record: Any = None

    def __enter__(self) -> Self:
        self._undo.callback(rollback, self.model, snapshot(self.model))
        self._folder = self._undo.enter_context(TemporaryDirectory())
        return super().__enter__()

    def learn(self, facts: Sequence[Fact]) -> None:
        """Read by day, sleep by night; what the gate takes back was in vain."""
        subject = self.subject
        with Memory.open(
            Path(self._folder) / "memory",
            self.model,
            self.tokenizer,
            known=known_pairs(subject),
            corpus=subject.corpus,
            ordinary=subject.ordinary,
            options=self.options,
        ) as memory:
            prompts: dict[int, list[str]] = {}
            for fact, text in zip(facts, lines(self, facts), strict=True):
                kept, asked = memory.experience(text, consent=True), self.asked(fact)
                if kept.id is not None and asked:
                    prompts[kept.id] = asked
            self.record = memory.sleep(kind="experience", prompts=prompts)

    def asked(self, fact: Fact) -> list[str]:
        """What the model is asked about a line, with it in its context, to learn from."""
        return []

    @property
    def outcome(self) -> str:
        """How the night ended, and what it took."""
        record = self.record
        study = record.gate.get("study")
        if study is None:
            return record.ended
        mixed = study["mix"]["tokens"]
        dreams = study["dreams"].get(ACQUISITION, {"made": 0, "kept": 0})
        return (
            f"{record.ended}; trained on {sum(mixed.values()):,} tokens, "
            f"{dreams['kept']} of {dreams['made']} dreams kept, {study['answers']} answers"
        )


class AskedNight(Night):
    """The same, and the model is told what it will be asked, in the words that edits see, too.

    No answer is told: it answers by itself, right or wrong, with the line in its context.
    """

    name = "a night over the page, asked"

    def asked(self, fact: Fact) -> list[str]:
        """The questions of its relation but for those held out."""
        return [text.replace(SLOT, fact.subject) for text in self.relation(fact).questions]
