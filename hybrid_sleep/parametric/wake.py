"""Write new facts into the weights as they come."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hybrid_sleep.parametric.edit import Item, plan_facts, solve_plan
from hybrid_sleep.parametric.factors import merged
from hybrid_sleep.parametric.facts import Fact, Relation, check_facts, parse_fact
from hybrid_sleep.parametric.record import Record
from hybrid_sleep.parametric.schema import ACTIVE, QUARANTINED, WRITTEN
from hybrid_sleep.parametric.store import StoredFact

if TYPE_CHECKING:
    from hybrid_sleep.parametric.workspace import Workspace


Given = str | Fact | Iterable[str | Fact]


def read_facts(
    memory: Workspace, given: Given, relations: Iterable[Relation]
) -> tuple[list[Fact], list[Relation]]:
    """Facts, each once, and the words of their relations; all of them can be written.

    ValueError, before `memory` takes note of `relations`, for what `Memory.learn` refuses.
    """
    several = [given] if isinstance(given, str | Fact) else list(given)
    known = memory.relations | {r.name.casefold(): r for r in relations}
    facts = check_facts(
        [x if isinstance(x, Fact) else parse_fact(x, known.values()) for x in several]
    )
    words = [known.get(x.key[1]) or memory.relation(x.relation) for x in facts]
    memory.check_words(facts, words)
    memory.relations = known
    return facts, words


def learn(memory: Workspace, given: Given, relations: Iterable[Relation]) -> Record:
    """What `Memory.learn` does: check, keep, then write."""
    began = time.perf_counter()
    facts, words = read_facts(memory, given, relations)
    if facts:
        memory.settle(facts, words)
    ids = memory.asked(lambda store: store.add(facts, {r.name: r for r in words}.values()))
    stored = {x.id: x for x in memory.facts()}
    todo = [
        (number, fact, relation)
        for number, fact, relation in zip(ids, facts, words, strict=True)
        if stored[number].state not in WRITTEN
    ]
    record = Record("wake", read={"facts": len(facts), "new": len(todo)})
    if todo:
        return _write(memory, record, todo, stored, began)
    record.outcome, record.why = "nothing to do", "all of it is in the weights already"
    record.seconds = time.perf_counter() - began
    memory.last = record
    return record


def _write(
    memory: Workspace,
    record: Record,
    todo: Sequence[Item],
    stored: Mapping[int, StoredFact],
    began: float,
) -> Record:
    """Write `todo` in the place of what they replace; what cannot be held is quarantined."""
    options, replaced = memory.options.wake, _replaced(todo, stored)
    with memory.trial() as change:
        factors = memory.without(replaced)
        if replaced:
            # v* of a new object must not have to work against the old one.
            memory.edited.materialise(factors)
        planned = plan_facts(memory.model, memory.tokenizer, todo, memory.sites[-1], options)
        losses = planned.losses()
        lost = {number for number, loss in losses.items() if not loss <= options.hopeless}
        edit = None
        if len(lost) < len(todo):
            earlier = merged(factors) if options.accumulate else {}
            past = {site: (part.keys, part.facts) for site, part in earlier.items()}
            kept = planned.only(set(losses) - lost)
            solved = solve_plan(memory.model, kept, memory.preconditioners(options), past)
            edit = memory.agreed(solved)
            factors = [*factors, edit.factors]
        memory.edited.materialise(factors)
        record.changed = memory.edited.change()
        record.dropped = {
            str(fact): f"the loss of its target stays at {losses[number]:.2f} nats a token"
            for number, fact, _ in todo
            if number in lost
        }
        record.seconds = time.perf_counter() - began
        memory.committed(
            record,
            states={x: QUARANTINED if x in lost else ACTIVE for x in losses},
            factors=merged(factors) if replaced else edit.factors if edit else None,
            replace=bool(replaced),
            edits=edit.facts if edit else None,
        )
        change.keep()
    return record


def _replaced(todo: Sequence[Item], stored: Mapping[int, StoredFact]) -> set[int]:
    """Facts in the weights that those of `todo` take the place of."""
    keys, ids = {fact.key for _, fact, _ in todo}, {number for number, _, _ in todo}
    return {
        x.id
        for x in stored.values()
        if x.state in WRITTEN and x.fact.key in keys and x.id not in ids
    }
