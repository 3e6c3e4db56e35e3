"""The values of a joint solve, found again through the model.

The solve gives every key what the statistics leave of a v* that was found for its fact alone, at
the last site, as if nothing else had changed. Here the directions of its edit stay: for site s, D_s
= L_s R_s with R_s `[F, d]` as solved, little of which ordinary keys have. The values L_s `[o, F]`
are trained through the model, for all facts at once, to minimise

    sum_c NLL(c) / n  +  energy sum_s tr(D_s C_s D_s^T) / e0  +  kl E[ KL(before || after) ]
        -  denial sum_d log(1 - P(d)) / m

over the contexts c of the facts, with C_s the second moment of keys (arXiv 2210.07229, Eq. 14), e0
the sum for the solve itself, the divergence on text that is to stay as it was, and the likelihood
of the object behind a denial d of its fact (Welleck et al., arXiv 1908.04319, Eq. 4). The first two
terms are those of the solve with the likelihood of what is to be said in the place of its squared
distance from v*; the others know what the statistics do not, how much a change is heard, and where.
That the model stay behind denials what it was, too, would cost half of the facts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.contexts import Context, context, spaced
from hybrid_sleep.parametric.dreams.losses import row_losses
from hybrid_sleep.parametric.edit import Edit, Plan
from hybrid_sleep.parametric.facts import SLOT
from hybrid_sleep.parametric.lessons import Lesson, lesson_loss, taught
from hybrid_sleep.parametric.mix import Row
from hybrid_sleep.parametric.sites import Site, added, frozen
from hybrid_sleep.parametric.solve import Spectrum
from hybrid_sleep.parametric.targets import replays
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.validation import check_count, check_number

# Tokens of a text that is to stay, at most.
LENGTH = 96
# What counts as certain, so that the logarithm of its contrary is finite.
CERTAIN = 1 - 1e-6


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """How the values of an edit are found again.

    steps: of Adam, none for 0. rate: the length of its first steps, in root mean squares of a
        site's values; it falls to a tenth. stop: mean loss of an object (nats a token) at which a
        context is left in peace, see `TargetOptions`.
    energy: weight of what the edit does to ordinary keys, against what the solve did to them, in
        nats. kl: weight of the divergence, in nats for one nat a token; rows: of each kind of text
        that is to stay, in one step. denial: weight of what is said behind denials.
    """

    steps: int = 16
    rate: float = 0.1
    stop: float = 0.05
    energy: float = 1.0
    kl: float = 10.0
    rows: int = 4
    denial: float = 0.25

    def __post_init__(self) -> None:
        check_count("steps", self.steps, minimum=0)
        check_count("rows", self.rows)
        check_number("rate", self.rate, above=0)
        for name in ("stop", "energy", "kl", "denial"):
            check_number(name, getattr(self, name), least=0)


def refine(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan,
    edit: Edit,
    spectra: Mapping[Site, Spectrum],
    texts: Sequence[Sequence[Sequence[int]]],
    options: Refinement,
    *,
    strength: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Edit:
    """`edit`, which `solve_plan` made of `plan` for `model` as it is now, with other values.

    spectra: of C, for each site of the edit. texts: kinds of text that are to stay, each of rows of
    ids; all count alike. strength: times the weight of the divergence, as of preserved keys. The
    weights are not touched.
    """
    sites = sorted(spectra, key=lambda site: site.layer)
    factors = {site: edit.factors[site.name] for site in sites}
    device = next(model.parameters()).device
    right = {site: factors[site].right.to(device) for site in sites}
    reads = {site: spectra[site].gram(right[site]).to(right[site]) for site in sites}
    values = {site: factors[site].left.to(device).clone() for site in sites}
    start = sum(float(_energy(values[site], reads[site])) for site in sites)
    if not options.steps or not start:
        return edit
    kinds = [[tuple(row[:LENGTH]) for row in kind if len(row) > 1] for kind in texts]
    kinds = [kind for kind in kinds if kind] if options.kl else []
    contexts = [(f, c) for f, own in enumerate(plan.contexts) for c in own]
    drawn = random.Random(derive_seed("refine", seed))
    for value in values.values():
        value.requires_grad_()
    groups = [
        {"params": [value], "lr": options.rate * float(value.detach().square().mean().sqrt())}
        for value in values.values()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - 0.9 * i / options.steps)
    with frozen(model), torch.enable_grad():
        # What the rows begin with is not the same with the edit in it, so it is read each time.
        runs = replays(model, sites[0], contexts, begun=False)
        still = [torch.zeros(len(run.contexts), sites[0].outputs, device=device) for run in runs]
        with torch.no_grad():
            before = [run.losses(none)[1] for run, none in zip(runs, still, strict=True)]
        denied = _denials(tokenizer, plan) if options.denial else []
        for step in range(options.steps):
            optimizer.zero_grad()
            lessons = [
                Lesson("foundation", Row(row))
                for kind in kinds
                for row in drawn.sample(kind, min(options.rows, len(kind)))
            ]
            lessons = taught(model, lessons)
            now = {site: replace(factors[site], left=values[site]) for site in sites}
            for run, none, reply_before in zip(runs, still, before, strict=True):
                with added(model, now):
                    said, reply, _ = run.losses(none)
                open_ = (said > options.stop) | (reply > reply_before + options.stop)
                if bool(open_.any()):
                    (torch.where(open_, said + reply, 0.0).sum() / len(contexts)).backward()
            if lessons:
                with added(model, now):
                    apart = lesson_loss(model, lessons)
                (options.kl * strength * apart).backward()
            if denied:
                with added(model, now):
                    said = _likelihoods(model, denied)
                (options.denial * -torch.log1p(-CERTAIN * said).mean()).backward()
            energy = torch.stack([_energy(values[site], reads[site]) for site in sites]).sum()
            (options.energy * energy / start).backward()
            optimizer.step()
            falling.step()
            if progress is not None:
                progress(step + 1, options.steps)
    new = {
        site.name: replace(factors[site], left=values[site].detach().cpu()) for site in sites
    }
    return replace(
        edit,
        factors=new,
        facts={
            number: {
                name: {**told, "norm": new[name].only(new[name].facts == number).norm}
                for name, told in by_site.items()
            }
            for number, by_site in edit.facts.items()
        },
        solutions={
            name: {**told, "norm": new[name].norm} for name, told in edit.solutions.items()
        },
    )


def _denials(tokenizer: Any, plan: Plan) -> list[Context]:
    """The denials of each fact, gone on with by its object."""
    found = []
    for _, fact, relation in dict.fromkeys(plan.items):
        for denial in relation.denials:
            text = denial.replace(SLOT, fact.subject)
            found.append(context(tokenizer, text, fact.subject, spaced(text, fact.object)))
    return found


def _likelihoods(model: nn.Module, contexts: Sequence[Context]) -> Tensor:
    """`[n]`, the probability of the whole object in each, with gradient."""
    losses = row_losses(model, [(c.ids, c.object) for c in contexts])
    return (-losses * losses.new_tensor([len(c.ids) - c.object for c in contexts])).exp()


def _energy(left: Tensor, reads: Tensor) -> Tensor:
    """`tr(L (R C R^T) L^T)`: the mean square of what an edit adds to the stream."""
    return ((left @ reads) * left).sum()
