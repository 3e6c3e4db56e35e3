"""Ways to keep what a day's text said once its cache is gone: a night, parts of it, plain training.

Every arm that trains goes through as many tokens of a day.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybrid_sleep.eval.bridge.texts import Day, Texts
from hybrid_sleep.parametric import CachedContext, Memory, MemoryOptions, StudyOptions, Thresholds
from hybrid_sleep.parametric.mix import Shares
from hybrid_sleep.sleep.cache import SleepCache
from hybrid_sleep.training.loop import fit
from hybrid_sleep.training.optimizer import optimizer_for

# Texts that a memory gets, the seed of each kind and how many.
ROWS = {"corpus": (1, 512), "known": (2, 64), "ordinary": (3, 16)}


@dataclass(frozen=True, kw_only=True)
class Night:
    """How a day is learned.

    tokens: trained on; rows: of a step. samples: texts that the model writes on from a cache.
    recent: the share of tokens of these, others are texts of the corpus; rate: of AdamW; own_recent
    and own_rate: both without prompts; plain: the rate of fine-tuning. strength: of EWC; measured:
    rows its importance is of. locality and perplexity: what the gate asks for on other texts.
    """

    tokens: int = 6000
    rows: int = 8
    samples: int = 64
    recent: float = 0.2
    rate: float = 1.5e-3
    own_recent: float = 0.5
    own_rate: float = 3e-3
    plain: float = 1e-3
    strength: float = 0.1
    measured: int = 64
    locality: float = 0.95
    perplexity: float = 1.5


class Arm(ABC):
    """Learns days one after another by `model`; `learn` is called once for each."""

    label: ClassVar[str]

    def __init__(self, model: Any, texts: Texts, night: Night, seed: int, folder: Path):
        self.model, self.texts, self.night, self.seed = model, texts, night, seed
        self.folder = folder

    @abstractmethod
    def learn(self, day: Day, cache: SleepCache) -> str:
        """Learn of `day` from its text, or from the `cache` that it was read into; the outcome."""


class NoSleep(Arm):
    """Nothing is learned: what the cache had goes with it."""

    label = "no sleep"

    def learn(self, day: Day, cache: SleepCache) -> str:
        """Nothing happens."""
        return "nothing to do"


class FineTuning(Arm):
    """Plain training on the text."""

    label = "fine-tuning on the text"

    def learn(self, day: Day, cache: SleepCache) -> str:
        """Train on the text alone, as often as it takes to go through the tokens."""
        night = self.night
        rows = torch.tensor([day.text] * night.rows)

        def batches() -> Iterator[dict[str, Tensor]]:
            while True:
                yield {"input_ids": rows, "labels": rows.clone()}

        steps = math.ceil(night.tokens / rows.numel())
        optimizer = optimizer_for(self.model, None, night.plain)
        fit(self.model, batches(), steps=steps, optimizer=optimizer, schedule="linear")
        return "trained"


class Sleep(Arm):
    """`Memory.sleep(caches=...)` with what will be asked as prompts, foundations, EWC, the gate."""

    label = "sleep over the cache"
    guarded: ClassVar[bool] = True
    prompted: ClassVar[bool] = True

    def opened(self) -> Memory:
        """The memory in the arm's folder."""
        rows = {
            name: self.texts.rows("train", seed + 10 * self.seed, count).tolist()
            for name, (seed, count) in ROWS.items()
        }
        answer = int(self.texts.answers[0])
        known = [
            (self.texts.words(row[:answer]), self.texts.words(row[answer : answer + 1]))
            for row in rows.pop("known")
        ]
        options = None if (self.folder / "memory.json").exists() else self.options()
        return Memory.open(
            self.folder, self.model, self.texts.tokenizer(), options=options, known=known, **rows
        )

    def options(self) -> MemoryOptions:
        """Of the memory; the gate is about this task's questions and texts alone."""
        night, window = self.night, self.texts.window
        recent = night.recent if self.prompted else night.own_recent
        study = StudyOptions(
            tokens=night.tokens,
            rows=night.rows,
            rate=night.rate if self.prompted else night.own_rate,
            samples=night.samples,
            length=1 if self.prompted else window - 1,
            shares=Shares(recent, 0.0, 1 - recent),
            strength=night.strength if self.guarded else 0.0,
            measured=night.measured,
        )
        thresholds = Thresholds(
            recall=None, paraphrase=None, negation=None, locality=night.locality,
            perplexity_ratio=night.perplexity,
        )  # fmt: skip
        return MemoryOptions(thresholds=thresholds, study=study, seed=self.seed)

    def learn(self, day: Day, cache: SleepCache) -> str:
        """One night."""
        prompts = [question for question, _ in day.questions] if self.prompted else ()
        context = CachedContext(cache, prompts, day.questions)
        with self.opened() as memory:
            record = memory.sleep(kind="experience", caches=[context])
        return record.ended


class Unguarded(Sleep):
    """The same without EWC."""

    label = "sleep over the cache, no EWC"
    guarded = False


class OwnText(Sleep):
    """The same without prompts: nobody says what will be asked."""

    label = "sleep over the cache, no prompts"
    prompted = False


ARMS: dict[str, type[Arm]] = {
    "none": NoSleep,
    "fine-tuning": FineTuning,
    "sleep": Sleep,
    "unguarded": Unguarded,
    "own-text": OwnText,
}
