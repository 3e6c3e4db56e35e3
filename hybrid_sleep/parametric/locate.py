"""Where an edit goes, found and not assumed: which layer, and at which token.

A causal trace (Meng et al., arXiv 2202.05262, section 2.1) proposes places, see `trace`. As a trace
alone does not predict where an edit works (Hase et al., arXiv 2301.04213), v* is then optimised in
the best of them, and what the model says in words that v* has not seen decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.contexts import POSITIONS, Context, by_token, edit_contexts
from hybrid_sleep.parametric.edit import EditOptions, Plan, plan_facts
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.sites import Site, find_sites, frozen
from hybrid_sleep.parametric.targets import replays
from hybrid_sleep.parametric.trace import Trace, trace
from hybrid_sleep.support.markdown import table
from hybrid_sleep.validation import check_count, check_number

# Below this an object is not what the model would say.
LIKELY = 0.5
# Means of probabilities that are this close are the same for a choice.
TIE = 0.02


@dataclass(frozen=True)
class Candidate:
    """A place for edits, and what came of trying it.

    traced: share of P(answer) that its clean output recovers, None without a trace.
    reached: P(object) in the contexts of the edit with v* in place, the mean over facts;
    lowest: that of the worst fact. held_out: the same in words that v* has not seen.
    share: norm of v* in norms of the residual stream.
    """

    layer: int
    site: str
    position: str
    traced: float | None
    reached: float
    lowest: float
    held_out: float
    share: float


@dataclass(frozen=True)
class Located:
    """Where to edit: `site`, at the token `position`; `table`: all that was tried; `trace`."""

    site: Site
    position: str
    table: tuple[Candidate, ...]
    trace: Trace | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "layer": self.site.layer,
            "site": self.site.name,
            "position": self.position,
            "table": [asdict(one) for one in self.table],
            "trace": None if self.trace is None else self.trace.to_dict(),
        }

    def text(self) -> str:
        """Tables in Markdown: the trace, and what was tried."""
        rows = [
            [
                one.layer,
                one.position,
                "" if one.traced is None else f"{one.traced:.2f}",
                f"{one.reached:.2f} ({one.lowest:.2f})",
                f"{one.held_out:.2f}",
                f"{one.share:.2f}",
                "chosen" if (one.site, one.position) == (self.site.name, self.position) else "",
            ]
            for one in self.table
        ]
        head = ["layer", "token", "traced", "P reached (lowest)", "P held out", "norm of v*", ""]
        lines = [] if self.trace is None else [*self.trace.lines(), ""]
        return "\n".join([*lines, *table(head, rows, "rlr")]) + "\n"


def locate(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[tuple[Fact, Relation]],
    known: Sequence[tuple[Fact, Relation]] = (),
    *,
    options: EditOptions | None = None,
    positions: Sequence[str] = POSITIONS,
    top: int = 3,
    noise: float = 3.0,
    samples: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Located:
    """The best place to write `facts`, which the model does not know, with the table it is from.

    known: facts that it knows, for the trace, which chooses `top` layers at each of `positions` to
    try; without them, `top` layers are tried that are evenly spread. options: of the edit, of which
    contexts and v* are used. The best is where P(object) in the relations' held-out words is
    highest; of equal ones, within 0.02, the lowest layer.

    Nothing of the model is changed. Raises ValueError if v* makes no object likely anywhere, and
    for `known` that the model does not know.
    """
    if not facts:
        raise ValueError("facts must be one or more, got none")
    check_count("top", top)
    check_number("noise", noise, above=0)
    options = options or EditOptions()
    sites = find_sites(model)
    found = None
    if known:
        found = trace(
            model, tokenizer, known, positions=positions, noise=noise, samples=samples, seed=seed
        )
    places = _places(sites, positions, found, top)
    tried = []
    for i, (site, position) in enumerate(places):
        at = replace(options, position=position)
        tried.append(try_place(model, tokenizer, facts, site, at, found))
        if progress is not None:
            progress(i + 1, len(places))
    able = [one for one in tried if one.reached > LIKELY]
    if not able:
        best = max(tried, key=lambda one: one.reached)
        raise ValueError(
            f"model must have a site that can hold a fact, got P(object) of at most "
            f"{best.reached:.2f} with v* in place, at {best.site}, {best.position}; "
            f"{len(tried)} were tried, raise options.target.steps or clamp"
        )
    highest = max(one.held_out for one in able)
    best = min(
        (one for one in able if one.held_out >= highest - TIE),
        key=lambda one: (one.layer, -one.held_out),
    )
    site = next(site for site in sites if site.name == best.site)
    return Located(site, best.position, tuple(tried), found)


def _places(
    sites: Sequence[Site], positions: Sequence[str], found: Trace | None, top: int
) -> list[tuple[Site, str]]:
    """What to try: by position, the sites with the highest trace, the lower one of equals."""
    if found is None:
        count = min(top, len(sites))
        spread = [sites[round((i + 0.5) * len(sites) / count - 0.5)] for i in range(count)]
        return [(site, position) for position in positions for site in spread]

    def best(position: str) -> list[Site]:
        means = {site: found.effect(site.layer, position).mean for site in sites}
        enough = max(means.values()) - TIE
        # Behind the layer that read the answer every block's output has it alike.
        return sorted(sites, key=lambda site: (max(0.0, enough - means[site]), site.layer))[:top]

    return [(site, position) for position in positions for site in best(position)]


def try_place(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[tuple[Fact, Relation]],
    site: Site,
    options: EditOptions,
    found: Trace | None = None,
) -> Candidate:
    """What v* at `site` makes of `facts`, at the token and in the contexts of `options`."""
    items = [(i, fact, relation) for i, (fact, relation) in enumerate(facts)]
    plan = plan_facts(model, tokenizer, items, site, options)
    reached = stated(model, site, plan, plan.contexts)
    unseen: list[Sequence[Context]] = []
    for pair in facts:
        own = held_out_contexts(tokenizer, *pair, options)
        unseen += by_token(own) if options.position == "prompt_last" else [own]
    held_out = stated(model, site, plan, unseen)
    traced = None if found is None else found.effect(site.layer, options.position).mean
    return Candidate(
        site.layer,
        site.name,
        options.position,
        traced,
        float(reached.mean()),
        float(reached.min()),
        float(held_out.mean()),
        float(plan.targets.share.mean()),
    )


def held_out_contexts(
    tokenizer: Any, fact: Fact, relation: Relation, options: EditOptions
) -> list[Context]:
    """The contexts of `fact` in the words that no edit sees; those of the edit if there are none.

    Questions come with the reply that `options` says.
    """
    if not (relation.held_out or relation.held_out_questions):
        return edit_contexts(tokenizer, fact, relation, position=options.position)
    unseen = replace(
        relation,
        statements=relation.held_out or relation.statements,
        questions=relation.held_out_questions,
        held_out=(),
        held_out_questions=(),
    )
    return edit_contexts(
        tokenizer,
        fact,
        unseen,
        statements=None if relation.held_out else 0,
        position=options.position,
        reply=options.reply or "statement",
    )


@torch.no_grad()
def stated(
    model: nn.Module, site: Site, plan: Plan, contexts: Sequence[Sequence[Context]]
) -> Tensor:
    """P of what each fact's contexts are to go on with, v* in place: `[F]`, a mean over contexts.

    contexts: for each v* of the plan. Of an object of several tokens it is the geometric mean of
    their probabilities, and the least of them where each has a v* of its own.
    """
    delta = plan.targets.delta
    total = torch.zeros(len(contexts), dtype=torch.float64, device=delta.device)
    owned = [(f, c) for f, own in enumerate(contexts) for c in own]
    with frozen(model):
        for run in replays(model, site, owned):
            said, reply, _ = run.losses(delta[run.owner])
            total.index_add_(0, run.owner, (-said - reply).exp().double())
    total /= torch.tensor([len(own) for own in contexts], device=total.device)
    least: dict[int, float] = {}
    for (number, _, _), p in zip(plan.items, total.tolist(), strict=True):
        least[number] = min(p, least.get(number, p))
    return torch.tensor(list(least.values()))
