"""Facts that were only read, on a page of plain sentences: a night over it, and plain training.

Nobody says which facts the page has, or in which words they will be asked.
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
from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.memory import Memory
from hybrid_sleep.parametric.options import MemoryOptions
from hybrid_sleep.sleep.weights import rollback, snapshot

PARAGRAPH = 3  # sentences


def paragraphs(method: Method, facts: Sequence[Fact]) -> list[str]:
    """The page: each fact in the first statement of its relation, a few to a paragraph."""
    said = [method.sentence(fact) for fact in facts]
    return [" ".join(said[i : i + PARAGRAPH]) for i in range(0, len(said), PARAGRAPH)]


class PageTuning(FineTuning):
    """Gradient steps on all parameters over the page's paragraphs, until they are known."""

    name = "fine-tuning on the page"

    def texts(self, facts: Sequence[Fact]) -> list[tuple[list[int], int]]:
        """Every token of every paragraph is to be learned."""
        return [self._row("", text) for text in paragraphs(self, facts)]


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
            for text in paragraphs(self, facts):
                memory.experience(text, consent=True)
            self.record = memory.sleep(kind="experience")

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
            f"{dreams['kept']} of {dreams['made']} dreams kept"
        )
