"""Which dreams to learn from: some by their gradient, some at random, those that help.

Section 3 of Behrouz et al. (arXiv 2606.03979) keeps the top k by "gradient of the objective" and b
at random, and does not say which number a gradient is ranked by. Here it is the inner product of a
dream's gradient with that of its source: to first order, by how much a small step on the dream
lowers the loss of the source itself. The norm, as an alternative, ranks what surprises the model
most, noise included.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.parametric.dreams.dream import ACQUISITION, Check, Dream, Source
from hybrid_sleep.parametric.dreams.losses import mean_losses, row_losses
from hybrid_sleep.parametric.gate import trial
from hybrid_sleep.parametric.measure import encode
from hybrid_sleep.parametric.sites import find_sites, frozen
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.validation import check_choice, check_count, check_number

ALIGNMENT, NORM = "alignment", "norm"
LAST = 2


def choose_dreams(
    model: nn.Module,
    tokenizer: Any,
    dreams: Sequence[Dream],
    sources: Sequence[Source],
    *,
    top: float,
    more: float,
    helping: bool = False,
    rate: float = 1e-4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Dream]:
    """`dreams` with the checks "selected" and, for `helping`, "helps" on those kept so far.

    top, more: shares of a source's dreams that are kept by their score, rounded up, and at random;
    of 1 together nothing is scored, and all of them stay. helping: of those selected, keep one only
    if a step on it, the first of Adam at `rate`, lowers the mean loss of its source and of the
    other dreams of it that were kept so far. Nothing of the model changes.
    """
    if not any(dream.kept for dream in dreams):
        return list(dreams)
    if top + more < 1:
        scored = score(model, tokenizer, dreams, sources, progress=progress)
        dreams = select_shares(scored, top, more, seed=seed)
    return helpful(model, tokenizer, dreams, sources, rate, progress) if helping else list(dreams)


def scored_weights(model: nn.Module, last: int = LAST) -> list[str]:
    """Names of the weights whose gradients are ranked: the writers of the `last` blocks.

    They reach the output by the shortest way, and cost no backward pass below them. Raises
    ValueError if none of them has floating point weights, whole in this process.
    """
    check_count("last", last)
    parameters = dict(model.named_parameters())
    names = [site.parameter for site in find_sites(model)[-last:] if site.dense]
    names = [name for name in names if not hasattr(parameters[name], "ds_id")]
    if not names:
        raise ValueError(f"model must have dense weights in the last {last} blocks to rank dreams")
    return names


def score(
    model: nn.Module,
    tokenizer: Any,
    dreams: Sequence[Dream],
    sources: Sequence[Source],
    *,
    by: str = ALIGNMENT,
    last: int = LAST,
    progress: Callable[[int, int], None] | None = None,
) -> list[Dream]:
    """`dreams`, those that are kept so far with a score; the higher, the better.

    by: "alignment", the inner product of the gradients of a dream's mean loss, without its source
    in context, and of its sources', summed in fp64; "norm": of the dream's alone. Gradients are of
    `scored_weights(model, last)`. Nothing of the model changes. Raises ValueError, before it runs,
    for a dream whose source is not in `sources`.
    """
    check_choice("by", by, (ALIGNMENT, NORM))
    texts = {source.id: source.text for source in sources}
    chosen = [dream for dream in dreams if dream.kept and dream.kind == ACQUISITION]
    for dream in chosen:
        if not set(dream.sources) <= texts.keys():
            raise ValueError(
                f"sources must have those of every dream, {dream.sources}, got {sorted(texts)}"
            )
    made: dict[int, float] = {}
    at: tuple[str, ...] = ()
    of_sources: list[Tensor] = []
    with _gradients(model, scored_weights(model, last)) as gradient:
        # One source's gradient at a time is held.
        for dream in sorted(chosen, key=lambda dream: dream.sources):
            if by == ALIGNMENT and dream.sources != at:
                at = dream.sources
                each = [gradient(encode(tokenizer, texts[name]), 1) for name in at]
                of_sources = [torch.stack(parts).sum(0) for parts in zip(*each, strict=True)]
            own = gradient(dream.ids, dream.start)
            value = _inner(own, of_sources) if by == ALIGNMENT else _inner(own, own) ** 0.5
            made[id(dream)] = check_number("score", value)
            if progress is not None:
                progress(len(made), len(chosen))
    return [replace(d, score=made[id(d)]) if id(d) in made else d for d in dreams]


@contextmanager
def _gradients(
    model: nn.Module, names: Sequence[str]
) -> Iterator[Callable[[Sequence[int], int], list[Tensor]]]:
    """In the block, a function that gives the gradients of a row's mean loss to `names`."""
    wanted = [dict(model.named_parameters())[name] for name in names]
    asked = [p.requires_grad for p in wanted]

    def gradient(ids: Sequence[int], start: int) -> list[Tensor]:
        with torch.enable_grad():
            return list(torch.autograd.grad(row_losses(model, [(ids, start)])[0], wanted))

    with frozen(model):
        try:
            for p in wanted:
                p.requires_grad_(True)
            yield gradient
        finally:
            for p, before in zip(wanted, asked, strict=True):
                p.requires_grad_(before)


def _inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs)


