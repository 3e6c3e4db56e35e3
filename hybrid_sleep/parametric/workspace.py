"""What a memory works with: the store, the edited weights, statistics, and what it is tested on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.awake import slept_on
from hybrid_sleep.parametric.contexts import beginnings, edit_contexts
from hybrid_sleep.parametric.dreams.examine import rows_of
from hybrid_sleep.parametric.dreams.forms import QUESTION, Parsed
from hybrid_sleep.parametric.edit import Edit, EditOptions
from hybrid_sleep.parametric.edited import EditedWeights
from hybrid_sleep.parametric.factors import Factors
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.gate import Trial, trial
from hybrid_sleep.parametric.measure import encode, user_turn
from hybrid_sleep.parametric.options import MemoryOptions, remember_options
from hybrid_sleep.parametric.probes import Baseline, Probes
from hybrid_sleep.parametric.record import Record
from hybrid_sleep.parametric.settle import settle
from hybrid_sleep.parametric.sites import Site, site_at
from hybrid_sleep.parametric.solve import Preconditioner
from hybrid_sleep.parametric.statistics import (
    KeyStatistics,
    enough_tokens,
    load_or_collect,
    own_samples,
)
from hybrid_sleep.parametric.store import FactStore, StoredFact
from hybrid_sleep.support.io import read_json, write_json_atomic
from hybrid_sleep.training.ranks import of_first

if TYPE_CHECKING:
    from hybrid_sleep.parametric.experience.buffer import Buffer
    from hybrid_sleep.parametric.experience.experience import Experience

T = TypeVar("T")
SETTINGS, BASELINE, STATISTICS = "memory.json", "baseline.json", "statistics"
TEXTS = "texts.json"
FRONT = "calibration"
PROBE_ROWS, PROBE_LENGTH = 16, 64
CHAT_LENGTH = 96  # a question and the reply's beginning
BEGUN_LENGTH = 40
OWN_TEXT = "statistics and perplexity are of the model's own samples where no text was given"


def has_experience(store: FactStore) -> bool:
    """Whether the store holds an experience, waiting or slept over."""
    return bool(store.database.execute("SELECT EXISTS (SELECT 1 FROM experiences)").fetchone()[0])


class Workspace:
    """The parts of a `Memory` that its steps use. With ZeRO-3 all processes call every method, and
    the first one alone has the store."""

    edited: EditedWeights
    options: MemoryOptions
    probes: Probes
    baseline: Baseline

    def __init__(self, folder: Path, model: nn.Module, tokenizer: Any):
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self.store: FactStore | None = None
        self.relations: dict[str, Relation] = {}
        self.corpus: Sequence[Sequence[int]] | None = None
        self.own_text = False
        self.last: Record | None = None
        self._buffer: Buffer | None = None
        self._factors: list[dict[str, Factors]] | None = None
        self._statistics: dict[Site, KeyStatistics] = {}
        self._preconditioners: dict[Any, dict[Site, Preconditioner]] = {}

    def asked(self, work: Callable[[FactStore], T]) -> T:
        """What `work(store)` returns, in every process."""

        def of_store() -> T:
            assert self.store is not None
            return work(self.store)

        return of_first(of_store)

    def open_store(self, held: ExitStack) -> None:
        """Open the store for writing, in the first process."""

        def of_model() -> None:
            store = FactStore.open(self.folder, self.edited.base, model=type(self.model).__name__)
            self.store = held.enter_context(store)

        of_first(of_model)

    @property
    def factors(self) -> list[dict[str, Factors]]:
        """Those in effect, by site, as the store lists them; read once, as nobody else writes."""
        if self._factors is None:
            self._factors = self.asked(lambda store: store.factors())
        return self._factors

    @property
    def sites(self) -> list[Site]:
        """Where edits go, the lowest first."""
        assert self.options.layers is not None
        return [site_at(self.model, layer) for layer in self.options.layers]

    @property
    def buffer(self) -> Buffer:
        """Experiences that wait for a sleep. Raises ValueError in all processes but the first, and
        ImportError, saying what to install, without the extra `memory`."""
        if self._buffer is None:
            if self.store is None:
                raise ValueError("buffer must be asked for in the first process, got another one")
            from hybrid_sleep.parametric.experience.buffer import Buffer

            buffer = Buffer(self.store, self.encoded, seed=self.options.seed)
            if self.options.study.erase and (slept := buffer.ids("slept")):
                # A process that was killed behind a commit could not.
                buffer.erase(ids=slept)
            self._buffer = buffer
        return self._buffer

    def kept(self, work: Callable[[Buffer], T]) -> T:
        """What `work(buffer)` returns, in every process."""
        return of_first(lambda: work(self.buffer))

    def encoded(self, experience: Experience) -> tuple[tuple[int, ...], int]:
        """Token ids of prompt and text, and where what is to be said begins."""
        if not experience.prompt:
            return tuple(encode(self.tokenizer, experience.text)), 0
        parsed = Parsed(experience.text, experience.prompt)
        return rows_of(self.tokenizer, QUESTION, parsed)

    def facts(self, states: Collection[str] | None = None) -> list[StoredFact]:
        """Those in the store, by state; None for all."""
        return self.asked(lambda store: store.facts(states) if states else store.facts())

    def relation(self, name: str) -> Relation:
        """The words of a relation: as given, as stored, or plain ones."""
        given = self.relations.get(name.casefold())
        return given or self.asked(lambda store: store.relation(name))

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
        """Of the keys of the model without its edits, at every site; collected once for what was
        trained, and kept in the folder."""
        missing = [site for site in self.sites if site not in self._statistics]
        if missing:
            digest, folder = self.edited.unedited(), self.folder / STATISTICS
            if digest != self.edited.base:
                folder /= digest[:16]
            with self.unedited():
                self._statistics |= load_or_collect(
                    folder, self.model, missing, digest, self.texts
                )
        return self._statistics

    def texts(self) -> list[Sequence[Sequence[int]]]:
        """What is to stay as it is, and keys are counted on: text, chats where the model has a
        template for them, and what it says of others in the words of the relations.

        The pristine model writes the last two itself, once; they are kept in the folder, where
        nothing that was learned later may turn up. Prose says nothing of what the turns of a chat
        need: edits that left prose as it was broke every reply. And what is close to an edit is
        rare in either.
        """
        path = self.folder / STATISTICS / TEXTS
        own = of_first(lambda: read_json(path)["texts"] if path.exists() else None)
        if own is None:
            with self.unedited(pristine=True):
                own = self._own_texts()
            of_first(write_json_atomic, path, {"texts": own})
        return [self.corpus, *own] if self.corpus else list(own)

    def _own_texts(self) -> list[list[list[int]]]:
        seed, given = self.options.seed, (self.model, self.tokenizer, enough_tokens(self.sites))
        # Not the samples that perplexity is of, one seed after the first.
        found = [] if self.corpus else [own_samples(*given, seed=seed)]
        turn = user_turn(self.tokenizer)
        if turn:
            found.append(own_samples(*given, length=CHAT_LENGTH, behind=[turn], seed=seed + 2))
        begun = beginnings(self.tokenizer, self.relations.values())
        if begun:
            found.append(own_samples(*given, length=BEGUN_LENGTH, behind=begun, seed=seed + 3))
        return found

    def agreed(self, edit: Edit) -> Edit:
        """The edit that the first process has solved for, in all."""
        return of_first(lambda: edit)

    def committed(
        self,
        record: Record,
        *,
        factors: dict[str, Factors] | None = None,
        replace: bool = False,
        also: Callable[[FactStore, int], None] | None = None,
        **parts: Any,
    ) -> Record:
        """Commit `record` and what goes with it; the pristine weights are on the disk before.

        `weights` among `parts` are those that the model has, without its edits, by now. also: what
        is done with the store and the commit's id in the same transaction.
        """
        digest = self.edited.digest() if record.outcome == "committed" else None
        before = [] if replace else self.factors
        if self.own_text:
            record.notes.append(OWN_TEXT)

        def commit(store: FactStore) -> int:
            with store.transaction("commit"):
                number = store.commit(
                    record.kind,
                    digest=digest,
                    report=record.to_dict(),
                    status=record.outcome,
                    factors=factors,
                    replace=replace,
                    **parts,
                )
                if also is not None:
                    also(store, number)
            return number

        new = self.asked(commit)
        if digest is not None and self.options.undos is not None:
            undos = self.options.undos
            self.asked(lambda store: store.trim(undos))
        self._factors = [*before, factors] if factors else before
        record.commit, self.last = new, record
        return record

    def set_probes(
        self,
        known: Sequence[tuple[str, str]] | None,
        ordinary: Sequence[Sequence[int]] | None,
    ) -> None:
        """Keep what is tested at every gate, and what the pristine model says to it.

        The model is asked once; `baseline.json` remembers.
        """
        self.own_text = ordinary is None or self.corpus is None
        if ordinary is not None and self.corpus is not None:
            both = set(map(tuple, ordinary)) & set(map(tuple, self.corpus))
            if both:
                raise ValueError(
                    f"ordinary must have no text that is in corpus, got {len(both)} rows of it"
                )
        given = Probes(
            tuple((str(a), str(b)) for a, b in known or ()),
            tuple(tuple(map(int, row)) for row in ordinary or ()),
        )
        wanted = {
            "model": self.edited.base,
            "given": given.digest(),
            "seed": None if given.rows else self.options.seed,
        }
        path = self.folder / BASELINE
        kept = of_first(lambda: read_json(path) if path.exists() else {})
        # Folders of before calibration was measured are asked once more.
        new = {name: kept.get(name) for name in wanted} != wanted
        if new or "calibration_error" not in kept:
            with self.unedited(pristine=True):
                rows = given.rows or tuple(
                    map(
                        tuple,
                        own_samples(
                            self.model,
                            self.tokenizer,
                            PROBE_ROWS * PROBE_LENGTH,
                            length=PROBE_LENGTH,
                            # Not the samples that statistics are of.
                            seed=self.options.seed + 1,
                        ),
                    )
                )
                found = Baseline.of(self.model, self.tokenizer, Probes(given.known, rows))
            kept = {**wanted, "rows": [list(row) for row in rows], **asdict(found)}
            of_first(write_json_atomic, path, kept)
        self.probes = Probes(given.known, tuple(map(tuple, kept["rows"])))
        self.baseline = Baseline(**{f.name: kept[f.name] for f in fields(Baseline)})

    def settle(self, facts: Sequence[Fact], relations: Sequence[Relation]) -> None:
        """Choose, once, where edits go and how the model replies; keep the pristine weights."""
        options = self.options
        if options.layers is None or not (options.wake.reply and options.night.reply):
            with self.unedited():
                self.options = settle(self, facts, relations)
            of_first(remember_options, self.folder / SETTINGS, self.options)
        new = self.edited.keep(self.sites)
        if new:
            self.asked(lambda store: store.save_pristine(new))
        # Plain words, of a relation that nobody gave, are words that statistics are of as well.
        self.relations = {r.name.casefold(): r for r in relations} | self.relations
        # With the pristine weights, which a trial would not leave alone.
        self.statistics()

    def check_words(self, facts: Sequence[Fact], relations: Sequence[Relation]) -> None:
        """Raise ValueError for a fact that no context can be made of."""
        for fact, relation in zip(facts, relations, strict=True):
            edit_contexts(self.tokenizer, fact, relation)

    def without(self, ids: Collection[int]) -> list[dict[str, Factors]]:
        """The factors in effect without the parts of these facts."""
        gone = torch.tensor(sorted(ids), dtype=torch.int64)
        return [
            {site: part.only(~torch.isin(part.facts, gone)) for site, part in commit.items()}
            for commit in self.factors
        ]

    def slept_on(self, ids: set[int]) -> bool:
        """Whether the weights come from a sleep over these very facts."""
        return self.asked(lambda store: slept_on(store, ids))

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Change the weights of which pristine ones are kept; unless kept, they come back bit for
        bit."""
        before, learned = self.factors, self.edited.learned
        try:
            with trial(self.model, self.edited.pristine.keys()) as change:
                yield change
        finally:
            if not change.kept:
                # What is beside a quantised site is no parameter.
                self.learned(learned)
                self.edited.materialise(before)

    def learned(self, weights: Mapping[str, Tensor]) -> None:
        """Take `weights` for those before any edit, from the next `materialise` on."""
        if weights is not self.edited.learned:
            self.edited.learn(weights)
            self._statistics, self._preconditioners = {}, {}

    @contextmanager
    def unedited(self, *, pristine: bool = False) -> Iterator[None]:
        """The model without any edit inside of the block, and if `pristine` as it was at first.

        Blocks may be nested, and stand in the middle of a trial.
        """
        before, learned = self.edited.materialised, self.edited.learned
        if pristine:
            self.edited.learn({})
        self.edited.materialise([])
        try:
            yield
        finally:
            self.edited.learned = learned
            self.edited.materialise(before)
