"""What is compared: ways to write facts into weights, and to keep them by sleep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from hybrid_sleep.eval.facts.settings import Settings
from hybrid_sleep.parametric.memory import Memory
from hybrid_sleep.parametric.options import MemoryOptions
from hybrid_sleep.parametric.probes import audit
from hybrid_sleep.parametric.record import Record
from hybrid_sleep.parametric.schema import WRITTEN
from hybrid_sleep.parametric.solve import Spectrum
from hybrid_sleep.parametric.statistics import KeyStatistics

CYCLES = 5
REFRESHED = 10
EARLIER_WEIGHT, EARLIER_KL = 0.1, 0.0625


class EarlierSystem(Memory):
    """The recipe of the system that named this idea, as far as these parts allow.

    It knows only the variance of each entry of a key, and its sleep writes facts that are not
    stated any more again, one by one; nothing is gated. Its code takes the variance about the mean,
    steps of plain SGD and no clamp.
    """

    def statistics(self) -> dict[Any, KeyStatistics]:
        """Those of `Memory` without what entries have to do with each other."""
        return {
            site: KeyStatistics(_diagonal(found.spectrum), found.made_from)
            for site, found in super().statistics().items()
        }

    def sleep_over_facts(self, progress: Any = None) -> Record:
        """Write up to ten facts anew that are not stated; what others have is preserved."""
        written = self.facts(WRITTEN)
        pairs = [(x.fact, self.relation(x.fact.relation)) for x in written]
        results = audit(self.model, self.tokenizer, pairs)
        lost = [x.fact for x, r in zip(written, results, strict=True) if not r["statement"]]
        record = Record("sleep", read={"facts": len(written), "lost": len(lost)})
        if not lost:
            record.outcome, record.why = "nothing to do", "every fact is stated"
            return record
        before = self.options
        self.options = replace(before, wake=replace(before.wake, accumulate=True))
        try:
            for fact in lost[:REFRESHED]:
                self.forget(fact.subject, fact.relation)
                self.learn(fact)
        finally:
            self.options = before
        record.changed = self.edited.change()
        return record


def _diagonal(spectrum: Spectrum) -> Spectrum:
    d, m = spectrum.vectors.shape
    inside = spectrum.vectors.square()
    values = inside @ spectrum.values + spectrum.floor * (1 - inside.sum(1))
    eye = torch.eye(d, dtype=torch.float64, device=spectrum.values.device)
    return Spectrum(eye, values.clamp(min=0))


@dataclass(frozen=True)
class Arm:
    """A way to learn and sleep: the `options` that it makes of a model's, and the object.

    whole: whether a second wave, a restart and answers behind slept windows are measured too.
    """

    label: str
    options: Callable[[Settings], MemoryOptions] = lambda settings: settings.memory
    kind: type[Memory] = Memory
    whole: bool = False


def _both(options: MemoryOptions, **changes: Any) -> MemoryOptions:
    return replace(
        options, wake=replace(options.wake, **changes), night=replace(options.night, **changes)
    )


def _unprotected(settings: Settings) -> MemoryOptions:
    options = settings.memory
    return replace(options, wake=replace(options.wake, accumulate=False))


def _null(settings: Settings) -> MemoryOptions:
    return _both(settings.memory, filter="null", weight=settings.alike_weight)


def _none(settings: Settings) -> MemoryOptions:
    return _both(settings.memory, filter="none", weight=settings.alike_weight)


def _few(settings: Settings) -> MemoryOptions:
    options, wake = settings.memory, settings.memory.wake
    night = replace(options.night, statements=wake.statements, questions=wake.questions)
    return replace(options, night=night)


def _earlier(settings: Settings) -> MemoryOptions:
    options = settings.memory
    wake = replace(
        options.wake,
        weight=EARLIER_WEIGHT,
        position="prompt_last",
        statements=1,
        questions=0,
        accumulate=False,
        target=replace(options.wake.target, kl=EARLIER_KL),
        # It does not ask whether a fact can be held.
        hopeless=float(torch.finfo(torch.float32).max),
    )
    return replace(options, wake=wake)


ARMS = {
    "accumulate": Arm("accumulation", whole=True),
    "unprotected": Arm("no protection at wake", _unprotected),
    "null": Arm("null space", _null),
    "none": Arm("no statistics", _none),
    "few": Arm("slept in the wake's wordings", _few),
    "earlier": Arm("earlier system's recipe", _earlier, EarlierSystem, whole=True),
}
BASELINES = {
    "fine-tuning": "fine-tuning",
    "lora": "LoRA",
    "page": "fine-tuning on a page of them",
    "night": "a night over that page",
    "asked": "a night over the page, asked",
    "prompt": "all facts in the prompt",
    "retrieval": "retrieved facts in the prompt",
}


def cycles(memory: Memory) -> Iterator[Record]:
    """Sleeps until there is nothing more to do, one is rolled back, or `CYCLES` are over."""
    for _ in range(CYCLES):
        record = memory.sleep()
        yield record
        if record.outcome != "committed":
            return
