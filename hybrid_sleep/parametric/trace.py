"""Causal tracing: which block's output, at which token, carries what the model says of a subject.

Meng et al., arXiv 2202.05262, section 2.1: the subject's embeddings are corrupted by noise, so that
the answer is lost; then the output of one block at one token is put back to what it was in the
clean run, and the share of P(answer) that this recovers is that place's indirect effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_sleep.layers.embedding import CompoundEmbedding
from hybrid_sleep.parametric.contexts import POSITIONS, Context, context
from hybrid_sleep.parametric.facts import SLOT, Fact, Relation
from hybrid_sleep.parametric.measure import encode, right_padded
from hybrid_sleep.parametric.sites import blocks, frozen, hidden
from hybrid_sleep.support.markdown import table
from hybrid_sleep.training.data import derive_seed
from hybrid_sleep.validation import check_choice, check_count, check_number

AT_ONCE = 32
# A fact whose answer the noise makes less likely by less than this says nothing about places.
LEAST_LOST = 0.1


@dataclass(frozen=True)
class Effect:
    """Share of P(answer) that is recovered: its mean over facts, their lowest and highest."""

    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Trace:
    """Effects by position and layer; clean, corrupted: mean P(answer); facts: that were counted."""

    effects: dict[str, tuple[Effect, ...]]
    clean: float
    corrupted: float
    facts: int

    def effect(self, layer: int, position: str) -> Effect:
        """That of the output of block `layer` at the token `position`."""
        return self.effects[position][layer]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A table in Markdown."""
        layers = range(len(next(iter(self.effects.values()))))
        rows = [
            [position, *(f"{e.mean:.2f} ({e.lowest:.2f}-{e.highest:.2f})" for e in effects)]
            for position, effects in self.effects.items()
        ]
        return [
            *table(["token", *(f"layer {layer}" for layer in layers)], rows, "lr"),
            "",
            "Share of P(answer) that a block's clean output recovers, mean (lowest to highest) "
            f"over {self.facts} facts; P is {self.clean:.2f}, {self.corrupted:.2f} with noise.",
        ]


def trace(
    model: nn.Module,
    tokenizer: Any,
    known: Sequence[tuple[Fact, Relation]],
    *,
    positions: Sequence[str] = POSITIONS,
    noise: float = 3.0,
    samples: int = 4,
    seed: int = 0,
) -> Trace:
    """The effects of all blocks on what `model` says of `known`, in the first statement of each.

    noise: standard deviation of what is added to the subject's embeddings, in those of the
    embeddings; samples: of the noise, drawn by `seed`. Facts that the noise does not make less
    likely by at least 0.1 are left out; ValueError if that leaves none.
    """
    check_number("noise", noise, above=0)
    check_count("samples", samples)
    check_count("seed", seed, minimum=0)
    for position in positions:
        check_choice("positions", position, POSITIONS)
    probes = [Probe.of(tokenizer, fact, relation) for fact, relation in known]
    layers = len(blocks(model)[1])
    clean: list[Tensor] = []
    corrupted: list[Tensor] = []
    restored: dict[str, list[Tensor]] = {position: [] for position in positions}
    with frozen(model), torch.no_grad():
        for first in range(0, len(probes), AT_ONCE):
            part = probes[first : first + AT_ONCE]
            run = Runs(model, part)
            clean.append(run.clean)
            lost: list[Tensor] = []
            back: dict[str, list[Tensor]] = {position: [] for position in positions}
            for sample in range(samples):
                # The noise of a fact is its own, whatever facts are traced with it.
                run.draw(noise, [(seed, sample, first + i) for i in range(len(part))])
                lost.append(run.probability())
                for position in positions:
                    back[position].append(
                        torch.stack([run.probability({i: run.at[position]}) for i in range(layers)])
                    )
            corrupted.append(torch.stack(lost).mean(0))
            for position in positions:
                restored[position].append(torch.stack(back[position]).mean(0))
    p, q = torch.cat(clean) if clean else torch.zeros(0), torch.cat(corrupted or [torch.zeros(0)])
    counted = p - q >= LEAST_LOST
    if not bool(counted.any()):
        raise ValueError(
            f"known must have facts that the model states and that noise on their subject makes "
            f"less likely, got none of {len(probes)}, with P(answer) of "
            f"{float(p.mean()) if len(p) else 0:.2f}, and {float(q.mean()) if len(q) else 0:.2f} "
            "with noise"
        )
    p, q = p[counted], q[counted]
    effects = {}
    for position in positions:
        share = (torch.cat(restored[position], dim=1)[:, counted] - q) / (p - q)
        effects[position] = tuple(
            Effect(float(row.mean()), float(row.min()), float(row.max())) for row in share
        )
    return Trace(effects, float(p.mean()), float(q.mean()), int(counted.sum()))


