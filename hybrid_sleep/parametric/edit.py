"""Write facts into weights: contexts, v*, keys and the solve, put together.

MEMIT (arXiv 2210.07229, Algorithm 1) with the keys of earlier facts preserved. One site takes the
whole residual; of several, in ascending order, each takes an equal share of what is then left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.contexts import (
    ABOUT,
    POSITIONS,
    REPLIES,
    Context,
    by_token,
    context,
    edit_contexts,
)
from hybrid_sleep.parametric.factors import Factors
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.sites import Site, added, blocks, capture, ending, frozen, hidden
from hybrid_sleep.parametric.solve import FILTERS, Preconditioner, Solution, solve
from hybrid_sleep.parametric.targets import TargetOptions, Targets, find_targets
from hybrid_sleep.validation import check_choice, check_count, check_number

Item = tuple[int, Fact, Relation]


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """How facts are written.

    weight: of preserved keys against an edited one, in tokens of ordinary text; the larger, the
        less of the model changes, and the less of a fact is written. filter: see `Preconditioner`.
    position: of the key, "subject_last" or "prompt_last"; with the latter, every token of the
        object has a key and a v* of its own, in front of it.
    reply: how the model answers questions, by a "statement" or by the "object" alone; None: as it
        is found to.
    statements, questions: how many of a relation's are used, None for all. about: how many
        questions about the subject, of no relation, are answered by the fact as well; for subjects
        with one fact. prefixes: texts that the first statement is written behind as well.
    target: how v* is found; hopeless: its loss (nats a token) above which a fact is not written.
    accumulate: preserve the keys of earlier facts; without it every edit
        forgets some of those before.
    """

    weight: float = 100.0
    filter: str = "ridge"
    position: str = "subject_last"
    reply: str | None = None
    statements: int | None = None
    questions: int | None = None
    about: int = 0
    prefixes: tuple[str, ...] = ()
    target: TargetOptions = field(default_factory=TargetOptions)
    hopeless: float = 2.0
    accumulate: bool = True

    def __post_init__(self) -> None:
        check_number("weight", self.weight, above=0)
        check_choice("filter", self.filter, FILTERS)
        check_choice("position", self.position, POSITIONS)
        if self.reply is not None:
            check_choice("reply", self.reply, REPLIES)
        check_number("hopeless", self.hopeless, above=0)
        check_count("about", self.about, 0, len(ABOUT))
        for name, least in (("statements", 1), ("questions", 0)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)

    def harder(self, by: float) -> EditOptions:
        """With `by` times the steps and the clamp, for facts that need more than others."""
        target = self.target
        return replace(
            self, target=replace(target, steps=int(by * target.steps), clamp=by * target.clamp)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Edit:
    """Factors by site, and what is known of them.

    facts: by id and site, diagnostics: the loss of the target before and after v* (nats a token),
    its norm in norms of the residual stream, and the norm of what the weights get for it.
    solutions: by site name, error, leak and condition of the solve, and the norm of the edit.
    """

    factors: dict[str, Factors]
    facts: dict[int, dict[str, dict[str, float]]]
    solutions: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """Facts with their contexts and v*, to be solved for at any strength.

    A fact is there once for each v* that it has.
    """

    items: tuple[Item, ...]
    contexts: tuple[tuple[Context, ...], ...]
    targets: Targets

    def only(self, ids: Collection[int]) -> Plan:
        """Of the facts with these ids."""
        kept = [i for i, item in enumerate(self.items) if item[0] in ids]
        return Plan(
            tuple(self.items[i] for i in kept),
            tuple(self.contexts[i] for i in kept),
            self.targets.only(kept),
        )

    def losses(self) -> dict[int, float]:
        """By id of a fact, the loss of its v*, of several the highest."""
        found: dict[int, float] = {}
        for (number, _, _), loss in zip(self.items, self.targets.loss.tolist(), strict=True):
            found[number] = max(loss, found.get(number, loss))
        return found

    def updated(self, other: Plan) -> Plan:
        """With what `other` has for facts in both, where its loss is lower."""
        targets = self.targets
        places = {c: i for i, c in enumerate(self.contexts)}
        for j, own in enumerate(other.contexts):
            i = places[own]
            if other.targets.loss[j] < targets.loss[i]:
                targets = targets.replaced(i, other.targets, j)
        return Plan(self.items, self.contexts, targets)


def plan_facts(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    site: Site,
    options: EditOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Find v* at `site`, the last of those to edit, for the facts of `items` (ids with them).

    For `model` as it is now. Raises ValueError for facts that no context can be made of.
    """
    if not items:
        raise ValueError("items must be one or more, got none")
    contexts = [
        edit_contexts(
            tokenizer,
            fact,
            relation,
            prefixes=options.prefixes,
            statements=options.statements,
            questions=options.questions,
            about=options.about,
            position=options.position,
            reply=options.reply or REPLIES[0],
        )
        for _, fact, relation in items
    ]
    essence = [
        context(tokenizer, f"{fact.subject} is", fact.subject, "", options.position)
        if options.target.kl
        else None
        for _, fact, _ in items
    ]
    # What is optimised: items with contexts and an essence, as many as there are v*.
    parts: list[tuple[Item, tuple[Context, ...], Context | None]] = []
    for item, own, kept in zip(items, contexts, essence, strict=True):
        split = by_token(own) if options.position == "prompt_last" else [tuple(own)]
        parts += [(item, part, kept if i == 0 else None) for i, part in enumerate(split)]
    chosen, told, still = (list(x) for x in zip(*parts, strict=True))
    targets = find_targets(model, site, told, still, options.target, progress)
    return Plan(tuple(chosen), tuple(told), targets)


