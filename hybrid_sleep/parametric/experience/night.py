"""A sleep over experience: choose, dream, train under a guard, measure, commit or roll back.

Progress & Compress (arXiv 1805.06370) with the model before the sleep as the active column, which
has in its context, or in the fast weights of a cache, what the model afterwards has not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from hybrid_sleep.parametric.dreams.losses import token_losses
from hybrid_sleep.parametric.ewc import OnlineEWC
from hybrid_sleep.parametric.experience.choice import Chosen
from hybrid_sleep.parametric.experience.context import CachedContext, check_prompts, serving
from hybrid_sleep.parametric.experience.imitation import Semantic
from hybrid_sleep.parametric.experience.leaks import exposures, told
from hybrid_sleep.parametric.experience.options import StudyOptions
from hybrid_sleep.parametric.experience.questions import Question, answered
from hybrid_sleep.parametric.experience.schema import WAITING
from hybrid_sleep.parametric.experience.study import Study, prepare
from hybrid_sleep.parametric.experience.unfinished import FOLDER, Unfinished
from hybrid_sleep.parametric.fisher import check_whole, covered
from hybrid_sleep.parametric.gate import Measured, Verdict, judge
from hybrid_sleep.parametric.probes import audit, measure
from hybrid_sleep.parametric.record import Record
from hybrid_sleep.parametric.schema import WRITTEN
from hybrid_sleep.parametric.workspace import has_experience
from hybrid_sleep.training.ranks import of_first
from hybrid_sleep.training.zero import choose_accelerator

if TYPE_CHECKING:
    from hybrid_sleep.parametric.experience.course import Course
    from hybrid_sleep.parametric.facts import Fact, Relation
    from hybrid_sleep.parametric.memory import Memory
    from hybrid_sleep.parametric.store import FactStore

T = TypeVar("T")
GUARD = "guard.safetensors"
Progress = Callable[[str, int, int], None]


def consolidate(
    memory: Memory,
    contexts: Sequence[CachedContext] = (),
    **how: Any,
) -> Record:
    """What `Memory.sleep(kind="experience")` does."""
    with serving(memory.model, contexts):
        return _consolidate(memory, contexts, **how)


def _consolidate(
    memory: Memory,
    contexts: Sequence[CachedContext],
    *,
    questions: Sequence[tuple[str, str]] = (),
    prompts: Mapping[int, Sequence[str]] = MappingProxyType({}),
    semantic: Semantic | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Record:
    began = time.perf_counter()
    options, model = memory.options.study, memory.model
    check_whole(model)
    asked = options.imitation is not None and options.imitation.gamma > 0
    if asked is not (semantic is not None):
        raise ValueError(
            "semantic must be a function where StudyOptions.imitation has a gamma above 0, and "
            f"left out elsewhere, got {semantic!r}"
        )
    record = Record("experience")
    # Caches need none of the packages that keep experience.
    keeping = not contexts or memory.asked(has_experience)
    chosen = Chosen((), (), 0)
    check_prompts(prompts, memory.kept(lambda x: x.ids(WAITING)) if keeping and prompts else ())
    if keeping:
        chosen = memory.kept(
            lambda buffer: buffer.chosen(
                options.recent, seed=memory.options.seed, band=options.band, share=options.share
            )
        )
    if questions and contexts and not chosen.experiences:
        raise ValueError(
            "questions must be about experience, of which there is none to learn from, got "
            f"{len(questions)}; those about a cache belong to its CachedContext"
        )
    record.read = {"experiences": len(chosen.experiences), "tokens": chosen.tokens}
    if prompts:
        asked_of = [prompts.get(kept.id, ()) for kept in chosen.experiences]
        record.read["prompts about them"] = sum(map(len, asked_of))
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
    unfinished = Unfinished(
        memory, chosen, options, questions, seed, prompts=prompts, semantic=semantic,
        keeps=not contexts,
    )  # fmt: skip
    study = prepare(
        model, memory.tokenizer, chosen, options, contexts=contexts, corpus=memory.corpus,
        facts=_facts(memory), questions=questions, prompts=prompts, seed=seed,
        once=unfinished.once, progress=_of(progress, "dream"),
        selecting=_of(progress, "select"),
    )  # fmt: skip
    before = _look(memory, study, chosen)
    floor = before.acquired
    ceiling = _of_first(answered(model, memory.tokenizer, study.questions, with_source=True))
    given = len(questions) + sum(len(one.questions) for one in contexts)
    bound = _bound(options.acquired, floor, ceiling, given, len(study.questions))
    names = list(covered(model)[0])
    new = memory.edited.keep_parameters(names)
    if new:
        memory.asked(lambda store: store.save_pristine(new))
    with memory.trial() as change:
        guard = _guard(memory, study, options, seed)
        course, made = _train(
            memory, study, names, guard, unfinished, seed, progress, semantic
        )
        held = guard.report()
        thresholds = replace(memory.options.thresholds, acquired=bound)
        tried: list[tuple[float, Verdict]] = []
        for scale in options.scales:
            trained = made.at(scale)
            memory.learned(trained)
            memory.edited.materialise(memory.factors)
            verdict = judge(before, _look(memory, study, chosen), thresholds)
            tried.append((scale, verdict))
            # Of less of it less is acquired.
            if verdict.passed or "acquired" in verdict.missed:
                break
        leaks = exposures(
            model, memory.tokenizer, list(study.canaries.values()), seed=seed,
            progress=_of(progress, "canaries"),
        )  # fmt: skip
        guard.anchor()
        record.changed = memory.edited.change()
        record.gate = {
            **verdict.to_dict(),
            "tried": [{"scale": x, "failures": list(of.failures)} for x, of in tried],
            "without context": floor,
            "with context": ceiling,
            "study": study.to_dict(),
            "guard": held,
            "training": course.to_dict(),
            "canaries": [one.to_dict() for one in leaks],
        }
        record.notes += told(leaks, study.planted)
        record.ids = [kept.id for kept in chosen.experiences]
        if floor is None or ceiling is None or ceiling <= floor:
            record.notes.append(_unmeasured(study.questions, floor, ceiling, bound))
        if course.spent:
            record.notes.append(
                f"the {course.spent} of the training were spent at step {course.step} of "
                f"{course.planned}"
            )
        if unfinished.found == "another night":
            record.notes.append("what another night, interrupted, had left was erased")
        if verdict.passed and not dry_run:
            record.why = "" if scale == 1 else f"at {scale:g} times the change"
            record.seconds = time.perf_counter() - began
            ids = list(record.ids)

            def slept(store: FactStore, commit: int) -> None:
                if keeping:
                    memory.buffer.slept(ids, commit)
                    memory.buffer.doom(FOLDER)

            memory.committed(record, weights=trained, also=slept)
            change.keep()
            if options.strength:
                guard.consolidate(guard.measure(_rows(study, options), seed=seed))
                of_first(guard.save, memory.folder / GUARD)
            if keeping:
                memory.kept(lambda x: x.erase(ids=ids) if options.erase and ids else x.clean())
            return record
    record.outcome = "rolled back"
    failures = [
        failure if x == 1 else f"at {x:g} times the change {failure}"
        for x, of in tried
        for failure in of.failures
    ]
    record.why = "a dry run" if verdict.passed else "; ".join(failures)
    record.changed = {}
    record.seconds = time.perf_counter() - began
    if not keeping:
        return memory.committed(record)
    memory.committed(record, also=lambda store, commit: memory.buffer.doom(FOLDER))
    memory.kept(lambda buffer: buffer.clean())
    return record


def _commits(store: FactStore) -> int:
    head = store.head
    return 0 if head is None else head.id


def _of(progress: Progress | None, step: str) -> Callable[[int, int], None] | None:
    return None if progress is None else partial(progress, step)


def _facts(memory: Memory) -> list[tuple[Fact, Relation]]:
    """Those in the weights, with their words."""
    return [(x.fact, memory.relation(x.fact.relation)) for x in memory.facts(WRITTEN)]


def _look(memory: Memory, study: Study, chosen: Chosen) -> Measured:
    """What the gate looks at, and what the record says beside it."""
    model, tokenizer = memory.model, memory.tokenizer
    facts = _facts(memory)
    results = audit(model, tokenizer, facts) if facts else []
    found = measure(model, tokenizer, results, memory.probes, memory.baseline)
    rows = [(x.ids, x.start) for x in chosen.experiences if len(x.ids) > max(1, x.start)]
    losses = [loss for row in token_losses(model, rows) for loss in row]
    if losses:
        found = replace(found, mean_loss=fmean(losses), median_loss=median(losses))
    return _of_first(replace(found, acquired=answered(model, tokenizer, study.questions)))


def _of_first(value: T) -> T:
    """What the first process has measured: all of them have to come to one verdict."""
    return of_first(lambda: value)


def _bound(
    share: float, floor: float | None, ceiling: float | None, given: int, asked: int
) -> float | None:
    """How many of `asked` questions must be answered: `share` of the way from `floor` up.

    Up to what the model answers with the text. Where it reads none of it, up to the `given`
    questions, whose answers somebody vouches for, as a sleep that taught it nothing would pass and
    erase what it was to learn; None where all were dreamt, whose answers may be wrong.
    """
    if floor is None or ceiling is None:
        return None
    most = ceiling if ceiling > floor else given / asked
    return floor + share * (most - floor) if most > floor else None


def _unmeasured(
    questions: Sequence[Question],
    floor: float | None,
    ceiling: float | None,
    bound: float | None,
) -> str:
    if not questions:
        return "nothing was asked of the experience: no question was given, and none dreamt"
    judged = (
        "what was acquired is not judged"
        if bound is None
        else f"{bound:.2f} of the questions must be answered, as answers were given to them"
    )
    return (
        f"{judged}: {floor:.2f} of {len(questions)} were answered before, and no more, "
        f"{ceiling:.2f}, with the text in the context or the cache"
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
    study: Study,
    names: Sequence[str],
    guard: OnlineEWC,
    unfinished: Unfinished,
    seed: int,
    progress: Progress | None,
    semantic: Semantic | None,
) -> tuple[Course, Made]:
    """Train the parameters `names`; how far it came, and what came of it."""
    choose_accelerator()
    # Only who trains waits for Trainer.
    from hybrid_sleep.parametric.experience.train import train

    model, options = memory.model, memory.options.study
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in names}
    course = train(
        model, study.lessons, options, names, guard, unfinished, tokenizer=memory.tokenizer,
        semantic=semantic, seed=seed, progress=_of(progress, "train"),
    )  # fmt: skip
    below = {**{name: memory.edited.pristine[name] for name in names}, **memory.edited.learned}
    after = {name: parameters[name].detach().clone() for name in names}
    return course, Made(below, before, after)


@dataclass(frozen=True)
class Made:
    """What training made of parameters: `before` and `after`, with edits in them; below: those
    under the edits, and whatever else earlier nights trained."""

    below: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def at(self, scale: float) -> dict[str, Tensor]:
        """What takes the place of those below the edits, with `scale` times the change.

        Between the weights before and after training, much of what was learned may be there
        already, and little of what it cost (arXiv 2109.01903, Eq. 1).
        """
        now = dict(self.below)
        for name, old in self.before.items():
            step = self.after[name].cpu().double() - old.cpu().double()
            now[name] = (now[name].double() + scale * step).to(now[name].dtype)
        return now
