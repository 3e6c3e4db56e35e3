"""Memory: facts in the weights of a model, learned at once and kept by sleep."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrid_sleep.parametric.edit import Edit, EditOptions, Item, plan_facts, solve_plan
from hybrid_sleep.parametric.edited import EditedWeights
from hybrid_sleep.parametric.factors import Factors
from hybrid_sleep.parametric.facts import Fact, Relation, check_facts, parse_fact
from hybrid_sleep.parametric.files import read_pristine
from hybrid_sleep.parametric.gate import trial
from hybrid_sleep.parametric.measure import ask, chat_prompt
from hybrid_sleep.parametric.options import MemoryOptions, chosen_options
from hybrid_sleep.parametric.pressure import Measures, Pressure, pressure
from hybrid_sleep.parametric.probes import Baseline, Probes, audit, is_healthy
from hybrid_sleep.parametric.record import Record
from hybrid_sleep.parametric.schema import ACTIVE, DEGRADED, PENDING, QUARANTINED, RETIRED, WRITTEN
from hybrid_sleep.parametric.sites import Site, site_at
from hybrid_sleep.parametric.solve import Preconditioner
from hybrid_sleep.parametric.statistics import KeyStatistics, load_or_collect, own_samples
from hybrid_sleep.parametric.steps.audit import audit as audit_step
from hybrid_sleep.parametric.steps.curate import curate
from hybrid_sleep.parametric.steps.health import health
from hybrid_sleep.parametric.steps.maintain import maintain, plan
from hybrid_sleep.parametric.steps.night import Night, Progress
from hybrid_sleep.parametric.steps.report import report
from hybrid_sleep.parametric.steps.validate import validate
from hybrid_sleep.parametric.store import FactStore, StoredFact
from hybrid_sleep.support.io import read_json, write_json_atomic
from hybrid_sleep.training.ranks import of_first

SETTINGS, BASELINE, STATISTICS = "memory.json", "baseline.json", "statistics"
PROBE_ROWS, PROBE_LENGTH = 16, 64
OWN_TEXT = "statistics and perplexity are of the model's own samples: no text was given"


class Memory:
    """Facts in the weights of `model`, and the folder that remembers them; see `Memory.open`.

    After any change the model is an ordinary one: it can be saved, served and trained as before,
    and caches made with the weights before are refused.
    """

    def __init__(self, folder: Path, model: nn.Module, tokenizer: Any, held: ExitStack):
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self._held = held
        self._statistics: dict[Site, KeyStatistics] = {}
        self._preconditioners: dict[Any, dict[Site, Preconditioner]] = {}
        self.last: Record | None = None

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
            memory = cls(folder, model, tokenizer, held)
            memory.edited = EditedWeights(model, of_first(read_pristine, folder))
            memory.store = of_first_kept(
                lambda: held.enter_context(
                    FactStore.open(folder, memory.edited.base, model=type(model).__name__)
                )
            )
            memory.options = of_first(chosen_options, folder / SETTINGS, options)
            memory._relations = {r.name.casefold(): r for r in relations}
            memory._corpus = corpus
            memory._set_probes(known, ordinary)
            head = memory._asked(lambda store: store.head)
            memory.edited.materialise(memory._asked(lambda store: store.factors()))
            if head is not None and memory.edited.digest() != head.digest:
                raise ValueError(
                    f"{folder} must give the weights of commit {head.id}, got other bits; this "
                    "machine rounds otherwise than the one that wrote it, or a file was changed"
                )
            memory._held = held.pop_all()
        return memory

    edited: EditedWeights
    store: FactStore | None
    options: MemoryOptions
    probes: Probes
    baseline: Baseline

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
        began = time.perf_counter()
        given = [facts] if isinstance(facts, str | Fact) else list(facts)
        self._relations |= {r.name.casefold(): r for r in relations}
        parsed = check_facts(
            [x if isinstance(x, Fact) else parse_fact(x, self._relations.values()) for x in given]
        )
        words = [self.relation(fact.relation) for fact in parsed]
        self._check_writable(parsed, words)
        self._settle(parsed, words)
        known = {r.name: r for r in words}.values()
        ids = self._asked(lambda store: store.add(parsed, known))
        states = {x.id: x for x in self.facts()}
        todo = [
            (number, fact, relation)
            for number, fact, relation in zip(ids, parsed, words, strict=True)
            if states[number].state not in WRITTEN
        ]
        record = Record("wake", read={"facts": len(parsed), "new": len(todo)})
        if not todo:
            record.outcome, record.why = "nothing to do", "all of it is in the weights already"
            record.seconds = time.perf_counter() - began
            self.last = record
            return record
        return self._write(record, todo, states, began)

    def _write(
        self, record: Record, todo: list[Item], states: Mapping[int, StoredFact], began: float
    ) -> Record:
        """Write `todo` into the weights, in the place of what they replace."""
        replaced = self._replaced(todo, states)
        options = self.options.wake
        with self._trial() as change:
            before = self._without(replaced)
            if replaced:
                self.edited.materialise(before)
            planned = plan_facts(self.model, self.tokenizer, todo, self.sites[-1], options)
            hopeless = {
                item[0]: f"the loss of its target stays at {loss:.2f} nats a token"
                for item, loss in zip(todo, planned.targets.loss.tolist(), strict=True)
                if loss > options.hopeless
            }
            kept = {number for number, _, _ in todo} - set(hopeless)
            edit = None
            if kept:
                past = None
                if options.accumulate:
                    past = self._keys(without=replaced)
                edit = self.agreed(
                    solve_plan(self.model, planned.only(kept), self.preconditioners(options), past)
                )
                before = [*before, edit.factors]
            self.edited.materialise(before)
            record.changed = self.edited.change()
            record.dropped = {
                str(fact): hopeless[number] for number, fact, _ in todo if number in hopeless
            }
            record.seconds = time.perf_counter() - began
            factors = edit.factors if edit else None
            if replaced:
                factors = _merged(before)
            self.committed(
                record,
                states={number: ACTIVE for number in kept} | dict.fromkeys(hopeless, QUARANTINED),
                factors=factors,
                replace=bool(replaced),
                edits=edit.facts if edit else None,
            )
            change.keep()
        return record

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
        found = self._asked(lambda store: store.find(subject, relation))
        if not found:
            what = subject if relation is None else f"{subject} {relation}"
            raise ValueError(f"subject must be of a fact in {self.folder}, got {what!r}")
        ids = {x.id for x in found}
        record = Record("forget", read={"facts": len(ids)})
        with self._trial() as change:
            after = self._without(ids)
            self.edited.materialise(after)
            record.changed = self.edited.change()
            record.seconds = time.perf_counter() - began
            self.committed(
                record, states=dict.fromkeys(ids, RETIRED), factors=_merged(after), replace=True
            )
            change.keep()
        return record

    def sleep(self, progress: Progress | None = None) -> Record:
        """Audit all facts, solve for them together from the pristine weights, commit or roll back.

        The six steps are the modules of `steps/`. Where the gate does not pass, the same solution
        is tried at the larger strengths of the options; if none passes, the weights are what they
        were, bit for bit. With nothing new since the last sleep, nothing changes.
        progress: called with the step, what is done of it, and of how much.
        """
        night = Night(self, progress)
        curate(night)
        if not night.items:
            return report(night, "nothing to do", "there are no facts")
        if self._slept_on({number for number, _, _ in night.items}):
            return report(night, "nothing to do", "nothing has changed since the last sleep")
        self._settle([f for _, f, _ in night.items], [r for _, _, r in night.items])
        health(night)
        audit_step(night)
        with self._trial() as change:
            self.edited.materialise([])
            planned = plan(night)
            for strength in self.options.strengths:
                maintain(night, planned, strength)
                if validate(night):
                    why = "" if strength == 1 else f"at {strength:g} times the weight"
                    done = report(night, "committed", why)
                    change.keep()
                    return done
        assert night.verdict is not None
        return report(night, "rolled back", "; ".join(night.verdict.failures))

    def nap(self) -> Record:
        """Audit the newest facts; the weights stay as they are."""
        began = time.perf_counter()
        newest = self.facts(WRITTEN)[-self.options.naps :]
        pairs = [(x.fact, self.relation(x.fact.relation)) for x in newest]
        results = audit(self.model, self.tokenizer, pairs)
        found = {x.id: result for x, result in zip(newest, results, strict=True)}
        states = {n: ACTIVE if is_healthy(result) else DEGRADED for n, result in found.items()}
        self._asked(lambda store: store.record_audit(found, states))
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
        commit = self._asked(lambda store: store.undo())
        self.edited.materialise(self._asked(lambda store: store.factors()))
        record = Record("undo", why=f"commit {commit.report['undone']} was taken back")
        record.commit, record.seconds = commit.id, time.perf_counter() - began
        self.last = record
        return record

    def explain(self, subject: str, relation: str | None = None) -> list[dict[str, Any]]:
        """For each fact about `subject`: when it came, from which text, what it changed, how it
        tests today. ValueError if there is none."""
        found = self._asked(lambda store: store.find(subject, relation))
        if not found:
            raise ValueError(f"subject must be of a fact in {self.folder}, got {subject!r}")
        pairs = [(x.fact, self.relation(x.fact.relation)) for x in found]
        now = audit(self.model, self.tokenizer, pairs, every=True)
        told = []
        for x, result in zip(found, now, strict=True):
            number = x.id
            told.append({**self._asked(lambda store: store.explain(number)), "today": result})  # noqa: B023
        return told

    def status(self) -> dict[str, Any]:
        """Counts of facts by state, the newest commit, how urgent a sleep is, and where it goes."""
        facts = self.facts()
        counts = {
            state: sum(x.state == state for x in facts)
            for state in (ACTIVE, DEGRADED, PENDING, QUARANTINED, RETIRED)
        }
        head = self._asked(lambda store: store.head)
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
        from hybrid_sleep.parametric.probes import measure

        written = self.facts(WRITTEN)
        lost = sum(x.state == DEGRADED for x in written)
        hours = self._asked(_hours_awake)
        now = Measures(
            degraded=lost / len(written) if written else None,
            load=len(written) / self.options.cap,
            hours=hours,
        )
        if measured:
            found = measure(self.model, self.tokenizer, [], self.probes, self.baseline)
            now = replace(now, perplexity_ratio=found.perplexity_ratio, locality=found.locality)
        return pressure(now, self.options.limits)

    # What the steps use

    @property
    def sites(self) -> list[Site]:
        """Where edits go, the lowest first."""
        assert self.options.layers is not None
        return [site_at(self.model, layer) for layer in self.options.layers]

    def facts(self, states: Collection[str] | None = None) -> list[StoredFact]:
        """Those in the store, by state; None for all."""
        return self._asked(lambda store: store.facts(states) if states else store.facts())

    def relation(self, name: str) -> Relation:
        """The words of a relation: as given, as stored, or plain ones."""
        given = self._relations.get(name.casefold())
        return given or self._asked(lambda store: store.relation(name))

    def preconditioners(
        self, options: EditOptions, strength: float = 1.0
    ) -> dict[Site, Preconditioner]:
        """A^-1 of each site, at `strength` times the weight of `options`."""
        key = options.weight * strength, options.filter
        if key not in self._preconditioners:
            self._preconditioners = {
                key: {
                    site: Preconditioner(found.spectrum, *key)
                    for site, found in self.statistics().items()
                }
            }
        return self._preconditioners[key]

    def statistics(self) -> dict[Site, KeyStatistics]:
        """Of the pristine model's keys, at every site; collected once and kept in the folder."""
        missing = [site for site in self.sites if site not in self._statistics]
        if missing:
            with self._pristine():
                corpus = self._corpus
                self._statistics |= load_or_collect(
                    self.folder / STATISTICS,
                    self.model,
                    missing,
                    self.edited.base,
                    lambda: (
                        corpus or own_samples(self.model, self.tokenizer, seed=self.options.seed)
                    ),
                )
        return self._statistics

    def agreed(self, edit: Edit) -> Edit:
        """The edit that the first process has solved for, in all."""
        return of_first(lambda: edit)

    def committed(self, record: Record, **parts: Any) -> Record:
        """Commit `record` and what goes with it; the pristine weights are on the disk before."""
        digest = self.edited.digest() if record.outcome == "committed" else None
        if self._own_text:
            record.notes.append(OWN_TEXT)
        new = self._asked(
            lambda store: store.commit(
                record.kind,
                digest=digest,
                report=record.to_dict(),
                status=record.outcome,
                **parts,
            )
        )
        record.commit, self.last = new, record
        return record

    # Inside

    def _asked(self, work: Any) -> Any:
        """What `work(store)` returns, in every process."""
        return of_first(lambda: work(self.store))

    def _set_probes(
        self,
        known: Sequence[tuple[str, str]] | None,
        ordinary: Sequence[Sequence[int]] | None,
    ) -> None:
        self._own_text = ordinary is None or self._corpus is None
        if ordinary is not None and self._corpus is not None:
            both = set(map(tuple, ordinary)) & set(map(tuple, self._corpus))
            if both:
                raise ValueError(
                    f"ordinary must have no text that is in corpus, got {len(both)} rows of it"
                )
        with self._pristine():
            if ordinary is None:
                ordinary = own_samples(
                    self.model,
                    self.tokenizer,
                    PROBE_ROWS * PROBE_LENGTH,
                    length=PROBE_LENGTH,
                    seed=self.options.seed + 1,
                )
            self.probes = Probes(
                tuple((str(a), str(b)) for a, b in known or ()),
                tuple(tuple(map(int, row)) for row in ordinary),
            )
            path = self.folder / BASELINE
            wanted = {"model": self.edited.base, "probes": self.probes.digest()}
            kept = of_first(lambda: read_json(path) if path.exists() else {})
            if {name: kept.get(name) for name in wanted} != wanted:
                found = Baseline.of(self.model, self.tokenizer, self.probes)
                kept = {**wanted, **asdict(found)}
                of_first(write_json_atomic, path, kept)
            self.baseline = Baseline(kept["answered"], kept["perplexity"], kept["guesses"])

    def _settle(self, facts: Sequence[Fact], relations: Sequence[Relation]) -> None:
        """Choose, once, where edits go and how the model replies; keep the pristine weights."""
        from hybrid_sleep.parametric.settle import settle

        with self._pristine():
            settled = settle(self, facts, relations)
        if settled != self.options:
            self.options = settled
            of_first(write_json_atomic, self.folder / SETTINGS, settled.to_dict())
        new = self.edited.keep(self.sites)
        if new:
            self._asked(lambda store: store.save_pristine(new))

    def _check_writable(self, facts: Sequence[Fact], relations: Sequence[Relation]) -> None:
        from hybrid_sleep.parametric.contexts import edit_contexts

        for fact, relation in zip(facts, relations, strict=True):
            edit_contexts(self.tokenizer, fact, relation)

    def _replaced(self, todo: Sequence[Item], states: Mapping[int, StoredFact]) -> set[int]:
        """Facts in the weights that those of `todo` take the place of."""
        keys = {fact.key for _, fact, _ in todo}
        ids = {number for number, _, _ in todo}
        return {
            x.id
            for x in states.values()
            if x.state in WRITTEN and x.fact.key in keys and x.id not in ids
        }

    def _without(self, ids: Collection[int]) -> list[dict[str, Factors]]:
        """The factors in effect without the parts of these facts."""
        found = self._asked(lambda store: store.factors())
        gone = torch.tensor(sorted(ids), dtype=torch.int64)
        return [
            {site: part.only(~torch.isin(part.facts, gone)) for site, part in commit.items()}
            for commit in found
        ]

    def _keys(self, without: Collection[int]) -> Any:
        gone = torch.tensor(sorted(without), dtype=torch.int64)
        found = self._asked(lambda store: store.keys())
        kept = {site: ~torch.isin(facts, gone) for site, (_, facts) in found.items()}
        return {
            site: (keys[kept[site]], facts[kept[site]]) for site, (keys, facts) in found.items()
        }

    def _slept_on(self, ids: set[int]) -> bool:
        """Whether the weights come from a sleep over these very facts."""

        def look(store: FactStore) -> bool:
            head = store.head
            if head is None or head.effective is None:
                return False
            commit = next(x for x in store.history() if x.id == head.effective)
            return commit.kind == "sleep" and set(commit.report.get("ids", ())) == ids

        return self._asked(look)

    @contextmanager
    def _trial(self) -> Iterator[Any]:
        """Change the weights; unless kept, they come back bit for bit."""
        names = [site.parameter for site in self.sites if site.dense]
        before = self._asked(lambda store: store.factors())
        try:
            with trial(self.model, names) as change:
                yield change
        finally:
            if not change.kept:
                # What is beside a quantised site is no parameter.
                self.edited.materialise(before)

    @contextmanager
    def _pristine(self) -> Iterator[None]:
        """The model without any edit inside of the block."""
        before = self._asked(lambda store: store.factors())
        self.edited.materialise([])
        try:
            yield
        finally:
            self.edited.materialise(before)


def of_first_kept(work: Any) -> Any:
    """What `work()` returns in the first process, None in others; errors are raised in all."""
    kept: list[Any] = []
    of_first(lambda: kept.append(work()))
    return kept[0] if kept else None


def _merged(parts: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """One set of factors with the columns of all, in order."""
    by_site: dict[str, list[Factors]] = {}
    for commit in parts:
        for site, part in commit.items():
            by_site.setdefault(site, []).append(part)
    return {
        site: Factors(
            torch.cat([p.left for p in of], dim=1),
            torch.cat([p.right for p in of]),
            torch.cat([p.keys for p in of]),
            torch.cat([p.facts for p in of]),
        )
        for site, of in by_site.items()
    }


def _hours_awake(store: FactStore) -> float | None:
    """Since the last sleep, or since the store was made; None while it is empty."""
    history = store.history()
    if not history:
        return None
    sleeps = [x.time for x in history if x.kind == "sleep" and x.status == "committed"]
    from datetime import UTC, datetime

    start = datetime.fromisoformat(sleeps[-1] if sleeps else history[0].time)
    start = start if start.tzinfo else start.replace(tzinfo=UTC)
    return max(0.0, (datetime.now(UTC) - start).total_seconds() / 3600)
