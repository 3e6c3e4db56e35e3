"""A sleep over experience: choose, dream, train under a guard, measure, commit or roll back.

Progress & Compress (arXiv 1805.06370) with the model before the sleep as the active column, which
has in its context, or in the fast weights of a cache, what the model afterwards has not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hybrid_sleep.parametric.ewc import OnlineEWC
from hybrid_sleep.parametric.experience.choice import Chosen
from hybrid_sleep.parametric.experience.context import CachedContext, serving
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.experience.questions import Question, answered
from hybrid_sleep.parametric.experience.study import Study, prepare
from hybrid_sleep.parametric.fisher import covered
from hybrid_sleep.parametric.gate import Measured, judge
from hybrid_sleep.parametric.lessons import Lesson, lesson_loss
from hybrid_sleep.parametric.probes import audit, measure
from hybrid_sleep.parametric.record import Record
from hybrid_sleep.parametric.schema import WRITTEN
from hybrid_sleep.training.loop import fit
from hybrid_sleep.training.optimizer import optimizer_for

if TYPE_CHECKING:
    from hybrid_sleep.parametric.experience.buffer import Buffer
    from hybrid_sleep.parametric.memory import Memory
    from hybrid_sleep.parametric.store import FactStore

GUARD = "guard.safetensors"
Progress = Callable[[str, int, int], None]


def consolidate(
    memory: Memory,
    buffer: Buffer | None,
    contexts: Sequence[CachedContext] = (),
    **how: Any,
) -> Record:
    """What `Memory.sleep(kind="experience")` does; buffer: None where nothing was ever kept."""
    with serving(memory.model, contexts):
        return _consolidate(memory, buffer, contexts, **how)


def _consolidate(
    memory: Memory,
    buffer: Buffer | None,
    contexts: Sequence[CachedContext],
    *,
    questions: Sequence[tuple[str, str]] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Record:
    began = time.perf_counter()
    options, model = memory.options.study, memory.model
    record = Record("experience")
    chosen = Chosen((), (), 0)
    if buffer is not None:
        chosen = buffer.chosen(
            options.recent, seed=memory.options.seed, band=options.band, share=options.share
        )
    if questions and contexts and not chosen.experiences:
        raise ValueError(
            "questions must be about experience, of which there is none to learn from, got "
            f"{len(questions)}; those about a cache belong to its CachedContext"
        )
    record.read = {"experiences": len(chosen.experiences), "tokens": chosen.tokens}
    if contexts:
        record.read |= {
            "caches": len(contexts),
            "tokens in caches": sum(int(one.cache.positions.sum()) for one in contexts),
            "prompts": sum(len(one.prompts) for one in contexts),
        }
    record.dropped = {why: f"{count} experiences" for why, count in chosen.left_out.items()}
    if not chosen.experiences and not contexts:
        record.outcome = "nothing to do"
        record.why = "there is no experience to learn from"
        record.seconds = time.perf_counter() - began
        return memory.committed(record)
    # Each sleep draws anew, and the same again if it is done again.
    seed = memory.options.seed + memory.asked(_commits)
    study = prepare(
        model, memory.tokenizer, chosen, options, contexts=contexts, corpus=memory.corpus,
        questions=questions, seed=seed, progress=_of(progress, "dream"),
    )  # fmt: skip
    before = _look(memory, study)
    floor = before.acquired
    ceiling = answered(model, memory.tokenizer, study.questions, with_source=True)
    bound = None
    if floor is not None and ceiling is not None and ceiling > floor:
        bound = floor + options.acquired * (ceiling - floor)
    names = list(covered(model)[0])
    new = memory.edited.keep_parameters(names)
    if new:
        memory.asked(lambda store: store.save_pristine(new))
    with memory.trial() as change:
        guard = _guard(memory, study, options, seed)
        trained = _train(memory, study.lessons, options, names, guard, seed, progress)
        held = guard.report()
        memory.learned(trained)
        memory.edited.materialise(memory.factors)
        after = _look(memory, study)
        verdict = judge(before, after, replace(memory.options.thresholds, acquired=bound))
        guard.anchor()
        record.changed = memory.edited.change()
        record.gate = {
            **verdict.to_dict(),
            "without context": floor,
            "with context": ceiling,
            "study": study.to_dict(),
            "guard": held,
        }
        record.ids = [kept.id for kept in chosen.experiences]
        if bound is None:
            record.notes.append(_unmeasured(study.questions, floor, ceiling))
        if verdict.passed and not dry_run:
            record.seconds = time.perf_counter() - began
            ids = list(record.ids)

            def also(store: FactStore, commit: int) -> None:
                if buffer is not None and ids:
                    buffer.slept(ids, commit)

            memory.committed(record, weights=trained, also=also)
            change.keep()
            if options.strength:
                guard.consolidate(guard.measure(_rows(study, options), seed=seed))
                guard.save(memory.folder / GUARD)
            if options.erase and buffer is not None and ids:
                buffer.erase(ids=ids)
            return record
    record.outcome = "rolled back"
    record.why = "; ".join(verdict.failures) or "a dry run"
    record.changed = {}
    record.seconds = time.perf_counter() - began
    return memory.committed(record)


def _commits(store: FactStore) -> int:
    head = store.head
    return 0 if head is None else head.id


def _of(progress: Progress | None, step: str) -> Callable[[int, int], None] | None:
    return None if progress is None else partial(progress, step)


def _look(memory: Memory, study: Study) -> Measured:
    """What the gate looks at."""
    model, tokenizer = memory.model, memory.tokenizer
    facts = [(x.fact, memory.relation(x.fact.relation)) for x in memory.facts(WRITTEN)]
    results = audit(model, tokenizer, facts) if facts else []
    found = measure(model, tokenizer, results, memory.probes, memory.baseline)
    return replace(found, acquired=answered(model, tokenizer, study.questions))


def _unmeasured(
    questions: Sequence[Question], floor: float | None, ceiling: float | None
) -> str:
    if not questions:
        return "nothing was asked of the experience: no question was given, and none dreamt"
    return (
        f"what was acquired is not judged: {floor:.2f} of {len(questions)} questions were answered "
        f"before, and no more, {ceiling:.2f}, with the text in the context or the cache"
    )


def _guard(memory: Memory, study: Study, options: StudyOptions, seed: int) -> OnlineEWC:
    """The guard of earlier nights, or a new one over what the model could do before the first."""
    path = memory.folder / GUARD
    if path.exists():
        guard = OnlineEWC.load(path, memory.model, anew=True)
        guard.strength, guard.decay = options.strength, options.decay
        return guard
    guard = OnlineEWC(memory.model, options.strength, decay=options.decay)
    rows = [x.ids for x in study.lessons if x.part == "foundation"][: options.measured]
    if rows and options.strength:
        guard.consolidate(guard.measure(rows, seed=seed))
    return guard


def _rows(study: Study, options: StudyOptions) -> list[tuple[int, ...]]:
    """Rows that the importance of this night is of."""
    return list(dict.fromkeys(x.ids for x in study.lessons))[: options.measured]


def _train(
    memory: Memory,
    lessons: Sequence[Lesson],
    options: StudyOptions,
    names: Sequence[str],
    guard: OnlineEWC,
    seed: int,
    progress: Progress | None,
) -> dict[str, Tensor]:
    """Train the parameters `names` on `lessons`; what takes the place of pristine weights then.

    Edits are in the weights that are trained, and what was trained is added to those below them.
    """
    model = memory.model
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in names}
    steps = math.ceil(len(lessons) / options.rows)

    def batches() -> Iterator[dict[str, Any]]:
        for first in range(0, len(lessons), options.rows):
            yield {"lessons": lessons[first : first + options.rows]}

    def loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        return lesson_loss(model, batch["lessons"])

    def told(step: Any) -> None:
        if progress is not None:
            progress("train", step.step + 1, steps)

    frozen = [p for name, p in parameters.items() if name not in before and p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        optimizer = optimizer_for(model, None, options.rate)
        with guard.guarding(optimizer):
            fit(
                model, batches(), loss, steps=steps, optimizer=optimizer, schedule="linear",
                seed=seed, on_step=told,
            )  # fmt: skip
    finally:
        for p in frozen:
            p.requires_grad_(True)
    edited, now = memory.edited, {}
    for name, old in before.items():
        below = edited.learned.get(name, edited.pristine[name])
        step = parameters[name].detach().cpu().double() - old.cpu().double()
        now[name] = (below.double() + step).to(below.dtype)
    return {**edited.learned, **now}