def solve_plan(
    model: nn.Module,
    plan: Plan,
    preconditioners: Mapping[Site, Preconditioner],
    past: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Edit:
    """The factors that make `model`, as it is now, answer the facts of `plan`.

    preconditioners: one for each site to edit. past: by site, keys `[p, d]` to preserve, and whose;
    those of facts in the plan are left out, as they are written anew. The weights are not touched.
    """
    sites = sorted(preconditioners, key=lambda site: site.layer)
    last, count = sites[-1], len(plan.items)
    ids = torch.tensor([number for number, _, _ in plan.items])
    factors: dict[Site, Factors] = {}
    solutions: dict[Site, Solution] = {}
    for left, site in zip(range(len(sites), 0, -1), sites, strict=True):
        with added(model, factors):
            keys, owner, stream = _keys(model, site, last, plan.contexts)
        if site == sites[0]:
            start = stream
        # What the sites below have already moved the stream behind the last one by counts as done.
        missing = plan.targets.delta.double() - _mean(stream - start, owner, count)
        old = None
        if past is not None and site.name in past:
            known, whose = past[site.name]
            old = known[~torch.isin(whose, ids)].to(keys.device).T
        done = solve(keys.T, missing.T / left, preconditioners[site], old, owner)
        solutions[site] = done
        factors[site] = Factors(
            done.left.float().cpu(),
            done.right.float().cpu(),
            _mean(keys, owner, count).float().cpu(),
            ids,
        )
    return Edit(
        {site.name: part for site, part in factors.items()},
        {
            number: {
                site.name: _told(plan.targets, i, factors[site].only(ids == number))
                for site in sites
            }
            # Of a fact with several v*, what is told of v* is of the worst.
            for i, (number, _, _) in sorted(
                enumerate(plan.items), key=lambda pair: float(plan.targets.loss[pair[0]])
            )
        },
        {
            site.name: {name: getattr(s, name) for name in ("error", "leak", "condition", "norm")}
            for site, s in solutions.items()
        },
    )


@torch.no_grad()
def _keys(
    model: nn.Module, site: Site, last: Site, contexts: Sequence[Sequence[Context]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `[n, d]` at `site` of all contexts, whose they are `[n]`, and the residual
    stream `[n, o]` behind the last site's block there.

    One for every token of a context that holds the fact, and for every time the site is applied.
    What lies above the last site is not computed.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = []
    outputs: list[Tensor] = []
    owner: list[int] = []

    def look(module: nn.Module, given: Any, out: Any) -> None:
        behind.append(hidden(out).detach())

    behind: list[Tensor] = []
    with ExitStack() as stack:
        hook = blocks(model)[1][last.layer].register_forward_hook(look)
        stack.callback(hook.remove)
        stack.enter_context(frozen(model))
        seen = stack.enter_context(capture(model, [site]))
        run = stack.enter_context(ending(model, last.layer))
        for f, own in enumerate(contexts):
            for c in own:
                run(input_ids=torch.tensor([c.ids[: max(c.at) + 1]], device=device))
                for keys, out in zip(seen[site], behind, strict=True):
                    found.append(keys.flatten(0, -2)[list(c.at)].double())
                    outputs.append(out[0, list(c.at)].double())
                    owner += [f] * len(c.at)
                seen[site].clear()
                behind.clear()
    return torch.cat(found), torch.tensor(owner, device=device), torch.cat(outputs)


def _mean(rows: Tensor, owner: Tensor, count: int) -> Tensor:
    """The mean `[count, ...]` of each owner's rows."""
    total = rows.new_zeros(count, rows.shape[1]).index_add_(0, owner, rows)
    return total / torch.bincount(owner, minlength=count).to(rows)[:, None]


def _told(targets: Targets, i: int, own: Factors) -> dict[str, float]:
    return {
        "loss_before": float(targets.before[i]),
        "loss": float(targets.loss[i]),
        "delta": float(targets.share[i]),
        "norm": own.norm,
    }
