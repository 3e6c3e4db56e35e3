"""Memory: facts in the weights of a model, learned at once, and experience, both by sleep."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from hybrid_sleep.parametric.awake import SLEEPS, awake, due_now
from hybrid_sleep.parametric.calibrate import WEIGHTS, Calibration, calibrate
from hybrid_sleep.parametric.dreams.losses import mean_losses
from hybrid_sleep.parametric.edited import EditedWeights
from hybrid_sleep.parametric.experience.context import CachedContext, check_contexts
from hybrid_sleep.parametric.experience.experience import Experience
from hybrid_sleep.parametric.experience.imitation import Semantic
from hybrid_sleep.parametric.experience.night import consolidate
from hybrid_sleep.parametric.factors import merged
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.files import read_pristine
from hybrid_sleep.parametric.gate import OF_FACTS
from hybrid_sleep.parametric.measure import ask, chat_prompt
from hybrid_sleep.parametric.options import MemoryOptions, chosen_options, remember_options
from hybrid_sleep.parametric.pressure import Pressure, pressure
from hybrid_sleep.parametric.probes import audit, is_healthy, measure
from hybrid_sleep.parametric.record import Record
from hybrid_sleep.parametric.records import Commit
from hybrid_sleep.parametric.schedule import Due
from hybrid_sleep.parametric.schema import ACTIVE, DEGRADED, PENDING, QUARANTINED, RETIRED, WRITTEN
from hybrid_sleep.parametric.steps.audit import audit as audit_step
from hybrid_sleep.parametric.steps.curate import curate
from hybrid_sleep.parametric.steps.health import health
from hybrid_sleep.parametric.steps.maintain import maintain, plan
from hybrid_sleep.parametric.steps.night import Night, Progress
from hybrid_sleep.parametric.steps.report import report
from hybrid_sleep.parametric.steps.validate import validate
from hybrid_sleep.parametric.store import FactStore
from hybrid_sleep.parametric.wake import learn, read_facts
from hybrid_sleep.parametric.workspace import FRONT, SETTINGS, Workspace, has_experience
from hybrid_sleep.sleep.weights import weights_digest
from hybrid_sleep.training.ranks import of_first
from hybrid_sleep.validation import check_choice

if TYPE_CHECKING:
    from hybrid_sleep.parametric.experience.buffer import Added


class Memory(Workspace):
    """Facts and experience in the weights of `model`, and the folder that remembers them; see
    `Memory.open`.

    After any change the model is an ordinary one: it can be saved, served and trained as before,
    and caches made with the weights before are refused.
    """

    def __init__(self, folder: Path, model: nn.Module, tokenizer: Any):
        super().__init__(folder, model, tokenizer)
        self._held = ExitStack()

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        model: nn.Module,
        tokenizer: Any,
        *,
        relations: Iterable[Relation] = (),
        known: Sequence[tuple[str, str]] | None = None,
        corpus: Sequence[Sequence[int]] | None = None,
        ordinary: Sequence[Sequence[int]] | None = None,
        options: MemoryOptions | None = None,
    ) -> Memory:
        """The memory in `folder` (made if need be), put into the weights of `model`.

        model: any causal model of transformers, or ours: the pristine one that the folder was made
            with, or one with edits of this folder in it. tokenizer: its own.
        relations: the words of relations that facts will have; others get plain ones.
        known: pairs (prompt, answer) that the model knows, on which locality is measured.
        corpus: rows of ids of ordinary text, for the statistics of keys; ordinary: others, for
            perplexity. None: the model's own samples, drawn once by the options' seed.
        options: None for those that the folder has, or the defaults.

        Raises, before anything changes: BlockingIOError if the folder is open for writing,
        ValueError for another model, a newer or damaged store, text in both corpus and ordinary.
        With ZeRO-3, call it in every process; the first one keeps the folder.
        """
        folder = Path(folder)
        with ExitStack() as held:
            memory = cls(folder, model, tokenizer)
            memory.edited = EditedWeights(model, of_first(read_pristine, folder))
            memory.open_store(held)
            memory.options = of_first(chosen_options, folder / SETTINGS, options)
            memory.relations = {r.name.casefold(): r for r in relations}
            memory.corpus = corpus
            memory.learned(memory.asked(lambda store: store.weights()))
            memory.set_probes(known, ordinary)
            head = memory.asked(lambda store: store.head)
            memory.edited.materialise(memory.factors)
            if head is not None and memory.edited.digest() != head.digest:
                raise ValueError(
                    f"{folder} must give the weights of commit {head.id}, got other bits; this "
                    "machine rounds otherwise than the one that wrote it, or a file was changed"
                )
            of_first(remember_options, folder / SETTINGS, memory.options)
            memory._held = held.pop_all()
        return memory

    def close(self) -> None:
        """Let others write the folder; the model keeps its weights."""
        self._held.close()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What a user does

    def learn(
        self, facts: str | Fact | Iterable[str | Fact], relations: Iterable[Relation] = ()
    ) -> Record:
        """Write facts, or plain sentences, into the weights at once.

        A fact with another object than before replaces it, and one that is known already changes
        nothing. relations: the words of theirs. The facts are kept, as pending, before anything
        else happens; what this site cannot hold is quarantined, and named in the record.

        Raises ValueError, before anything changes, for a sentence that is no fact, an object that
        tokenises to nothing and facts that contradict each other.
        """
        return learn(self, facts, relations)

    def recall(self, question: str, *, tokens: int = 24, **generate: Any) -> str:
        """What the model replies to `question`, asked as a user's turn of a chat: one pass a token,
        from its weights alone."""
        prompt = chat_prompt(self.tokenizer, question)
        return ask(self.model, self.tokenizer, [prompt], tokens=tokens, **generate)[0].strip()

    def forget(self, subject: str, relation: str | None = None) -> Record:
        """Take facts about `subject` out of the weights; what the model said before comes back.

        ValueError, before anything changes, if there is none.
        """
        began = time.perf_counter()
        found = self.asked(lambda store: store.find(subject, relation))
        if not found:
            what = subject if relation is None else f"{subject} {relation}"
            raise ValueError(f"subject must be of a fact in {self.folder}, got {what!r}")
        ids = {x.id for x in found}
        record = Record("forget", read={"facts": len(ids)})
        with self.trial() as change:
            after = self.without(ids)
            self.edited.materialise(after)
            record.changed = self.edited.change()
            record.seconds = time.perf_counter() - began
            self.committed(
                record, states=dict.fromkeys(ids, RETIRED), factors=merged(after), replace=True
            )
            change.keep()
        return record

    def experience(
        self,
        text: str,
        *,
        consent: bool = False,
        source: str = "user",
        prompt: str = "",
        rejected: str = "",
        provenance: Mapping[str, Any] | None = None,
    ) -> Added:
        """Keep what was read, or said in answer to `prompt`, for the next sleep over experience.

        rejected: the model's own answer, of which `text` is the correction. source: whose it is;
        what is erased together. consent: whether it may be kept and learned from; without, it is
        refused. provenance: where it comes from, plain data for JSON. The weights stay as they
        are; what reaches the disk is without secrets, and encrypted (see `experience.Buffer`).
        Needs the extra `memory`. Raises ValueError, before anything changes, for parts that do
        not go together.
        """
        one = Experience(
            source=source, text=text, weights=weights_digest(self.model),
            kind="correction" if rejected else "exchange" if prompt else "text",
            prompt=prompt, rejected=rejected, provenance=dict(provenance or {}), consent=consent,
        )  # fmt: skip
        losses = mean_losses(self.model, [self.encoded(one)])
        return self.kept(lambda buffer: buffer.add(one, losses))

    def sleep(
        self,
        progress: Progress | None = None,
        *,
        kind: str = "facts",
        caches: Sequence[CachedContext] = (),
        questions: Sequence[tuple[str, str]] = (),
        prompts: Mapping[int, Sequence[str]] = MappingProxyType({}),
        semantic: Semantic | None = None,
        dry_run: bool = False,
    ) -> Record:
        """Move what was learned into the weights, for good, if the gate passes.

        kind: "facts" solves for all facts together, see below. "experience" trains on what
        `experience` kept, on dreams of it and on foundations, see `StudyOptions`. "full": first
        experience, then facts, whose record is returned with the other one in its notes.
        caches: what the model has in the fast weights of a `SleepCache`, learned along with the
        experience or without any: the model with the cache says of each prompt what the model
        without is to say (see `CachedContext`). Their contents stay; after a commit they are
        refused as all caches of the weights before, otherwise they go on serving the model.
        questions: (question, answer) about the experience, asked at its gate besides those that
        the model dreams. prompts: by the id of an experience (`Added.id`), what the model is asked
        about it to learn from: it answers with the experience in its context, and learns to say
        the same without. semantic: of what the model wrote and the text it imitates, whether they
        mean the same, from 0 to 1 (see `imitation.py`; only where its gamma is above 0).
        dry_run: do and measure all of a sleep over experience, and take it back.
        progress: called with the step, what is done of it, and of how much.

        Raises ValueError, before anything changes, for another kind, for caches, questions,
        prompts, a semantic reward or a dry run of facts, for a cache of other weights or several
        rows, for prompts about what does not wait, for questions about experience where there are
        caches alone, and for a semantic reward that is missing or that nothing asks for.
        """
        check_choice("kind", kind, SLEEPS)
        for name, given in (
            ("caches", caches), ("questions", questions), ("prompts", prompts),
            ("semantic", semantic), ("dry_run", dry_run),
        ):  # fmt: skip
            if kind == "facts" and given:
                raise ValueError(f"{name} must be left out for kind 'facts', got {kind!r}")
        if kind == "facts":
            return self.sleep_over_facts(progress)
        caches = list(caches)
        check_contexts(self.model, caches)
        first = consolidate(
            self, caches, questions=questions, prompts=prompts, semantic=semantic, dry_run=dry_run,
            progress=progress,
        )  # fmt: skip
        if kind == "experience":
            return first
        done = self.sleep_over_facts(progress)
        done.notes.append(str(first))
        return done

    def sleep_over_facts(self, progress: Progress | None) -> Record:
        """Audit all facts, solve for them together from the pristine weights, commit or roll back.

        The six steps are the modules of `steps/`. Where locality, negation or perplexity misses its
        threshold, the same solution is tried at the larger strengths of the options, and of those
        that the gate passes the one with the fewest misses stays; if none passes, the weights are
        what they were, bit for bit. With nothing new since the last sleep, nothing changes.
        """
        night = Night(self, progress)
        curate(night)
        if not night.items:
            return report(night, "nothing to do", "there are no facts")
        if self.slept_on({number for number, _, _ in night.items}):
            return report(night, "nothing to do", "nothing has changed since the last sleep")
        self.settle([f for _, f, _ in night.items], [r for _, _, r in night.items])
        health(night)
        audit_step(night)
        with self.trial() as change:
            self.edited.materialise([])
            planned = plan(night)
            for strength in self.options.strengths:
                attempt = validate(night, strength, maintain(night, planned, strength))
                night.attempts.append(attempt)
                if not set(attempt.verdict.missed) - set(OF_FACTS):
                    break
            passed = [attempt for attempt in night.attempts if attempt.verdict.passed]
            if passed:
                chosen = night.chosen = min(passed, key=lambda x: len(x.verdict.missed))
                if chosen is not night.attempts[-1]:
                    self.edited.materialise([chosen.edit.factors] if chosen.edit else [])
                strength = chosen.strength
                why = "" if strength == 1 else f"at {strength:g} times the weight"
                done = report(night, "committed", why)
                change.keep()
                return done
        failures = [
            f"at {attempt.strength:g} times the weight {failure}"
            for attempt in night.attempts
            for failure in attempt.verdict.failures
        ]
        return report(night, "rolled back", "; ".join(failures))

    def calibrate(
        self,
        probes: Iterable[str | Fact],
        relations: Iterable[Relation] = (),
        *,
        weights: Sequence[float] = WEIGHTS,
    ) -> Calibration:
        """Choose the strength of edits on facts that are not to be learned, as many as will be.

        Measured on the model without its edits against the thresholds of the gate, see `calibrate`;
        nothing is written into its weights. `wake` and `night` have the chosen weight from here on;
        the front is in the folder, as a table and a figure. Raises ValueError as `learn` does.
        """
        facts, words = read_facts(self, probes, relations)
        if not facts:
            raise ValueError("probes must be one or more facts, got none")
        self.settle(facts, words)
        with self.unedited():
            found = calibrate(
                self.model,
                self.tokenizer,
                list(zip(facts, words, strict=True)),
                self.probes,
                {site: of.spectrum for site, of in self.statistics().items()},
                options=self.options.night,
                weights=weights,
                budget=self.options.thresholds,
            )
        weight = found.chosen.weight
        self.options = replace(
            self.options,
            wake=replace(self.options.wake, weight=weight),
            night=replace(self.options.night, weight=weight),
        )
        of_first(remember_options, self.folder / SETTINGS, self.options)
        of_first(found.save, self.folder / FRONT)
        return found

    def nap(self) -> Record:
        """Audit the newest facts; the weights stay as they are."""
        began = time.perf_counter()
        newest = self.facts(WRITTEN)[-self.options.naps :]
        pairs = [(x.fact, self.relation(x.fact.relation)) for x in newest]
        results = audit(self.model, self.tokenizer, pairs)
        found = {x.id: result for x, result in zip(newest, results, strict=True)}
        states = {n: ACTIVE if is_healthy(result) else DEGRADED for n, result in found.items()}
        self.asked(lambda store: store.record_audit(found, states))
        lost = [str(x.fact) for x in newest if states[x.id] == DEGRADED]
        record = Record("nap", read={"facts": len(newest), "answered": len(newest) - len(lost)})
        record.outcome = "nothing to do" if not lost else "committed"
        record.why = f"not answered: {'; '.join(lost)}" if lost else ""
        record.seconds = time.perf_counter() - began
        self.last = record
        return record

    def undo(self) -> Record:
        """Take the newest commit back, weights and facts, bit for bit; ValueError if there is none.

        Another undo goes further back.
        """
        began = time.perf_counter()
        commit = self.asked(self._undone)
        self._factors = None
        self.learned(self.asked(lambda store: store.weights()))
        self.edited.materialise(self.factors)
        record = Record("undo", why=f"commit {commit.report['undone']} was taken back")
        record.commit, record.seconds = commit.id, time.perf_counter() - began
        self.last = record
        return record

    def _undone(self, store: FactStore) -> Commit:
        head = store.head
        last = None if head is None else head.effective
        slept = any(x.id == last and x.kind == "experience" for x in store.history())
        buffer = self.buffer if slept and has_experience(store) else None
        with store.transaction("undo"):
            commit = store.undo()
            if buffer is not None:
                # What was not erased yet waits again.
                buffer.waiting_again(commit.report["undone"])
        return commit

    def explain(self, subject: str, relation: str | None = None) -> list[dict[str, Any]]:
        """For each fact about `subject`: when it came, from which text, what it changed, how it
        tests today. ValueError if there is none."""
        found = self.asked(lambda store: store.find(subject, relation))
        if not found:
            raise ValueError(f"subject must be of a fact in {self.folder}, got {subject!r}")
        pairs = [(x.fact, self.relation(x.fact.relation)) for x in found]
        now = audit(self.model, self.tokenizer, pairs, every=True)
        told = []
        for x, result in zip(found, now, strict=True):
            number = x.id
            told.append({**self.asked(partial(_explained, number=number)), "today": result})
        return told

    def status(self) -> dict[str, Any]:
        """Counts of facts by state, the newest commit, how urgent a sleep is, and where it goes."""
        facts = self.facts()
        counts = {
            state: sum(x.state == state for x in facts)
            for state in (ACTIVE, DEGRADED, PENDING, QUARANTINED, RETIRED)
        }
        head = self.asked(lambda store: store.head)
        return {
            "folder": str(self.folder),
            "facts": counts,
            "commits": 0 if head is None else head.id,
            "last": None if head is None else {"kind": head.kind, "time": head.time},
            "pressure": asdict(self.pressure()),
            "layers": None if self.options.layers is None else list(self.options.layers),
            "changed": self.edited.change(),
        }

    def pressure(self, *, measured: bool = False) -> Pressure:
        """How urgent a sleep is, see `pressure.py`; `measured`: perplexity and locality as well."""
        cap = self.options.cap
        now = self.asked(lambda store: awake(store, cap, datetime.now(UTC)).measures)
        if measured:
            found = measure(self.model, self.tokenizer, [], self.probes, self.baseline)
            now = replace(now, perplexity_ratio=found.perplexity_ratio, locality=found.locality)
        return pressure(now, self.options.limits)

    def due(
        self, kind: str = "full", *, now: datetime | None = None, active: datetime | None = None
    ) -> Due:
        """Whether the schedule of the options asks for a sleep of `kind`, and why, or why not.

        now: a time with its zone, None for the clock of this machine. active: when the memory was
        used last, where the caller knows of a later time than that of what was learned or kept.
        Raises ValueError for another kind, and a time without zone.
        """
        options = self.options
        return self.asked(lambda store: due_now(store, options, kind, now=now, active=active))


def _explained(store: FactStore, number: int) -> dict[str, Any]:
    return store.explain(number)
