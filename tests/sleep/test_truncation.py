"""Truncated backpropagation against the specification with the cuts made by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from marks import halved
from small import Row, gap, small_ids, small_model

from hybrid_sleep.configuration import STATE_SPACES
from hybrid_sleep.sleep.checkpointing import Truncation
from hybrid_sleep.sleep.minimal import MinimalModel
from hybrid_sleep.sleep.minimal import Row as Read
from hybrid_sleep.sleep.options import EVICTIONS, SCHEDULES

EXACT = 1e-10
LENGTHS = (7, 5)
CUTS = ((1, 2), (2, None), (None, 1), (1, None), (2, 3))


class Truncated(MinimalModel):
    """The specification's loop over windows, cutting gradients where the definition says."""

    def __init__(self, config, weights, passes, windows):
        super().__init__(config, weights)
        self.passes, self.windows = passes, windows

    def read(self, windows) -> Read:
        start, end = self.loop
        c, layers, row, position = self.config, self.blank(), Read([], {}, []), 0
        for window in windows:
            first = position if self.sliding else 0
            places = list(range(first, first + len(window.tokens)))
            position += len(window.tokens)
            opening = [layer.copy() for layer in layers]
            h = [self.embed(token) for token in window.tokens]
            h = self.run(0, end, layers, h, places, sleeping=False)
            out = self.run(end, self.count, layers, h, places, sleeping=False)
            row.logits += [self.head(x) for x in out]
            if window.depth is None:
                continue
            row.depths.append(window.depth)
            for j in range(2, window.depth + 1):
                S = [layer.S for layer in layers]
                if self.passes is not None and j == window.depth - self.passes + 1:
                    h = [x.detach() for x in h]
                    S = [[x.detach() for x in heads] for heads in S]
                for i in range(start, end):
                    layers[i] = opening[i].copy()
                    layers[i].S = S[i]
                h = self.run(start, end, layers, h, places, sleeping=True)
            if window.depth > 1:
                for i in range(end, self.count):
                    layers[i] = opening[i].copy()
                self.run(end, self.count, layers, h, places, sleeping=True)
            for layer in layers:
                layer.seen = layer.seen[max(0, len(layer.seen) - c.window + 1) :]
                if not self.sliding:
                    layer.seen, layer.inputs = [], []
                if self.windows is not None and len(row.depths) % self.windows == 0:
                    layer.S = [x.detach() for x in layer.S]
                    layer.inputs = [x.detach() for x in layer.inputs]
                    layer.seen = [
                        (p, [x.detach() for x in k], [x.detach() for x in v])
                        for p, k, v in layer.seen
                    ]
        row.S = {
            i: torch.stack(layer.S)
            for i, layer in enumerate(layers)
            if c.layer_types[i] == "linear_attention"
        }
        return row


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two left-padded rows with boundaries of their own."""
    ids = small_ids(2, max(LENGTHS))
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask


def furthest(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(gap(a, b) for a, b in zip(some, others, strict=True))


def learn(model, weigh, passes=None, windows=None, granularity=None, depth=3):
    """Logits, fast weights, and the gradient of every parameter of a weighed sum of all of them."""
    model.zero_grad()
    model.set_truncation(passes, windows)
    model.set_activation_checkpointing(granularity)
    ids, mask = batch()
    out = model(ids, attention_mask=mask, sleep_passes=depth)
    held = out.cache.fast_weights
    total = (out.logits * weigh * mask[..., None]).sum()
    (total + sum(S.square().sum() for S in held.values())).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [out.logits.detach(), *(S.detach() for S in held.values())], grads


def specified(model, weigh, passes, windows, depth=3) -> list[torch.Tensor]:
    """The gradients of `learn`, row by row and token by token."""
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    oracle = Truncated(model.config, weights, passes, windows)
    total = 0
    for ids, length, w in zip(batch()[0], LENGTHS, weigh, strict=True):
        row = oracle.read(Row(model.config.window).read(ids[-length:].tolist(), depth).windows)
        total = total + (torch.stack(row.logits) * w[-length:]).sum()
        total = total + sum(S.square().sum() for S in row.S.values())
    total.backward()
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in weights.values()]


@pytest.mark.parametrize(
    ("eviction", "loop", "cuts"),
    [
        *halved(EVICTIONS, [None], CUTS),
        *halved(EVICTIONS, [(1, 3)], CUTS[:3]),
        *halved(EVICTIONS, [(0, 1), (2, 4)], CUTS[:1]),
    ],
)
def test_gradients_equal_the_specification_with_the_cuts_made(eviction, loop, cuts):
    state_space = STATE_SPACES[sum(cut or 0 for cut in cuts) % 2]
    model = small_model(window=2, eviction=eviction, state_space=state_space, loop=loop)
    weigh = torch.randn(2, max(LENGTHS), model.config.vocab_size, dtype=torch.float64)
    plain, untruncated = learn(model, weigh)
    values, grads = learn(model, weigh, *cuts)
    assert all(torch.equal(a, b) for a, b in zip(values, plain, strict=True))
    wanted = specified(model, weigh, *cuts)
    assert furthest(grads, wanted) <= EXACT
    assert furthest(grads, untruncated) > 1e-3


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_nothing_is_cut_by_default_or_beyond_the_depth(eviction):
    model = small_model(window=2, eviction=eviction, loop=(0, 3))
    weigh = torch.randn(2, max(LENGTHS), model.config.vocab_size, dtype=torch.float64)
    _, wanted = learn(model, weigh)
    assert furthest(wanted, specified(model, weigh, None, None)) <= EXACT
    for passes, windows in ((3, None), (4, None), (None, 5), (3, 9)):
        _, grads = learn(model, weigh, passes, windows)
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("granularity", ["block", 3, "pass", "window", ("window", 2)])
def test_truncation_goes_with_checkpointing(granularity):
    for eviction, (passes, windows) in zip(EVICTIONS, ((1, 2), (2, 1)), strict=True):
        model = small_model(window=2, eviction=eviction, loop=(1, 3)).train()
        weigh = torch.randn(2, max(LENGTHS), model.config.vocab_size, dtype=torch.float64)
        _, plain = learn(model, weigh, passes, windows)
        _, grads = learn(model, weigh, passes, windows, granularity)
        assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_early_passes_run_without_gradients(schedule):
    """Pass 1 and the last of four passes record what the backward needs, the two between do not."""
    model = small_model(window=4, sleep_schedule=schedule)
    model.set_truncation(passes=1)
    recorded = []
    model.model.layers[0].register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    ids = small_ids(1, 8)
    labels = ids.clone()
    labels[:, :4] = -100
    model(ids, labels=labels, sleep_passes=4).loss.backward()
    assert recorded == [True, False, False, True, True]


def test_each_row_counts_its_own_sleeps():
    """Of two rows that have slept a different number of times, only the one that is due is cut."""
    model = small_model(window=2)
    model.set_truncation(windows=2)
    tokens = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    out = model(inputs_embeds=tokens, attention_mask=mask, sleep_passes=2)
    grad = torch.autograd.grad(out.logits[:, -2:].square().sum(), tokens)[0].abs().sum(-1)
    assert not grad[0, :4].any() and grad[0, 4:].all()
    assert not grad[1, :2].any() and grad[1, 2:].all()


def test_what_cannot_be_truncated_is_refused():
    model = small_model()
    model.set_truncation(2, windows=3)
    for name, value in product(("passes", "windows"), (0, -1, True, 1.0, "2")):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got"):
            model.set_truncation(**{name: value})
    assert model.model.truncation == Truncation(2, 3)
    with pytest.raises(ValueError, match="sleep_passes='auto'.*set_truncation"):
        model(small_ids(1, 9), sleep_passes="auto")
    with torch.no_grad():
        model(small_ids(1, 9), sleep_passes="auto")
    model.set_truncation()
    model(small_ids(1, 9), sleep_passes="auto").logits.sum().backward()
    assert model.model.truncation == Truncation()