def select(dreams: Sequence[Dream], top: int, more: int, *, seed: int = 0) -> list[Dream]:
    """`dreams` with the check "selected" on those kept so far: of each source `top`, and `more`.

    top: those of the highest score; of equal ones the earlier in `dreams` first. more: drawn from
    the rest, all alike, by `seed` and the source alone. Raises ValueError for one without score.
    """
    check_count("top", top, 0)
    check_count("more", more, 0)
    by_source: dict[tuple[str, ...], list[int]] = {}
    for i, dream in enumerate(dreams):
        if dream.kept and dream.kind == ACQUISITION:
            if dream.score is None:
                raise ValueError(f"dreams must have a score to be selected, {dream.id} has none")
            by_source.setdefault(dream.sources, []).append(i)
    says: dict[int, str] = {}
    for name, own in by_source.items():
        ranked = sorted(own, key=lambda i: (-(dreams[i].score or 0.0), i))
        rest = sorted(ranked[top:])
        drawn = random.Random(derive_seed(seed, *name)).sample(rest, min(more, len(rest)))
        says |= {i: "" for i in rest}
        says |= {i: "by its score" for i in ranked[:top]} | {i: "at random" for i in drawn}
    found = list(dreams)
    for i, how in says.items():
        words = how or "neither by its score nor at random"
        found[i] = dreams[i].checked(Check("selected", bool(how), dreams[i].score, words))
    return found


def select_shares(
    dreams: Sequence[Dream], top: float, more: float, *, seed: int = 0
) -> list[Dream]:
    """`select` by shares of each source's dreams; `top` is rounded up, `more` to the nearest."""
    counts = Counter(x.sources for x in dreams if x.kept and x.kind == ACQUISITION)
    found = list(dreams)
    for name, count in counts.items():
        own = [i for i, x in enumerate(dreams) if x.sources == name]
        # A product such as 100 * .07 may lie a little above what is meant.
        best = math.ceil(top * count - 1e-9)
        chosen = select([dreams[i] for i in own], best, round(more * count), seed=seed)
        for i, dream in zip(own, chosen, strict=True):
            found[i] = dream
    return found


def helpful(
    model: nn.Module,
    tokenizer: Any,
    dreams: Sequence[Dream],
    sources: Sequence[Source],
    rate: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[Dream]:
    """`dreams` with the check "helps" on those kept so far; see `choose_dreams`."""
    texts = {source.id: source.text for source in sources}
    chosen = [i for i, x in enumerate(dreams) if x.kept and x.kind == ACQUISITION]
    names = scored_weights(model)
    wanted = [dict(model.named_parameters())[name] for name in names]
    found = list(dreams)
    for done, i in enumerate(chosen, 1):
        own = dreams[i]
        others: list[tuple[Sequence[int], int]] = [
            (encode(tokenizer, texts[name]), 1) for name in own.sources
        ]
        others += [
            (dreams[j].ids, dreams[j].start)
            for j in chosen
            if j != i and dreams[j].sources == own.sources
        ]

        def step(own: Dream = own) -> None:
            with _gradients(model, names) as gradient:
                directions = gradient(own.ids, own.start)
            with torch.no_grad():
                for p, direction in zip(wanted, directions, strict=True):
                    p.sub_(rate * direction.sign())

        def gained(others: Sequence[Any] = others) -> float:
            losses = mean_losses(model, others)
            return -sum(losses) / len(losses)

        found[i] = helps(model, own, step, gained, names=names)
        if progress is not None:
            progress(done, len(chosen))
    return found


def helps(
    model: nn.Module,
    dream: Dream,
    step: Callable[[], object],
    measure: Callable[[], float],
    *,
    names: Collection[str] | None = None,
    least: float = 0.0,
    seed: int = 0,
) -> Dream:
    """`dream` with the check "helps": whether a trial step on it raises `measure` by over `least`.

    The reward of Behrouz et al., Eq. 5. step: changes the parameters `names` (None: all), as one or
    more steps of training on the dream do; measure: of the model as it is, higher is better. Each
    trial is alone: afterwards the parameters are what they were, bit for bit, and so are gradients,
    modes and the global random state; also after an exception. Both measures and the step begin
    with the random state of `seed`. The weights version grows, as after every rollback. Raises
    ValueError for a measure that is no finite number, and RuntimeError if `step` changed another
    parameter, which is then not taken back.
    """
    parameters = dict(model.named_parameters())
    chosen = list(parameters) if names is None else list(names)
    others = {name: p for name, p in parameters.items() if name not in set(chosen)}
    versions = {name: p._version for name, p in others.items()}
    modes = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in parameters.values()}
    devices = {p.device for p in parameters.values() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices, key=str)), trial(model, chosen):
            for p in gradients:
                p.grad = None
            torch.manual_seed(seed)
            before = check_number("measure", measure())
            torch.manual_seed(seed)
            step()
            # The same draws for both, where a measure samples.
            torch.manual_seed(seed)
            after = check_number("measure", measure())
    finally:
        for p, gradient in gradients.items():
            p.grad = gradient
        for module, training in modes.items():
            module.training = training
    changed = sorted(name for name, p in others.items() if p._version != versions[name])
    if changed:
        raise RuntimeError(f"step must change {', '.join(chosen)} alone, but changed {changed}")
    rise = after - before
    says = "" if rise > least else f"{before:g} before, {after:g} after"
    return dream.checked(Check("helps", rise > least, rise, says))