@dataclass(frozen=True)
class Probe:
    """A statement with its answer: `context`, and which of its tokens are the `subject`'s."""

    context: Context
    subject: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, fact: Fact, relation: Relation) -> Probe:
        """The first statement of `relation` about `fact`."""
        text = relation.statements[0].replace(SLOT, fact.subject)
        made = context(tokenizer, text, fact.subject, f" {fact.object}")
        tokens: set[int] = set()
        starts = (match.start() for match in re.finditer(re.escape(fact.subject), text))
        for start, last in zip(starts, made.at, strict=True):
            # A space may be a token of its own, or a part of the one behind it.
            tokens |= set(range(len(encode(tokenizer, text[:start].rstrip())), last + 1))
        return cls(made, tuple(sorted(tokens)))


class Runs:
    """Runs of `model` over the statements of `probes`, clean or with noise on their subjects."""

    def __init__(self, model: nn.Module, probes: Sequence[Probe]):
        # transformers' own types lack its methods.
        self.model: Any = model
        self.probes = probes
        self.device = next(model.parameters()).device
        self.ids, self.mask = right_padded([probe.context.ids for probe in probes], self.device)
        ends = [probe.context.target - 1 for probe in probes]
        self.at = {
            "subject_last": self._marked([probe.context.at for probe in probes]),
            "prompt_last": self._marked([(end,) for end in ends]),
        }
        self.subject = self._marked([probe.subject for probe in probes])
        self.stack = blocks(model)[1]
        self.noise: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}
        with self._watched():
            self.clean = self.probability()

    def _marked(self, places: Sequence[Sequence[int]]) -> Tensor:
        marks = torch.zeros_like(self.ids, dtype=torch.bool)
        for row, own in enumerate(places):
            marks[row, list(own)] = True
        return marks

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Keep what every block gives."""

        def keep(i: int) -> Any:
            def hook(module: nn.Module, given: Any, out: Any) -> None:
                if i in self.outputs:
                    raise ValueError(
                        "known must fit one window, in which a block is applied once, got "
                        f"statements of up to {self.ids.shape[1]} tokens"
                    )
                self.outputs[i] = hidden(out)

            return hook

        with ExitStack() as hooks:
            for i, block in enumerate(self.stack):
                hooks.callback(block.register_forward_hook(keep(i)).remove)
            yield

    def draw(self, size: float, seeds: Sequence[tuple[int, ...]]) -> None:
        """Corrupt the runs from now on: noise of `size` standard deviations, one seed a row."""
        embed = self.model.get_input_embeddings()
        # A token of several digits is wider than the vectors that it is the sum of.
        vectors = embed.table() if isinstance(embed, CompoundEmbedding) else embed.weight
        spread = float(vectors.float().std())
        noise = torch.zeros(*self.ids.shape, embed.weight.shape[1])
        for row, (probe, seed) in enumerate(zip(self.probes, seeds, strict=True)):
            generator = torch.Generator().manual_seed(derive_seed("trace", *seed))
            shape = len(probe.subject), noise.shape[-1]
            noise[row, list(probe.subject)] = torch.randn(shape, generator=generator)
        self.noise = size * spread * noise.to(self.device)

    def probability(self, restored: dict[int, Tensor] | None = None) -> Tensor:
        """P(answer) of each row: `[R]`, of all of its tokens.

        restored: by layer, at which tokens `[R, T]` the block gives what it gave in the clean run.
        """
        with ExitStack() as hooks:
            if self.noise is not None:
                handle = self.model.get_input_embeddings().register_forward_hook(self._corrupt)
                hooks.callback(handle.remove)
            for layer, at in (restored or {}).items():
                hook = self._restore(layer, at)
                hooks.callback(self.stack[layer].register_forward_hook(hook).remove)
            first = min(probe.context.target for probe in self.probes) - 1
            logits = self.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                use_cache=False,
                logits_to_keep=self.ids.shape[1] - first,
            ).logits
        logp = logits[:, :-1].double().log_softmax(-1)
        picked = logp.gather(-1, self.ids[:, first + 1 :, None])[..., 0]
        predicts = torch.arange(first, self.ids.shape[1] - 1, device=self.device)
        bounds = [(p.context.target - 1, len(p.context.ids) - 1) for p in self.probes]
        begin, end = torch.tensor(bounds, device=self.device).T[..., None]
        answer = (predicts >= begin) & (predicts < end)
        return (picked * answer).sum(1).exp().cpu()

    def _corrupt(self, module: nn.Module, given: Any, out: Tensor) -> Tensor:
        assert self.noise is not None
        return out + self.noise.to(out.dtype)

    def _restore(self, layer: int, at: Tensor) -> Any:
        def hook(module: nn.Module, given: Any, out: Any) -> Any:
            h = torch.where(at[..., None], self.outputs[layer], hidden(out))
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return hook
