"""What a site must give for a fact to be answered: v* of MEMIT, for many facts at once.

arXiv 2210.07229, section 4.2 and Eq. 16: a change delta of the site's output at the key's token is
optimised so that every context continues with the object, while "{subject} is a" goes on as before.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hybrid_sleep.parametric.contexts import Context
from hybrid_sleep.parametric.measure import right_padded
from hybrid_sleep.parametric.sites import Site, blocks, frozen, hidden
from hybrid_sleep.validation import check_count, check_number

# Rows are computed together while the longest is at most so many times the shortest, and no more
# than so many, whose logits must fit into memory.
PADDING, ROWS = 1.5, 64
# A beginning of fewer tokens is not worth a cache.
LEAST_BEGUN = 8


@dataclass(frozen=True)
class TargetOptions:
    """How v* is found.

    rate: of Adam, the length of its first step in norms of the residual stream; steps: at most;
        stop: mean loss of a fact's object (nats a token) at which it is done, where the replies in
        front of it have lost no more than that: to go on would only make delta longer.
    clamp: largest norm of delta, in norms of the residual stream behind the block at the token.
    decay: weight of the squared relative norm; kl: weight of the divergence on the essence prompt.
    """

    rate: float = 0.1
    steps: int = 25
    stop: float = 0.05
    clamp: float = 1.0
    decay: float = 0.0
    kl: float = 0.0625

    def __post_init__(self) -> None:
        check_count("steps", self.steps, minimum=0)
        for name in ("rate", "clamp"):
            check_number(name, getattr(self, name), above=0)
        for name in ("stop", "decay", "kl"):
            check_number(name, getattr(self, name), least=0)


@dataclass(frozen=True)
class Targets:
    """delta: `[F, o]`, one a fact; loss: `[F]`, the object's with it; before: `[F]`, without it.

    share: `[F]`, norm of delta in norms of the residual stream. steps: that any fact took.
    """

    delta: Tensor
    loss: Tensor
    before: Tensor
    share: Tensor
    steps: int

    def only(self, kept: Sequence[int]) -> Targets:
        """Of the facts at these places."""
        rows = torch.tensor(list(kept), device=self.delta.device, dtype=torch.long)
        return Targets(
            self.delta[rows], self.loss[rows], self.before[rows], self.share[rows], self.steps
        )

    def replaced(self, i: int, other: Targets, j: int) -> Targets:
        """With that of fact `j` of `other` for fact `i`."""
        names = ("delta", "loss", "before", "share")
        new = {name: getattr(self, name).clone() for name in names}
        for name in names:
            new[name][i] = getattr(other, name)[j]
        return Targets(**new, steps=max(self.steps, other.steps))


class Replay:
    """Runs of `model` over rows of contexts that begin at the block of `site`.

    What lies below the site does not depend on an edit there, so it is computed once, unless blocks
    are shared: a change at such a site is made every time it is applied. Neither does what all
    rows begin with, such as a chat's system turn, where the model's cache is of keys alone; unless
    `begun` is False, for changes that reach it.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        contexts: Sequence[Context],
        owner: Sequence[int],
        begun: bool = True,
    ):
        self.model, self.site, self.contexts = model, site, contexts
        self.device = next(model.parameters()).device
        self.owner = torch.tensor(owner, device=self.device)
        self.stack = blocks(model)[1]
        self.ids, self.mask = right_padded([c.ids for c in contexts], self.device)
        self.at = torch.zeros_like(self.ids, dtype=torch.bool)
        for row, c in enumerate(contexts):
            self.at[row, list(c.at)] = True
        self.below: list[list[Any]] = [[] for _ in range(site.layer)]
        self.begun = self._begin() if begun else []
        self.start = self.begun[0][0].shape[-2] if self.begun else 0
        passed: list[Tensor] = []

        def keep(i: int) -> Callable[..., None]:
            return lambda module, given, out: self.below[i].append(out)

        def look(module: nn.Module, given: Any, out: Any) -> None:
            passed.append(hidden(out))

        with ExitStack() as hooks, torch.no_grad():
            for i in range(site.layer):
                hooks.callback(self.stack[i].register_forward_hook(keep(i)).remove)
            hooks.callback(self.stack[site.layer].register_forward_hook(look).remove)
            first = min(c.target for c in contexts) - 1
            self._logits(torch.arange(len(contexts), device=self.device), first, len(self.ids[0]))
        length = self.ids.shape[1] - self.start
        if any(h.shape[1] != length for h in passed):
            raise ValueError(
                f"contexts must fit one window, got {length} tokens, of which the model read "
                f"{passed[0].shape[1]} first"
            )
        if len(passed) > 1:
            self.below = []
        for given in self.below[:-1]:
            # The next block is skipped as well, so what this one gave is read by nothing.
            if isinstance(given[0], Tensor):
                given[0] = None
        h = torch.stack(passed).to(self.at_least_fp32(passed[0].dtype))
        self.norm = (h.norm(dim=-1).mean(0) * self.at[:, self.start :]).sum(1) / self.at.sum(1)

    def _begin(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[1, heads, T, d]` of the tokens that all rows begin with, by layer; none
        where it is not worth it, and for models that remember in another way."""
        rows = [c.ids[: min(*c.at, c.target - 1)] for c in self.contexts]
        pairs = zip(*rows, strict=False)
        same = next((i for i, of in enumerate(pairs) if len(set(of)) > 1), min(map(len, rows)))
        takes_it = "cache" in inspect.signature(self.model.forward).parameters
        if same < LEAST_BEGUN or not takes_it:
            return []
        with torch.no_grad():
            cache = self.model(
                input_ids=self.ids[:1, :same], use_cache=True, logits_to_keep=1
            ).cache
        if type(cache) is not DynamicCache:
            return []
        plain = [x for x in cache.layers if type(x) is DynamicLayer]
        held = [(x.keys, x.values) for x in plain if x.keys is not None and x.values is not None]
        return held if len(held) == len(cache.layers) else []

    def _logits(self, rows: Tensor, first: int, width: int) -> Tensor:
        """Logits of `rows` from token `first` to `width`."""
        given: dict[str, Any] = {"use_cache": False}
        if self.begun:
            past, shape = DynamicCache(), (len(rows), -1, -1, -1)
            for i, (keys, values) in enumerate(self.begun):
                past.update(keys.expand(shape), values.expand(shape), i)
            given = {"use_cache": True, "cache": past}
        return self.model(
            input_ids=self.ids[rows, self.start : width],
            attention_mask=self.mask[rows, :width],
            logits_to_keep=width - first,
            **given,
        ).logits

    @contextmanager
    def skipping(self, rows: Tensor, width: int) -> Iterator[None]:
        """Blocks below the site give what they gave, of `rows` up to token `width`."""

        def give(out: Any) -> Callable[..., Any]:
            if out is None:
                return lambda *args, **kwargs: args[0] if args else kwargs["hidden_states"]
            first, *rest = out if isinstance(out, tuple) else (out,)
            h = first[rows, : width - self.start]
            # What a skipped block leaves behind is not read again, so its state may be of all rows.
            new = (h, *rest) if isinstance(out, tuple) else h
            return lambda *args, **kwargs: new

        with ExitStack() as back:
            for block, (out,) in zip(self.stack, self.below, strict=False):
                # An attribute of the object hides the method of its class, and may be there already
                # where weights are offloaded.
                own = vars(block)
                if "forward" in own:
                    back.callback(own.__setitem__, "forward", own["forward"])
                else:
                    back.callback(own.pop, "forward")
                own["forward"] = give(out)
            yield

    @staticmethod
    def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
        """What to compute norms and losses in."""
        return torch.promote_types(dtype, torch.float32)

    def losses(self, delta: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the rows say with `delta: [R, o]` added to the site's output at their tokens.

        rows: which of them, one or more, None for all. Returns the mean NLL `[R]` of each one's
        object, that of the reply before it, and log probabilities `[R, vocab]` of what follows the
        prompt.
        """
        if rows is None:
            rows = torch.arange(len(self.contexts), device=self.device)
        contexts = [self.contexts[i] for i in rows.tolist()]
        first = min(c.target for c in contexts) - 1
        # A sleeping model takes no column that is a pad in all rows.
        width = max(len(c.ids) for c in contexts)
        at, ids = self.at[rows, self.start : width], self.ids[rows, :width]
        every = torch.arange(len(contexts), device=self.device)

        def change(module: nn.Module, given: Any, out: Tensor) -> Tensor:
            moved = torch.where(at[..., None], delta[:, None].to(out.dtype), 0.0)
            # Some models flatten rows in front of an MLP.
            return out + moved.view_as(out)

        handle = self.model.get_submodule(self.site.name).register_forward_hook(change)
        try:
            with self.skipping(rows, width):
                logits = self._logits(rows, first, width)
        finally:
            handle.remove()
        logp = logits.to(self.at_least_fp32(logits.dtype)).log_softmax(-1)
        picked = logp[:, :-1].gather(-1, ids[:, first + 1 : width, None])[..., 0]
        target, answer, end = (
            torch.tensor(places, device=self.device)[:, None] - 1
            for places in zip(*((c.target, c.object, len(c.ids)) for c in contexts), strict=True)
        )
        predicts = torch.arange(first, width - 1, device=self.device)
        in_answer = (predicts >= answer) & (predicts < end)
        in_reply = (predicts >= target) & (predicts < answer)
        said, reply = (
            -(picked * part).sum(1) / part.sum(1).clamp(min=1) for part in (in_answer, in_reply)
        )
        return said, reply, logp[every, target[:, 0] - first]


def find_targets(
    model: nn.Module,
    site: Site,
    contexts: Sequence[Sequence[Context]],
    essence: Sequence[Context | None],
    options: TargetOptions = TargetOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> Targets:
    """One delta for each fact, from its `contexts`; `essence`: its text that is to stay.

    Facts are optimised side by side and do not see each other: the result is the same one by one.
    """
    facts = len(contexts)
    kept = [(f, c) for f, c in enumerate(essence) if c is not None and options.kl]
    with frozen(model):
        runs = replays(model, site, [(f, c) for f, own in enumerate(contexts) for c in own])
        still = replays(model, site, kept)
        size, count = runs[0].norm.new_zeros(2, facts)
        for run in runs:
            size.index_add_(0, run.owner, run.norm)
            count.index_add_(0, run.owner, torch.ones_like(run.norm))
        size /= count
        delta = size.new_zeros(facts, site.outputs)
        mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
        rate = options.rate * size / site.outputs**0.5
        chosen, best = torch.zeros_like(delta), torch.full_like(size, math.inf)
        before, loss, active = best, best, torch.ones_like(best, dtype=torch.bool)
        with torch.no_grad():
            same = {run: run.losses(delta[run.owner])[2] for run in still}
        for step in range(options.steps + 1):
            object_nll, reply_nll = torch.zeros_like(best), torch.zeros_like(best)
            gradient = torch.zeros_like(delta)
            for run, rows in _at_work(runs, active):
                of = run.owner[rows]
                with torch.enable_grad():
                    own = delta.detach()[of].requires_grad_()
                    said, reply, _ = run.losses(own, rows)
                    # Two means, or a long reply that needs no learning would hide the object.
                    both = (said + reply) / count[of]
                    gradient.index_add_(0, of, torch.autograd.grad(both.sum(), own)[0])
                object_nll.index_add_(0, of, said.detach() / count[of])
                reply_nll.index_add_(0, of, reply.detach() / count[of])
            if step == 0:
                before, reply_before = object_nll, reply_nll
            done = (object_nll < options.stop) & (reply_nll < reply_before + options.stop)
            nll = object_nll + reply_nll
            better = active & (done | (nll < best))
            best = torch.where(better, nll, best)
            loss = torch.where(better, object_nll, loss)
            chosen = torch.where(better[:, None], delta, chosen)
            active = active & ~done
            if step == options.steps or not bool(active.any()):
                break
            for run, rows in _at_work(still, active):
                of = run.owner[rows]
                with torch.enable_grad():
                    own = delta.detach()[of].requires_grad_()
                    logp = run.losses(own, rows)[2]
                    base = same[run][rows]
                    apart = nn.functional.kl_div(logp, base, reduction="sum", log_target=True)
                    part = torch.autograd.grad(options.kl * apart, own)[0]
                gradient.index_add_(0, of, part)
            gradient += 2 * options.decay * delta / size[:, None].square()
            # Adam, written out, since facts that are done must not move on.
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient.square()
            moved = mean / (1 - 0.9 ** (step + 1))
            moved = moved / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            new = delta - rate[:, None] * moved
            limit = (options.clamp * size / new.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)
            delta = torch.where(active[:, None], new * limit[:, None], delta)
            if progress is not None:
                progress(step + 1, options.steps)
    return Targets(chosen, loss, before, chosen.norm(dim=1) / size, step)


def _at_work(runs: Sequence[Replay], active: Tensor) -> Iterator[tuple[Replay, Tensor]]:
    """The rows of each run whose facts are `active`, where there are any."""
    for run in runs:
        rows = active[run.owner].nonzero()[:, 0]
        if len(rows):
            yield run, rows


def replays(
    model: nn.Module, site: Site, owned: Sequence[tuple[int, Context]], *, begun: bool = True
) -> list[Replay]:
    """`owned` contexts, each with its fact, in groups of similar length; `begun`: see `Replay`."""
    groups: list[list[tuple[int, Context]]] = []
    for pair in sorted(owned, key=lambda pair: len(pair[1].ids)):
        longest = PADDING * len(groups[-1][0][1].ids) if groups else 0
        if len(pair[1].ids) > longest or len(groups[-1]) >= ROWS:
            groups.append([])
        groups[-1].append(pair)
    return [Replay(model, site, [c for _, c in g], [f for f, _ in g], begun) for g in groups]
