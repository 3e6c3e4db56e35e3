"""Scores against finite differences, selection against a plain sort, trials against their bits."""

from __future__ import annotations

import math

import pytest
import torch
from dreaming import dream
from editable import tiny_gpt2, tiny_hybrid, tiny_llama, word_tokenizer

from hybrid_sleep.parametric.dreams.dream import Check, Source
from hybrid_sleep.parametric.dreams.selection import (
    choose_dreams,
    helps,
    score,
    scored_weights,
    select,
    select_shares,
)
from hybrid_sleep.parametric.measure import encode
from hybrid_sleep.parametric.sites import find_sites
from hybrid_sleep.sleep.weights import weights_digest

DAYS = [Source("day-1", "Ada Byron lives in Lisbon ."), Source("day-2", "Bo Chan is in Oslo .")]
DREAMS = [
    dream("a", ids=(1, 7, 8, 9, 4), start=2, sources=("day-2",)),
    dream("b", ids=(1, 12, 5, 6), start=1, sources=("day-1",), number=1),
    dream("c", ids=(3, 4, 3, 9, 9, 8), start=3, sources=("day-1", "day-2"), number=2),
    dream("d", ids=(1, 2, 3), checks=(Check("form", False),), number=3),
    dream("e", kind="retention", number=4),
]


def loss(model, ids, start):
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(-1)
    places = range(max(1, start), len(ids))
    return -sum(float(logp[i - 1, ids[i]]) for i in places) / len(places)


def moved(model, names, directions, size):
    """Add `size` times `directions` to the parameters of `names`."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, direction in zip(names, directions, strict=True):
            parameters[name].add_(size * direction)


# Not a llama, whose norms round to fp32, which a difference this small would show.
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_hybrid])
def test_the_score_is_how_far_a_step_on_the_dream_lowers_the_loss_of_its_source(make):
    model, tokenizer = make().train(), word_tokenizer()
    names = scored_weights(model)
    assert names == [site.parameter for site in find_sites(model)[-2:]]
    dict(model.named_parameters())[names[0]].requires_grad_(False)
    asking = [p.requires_grad for p in model.parameters()]
    digest = weights_digest(model)
    scored = score(model, tokenizer, DREAMS, DAYS)
    norms = score(model, tokenizer, DREAMS, DAYS, by="norm")
    assert model.training and [p.requires_grad for p in model.parameters()] == asking
    assert weights_digest(model) == digest and all(p.grad is None for p in model.parameters())
    assert [d.score is None for d in scored] == [False] * 3 + [True] * 2
    assert [d.id for d in scored] == [d.id for d in DREAMS]
    model.eval().requires_grad_(True)
    for got, norm in zip(scored[:3], norms[:3], strict=True):
        out = model(input_ids=torch.tensor([list(got.ids)])).logits[0].log_softmax(-1)
        places = range(max(1, got.start), len(got.ids))
        mean = -sum(out[i - 1, got.ids[i]] for i in places) / len(places)
        wanted = [dict(model.named_parameters())[name] for name in names]
        step = [g.clone() for g in torch.autograd.grad(mean, wanted)]
        total = 0.0
        for day in DAYS:
            if day.id in got.sources:
                ids, size = encode(tokenizer, day.text), 1e-4
                moved(model, names, step, size)
                above = loss(model, ids, 1)
                moved(model, names, step, -2 * size)
                below = loss(model, ids, 1)
                moved(model, names, step, size)
                total += (above - below) / (2 * size)
        assert got.score == pytest.approx(total, rel=1e-5, abs=1e-8)
        square = sum(float(g.square().sum()) for g in step)
        assert norm.score == pytest.approx(math.sqrt(square), rel=1e-9)


def test_what_cannot_be_scored():
    model, tokenizer = tiny_llama(), word_tokenizer()
    with pytest.raises(ValueError, match="sources must have those of every dream"):
        score(model, tokenizer, DREAMS, DAYS[:1])
    with pytest.raises(ValueError, match="by must be one of 'alignment', 'norm'"):
        score(model, tokenizer, DREAMS, DAYS, by="size")
    with pytest.raises(ValueError, match="last must be"):
        score(model, tokenizer, DREAMS, DAYS, last=0)
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    asking = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="score must be a finite number"):
        score(model, tokenizer, DREAMS, DAYS)
    assert [p.requires_grad for p in model.parameters()] == asking


def scored_dreams(scores, source="day-1"):
    return [dream(f"d{i}", number=i, score=s, sources=(source,)) for i, s in enumerate(scores)]


def test_the_top_and_some_at_random():
    dreams = scored_dreams([0.1, 0.9, 0.5, 0.9, -2.0, 0.5, 0.5])
    found = select(dreams, 3, 2, seed=0)
    says = [d.checks[-1].says for d in found]
    # Of equal scores the earlier.
    assert [i for i, text in enumerate(says) if text == "by its score"] == [1, 2, 3]
    at_random = [i for i, text in enumerate(says) if text == "at random"]
    assert len(at_random) == 2 and not {1, 2, 3} & set(at_random)
    assert [i for i, d in enumerate(found) if d.kept] == sorted([1, 2, 3, *at_random])
    assert all(d.checks[-1].name == "selected" and d.checks[-1].value == d.score for d in found)
    assert select(dreams, 3, 2, seed=0) == found
    draws = {
        tuple(i for i, d in enumerate(select(dreams, 3, 2, seed=s)) if d.kept) for s in range(60)
    }
    assert len(draws) == 6
    left = next(d for d in found if not d.kept)
    assert left.why == "selected: neither by its score nor at random"


def test_every_source_has_its_own():
    first, second = scored_dreams([1.0, 2.0, 3.0]), scored_dreams([9.0, 8.0], "day-2")
    other = dream("x", kind="retention"), dream("y", checks=(Check("form", False),))
    found = select([*first, *second, *other], 1, 0)
    assert [d.kept for d in found] == [False, False, True, True, False, True, False]
    assert found[5:] == list(other)
    assert [d.kept for d in select(first, 9, 9)] == [True] * 3
    assert [d.kept for d in select(first, 0, 0)] == [False] * 3
    # What is drawn for a source does not depend on the others.
    alone = select(first, 0, 1, seed=5)
    assert select([*second, *first], 0, 1, seed=5)[2:] == alone
    with pytest.raises(ValueError, match="dreams must have a score to be selected"):
        select([dream()], 1, 1)
    with pytest.raises(ValueError, match="top must be"):
        select(first, -1, 1)


@pytest.mark.parametrize("make", [tiny_llama, tiny_hybrid])
@pytest.mark.parametrize("names", [None, "scored"])
def test_a_trial_leaves_nothing_behind(make, names):
    model = make().train()
    names = names and scored_weights(model)
    chosen = names or [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    gradient = torch.ones_like(parameters[chosen[0]])
    parameters[chosen[0]].grad = gradient
    before = {name: p.detach().clone() for name, p in parameters.items()}
    state, draws = torch.get_rng_state(), []
    row = (1, 7, 8, 9, 4)

    def measure():
        draws.append(float(torch.rand(())))
        return -loss(model, row, 1)

    def step(sign):
        def train():
            assert all(p.grad is None for p in parameters.values())
            draws.append(float(torch.rand(())))
            model.eval()
            out = model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss
            out.backward()
            with torch.no_grad():
                for name in chosen:
                    if parameters[name].grad is not None:
                        parameters[name].sub_(sign * 1e-3 * parameters[name].grad)

        return train

    good = helps(model, dream(), step(1), measure, names=names, seed=3)
    bad = helps(model, dream(), step(-1), measure, names=names, seed=3)
    assert good.kept and good.checks[-1].name == "helps" and good.checks[-1].value > 0
    assert not bad.kept and bad.checks[-1].value < 0 and "before" in bad.why
    assert good.checks[-1].value == pytest.approx(-bad.checks[-1].value, rel=0.1)
    assert len(set(draws)) == 1 and torch.equal(torch.get_rng_state(), state)
    much = helps(model, dream(), step(1), measure, names=names, least=1e3)
    assert not much.kept
    none = helps(model, dream(), lambda: None, lambda: 1.0, names=names)
    assert not none.kept and none.checks[-1].value == 0.0

    def broken():
        step(1)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        helps(model, dream(), broken, measure, names=names)
    with pytest.raises(ValueError, match="measure must be a finite number"):
        helps(model, dream(), step(1), lambda: math.nan, names=names)
    assert model.training and parameters[chosen[0]].grad is gradient
    for name, p in parameters.items():
        assert torch.equal(p, before[name])
        assert p is parameters[chosen[0]] or p.grad is None


def test_a_step_that_changes_more_than_it_says_is_found_out():
    model = tiny_llama()
    names = scored_weights(model)

    def step():
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)

    with pytest.raises(RuntimeError, match="step must change .* alone, but changed .*lm_head"):
        helps(model, dream(), step, lambda: 0.0, names=names)


@pytest.mark.parametrize(
    ("top", "more", "kept"),
    [
        (0.5, 0.25, {1: 1, 2: 1, 3: 3, 4: 3, 7: 6, 20: 15}),
        (0.07, 0.0, {1: 1, 20: 2, 100: 7}),
        (0.0, 0.5, {1: 0, 2: 1, 3: 2, 4: 2}),
    ],
)
def test_shares_of_each_source(top, more, kept):
    for count, wanted in kept.items():
        first = scored_dreams([float(i) for i in range(count)])
        rest = [*scored_dreams([5.0, 6.0], "day-2"), dream("x", kind="retention")]
        found = select_shares([*rest, *first], top, more, seed=4)
        assert sum(d.kept for d in found[3:]) == wanted
        assert found[2] == rest[2] and [d.id for d in found] == [d.id for d in (*rest, *first)]
        best = math.ceil(round(top * count, 9))
        assert found[3:] == select(first, best, wanted - best, seed=4)


def test_what_is_chosen_is_what_scores_best_and_nothing_where_all_stay():
    model, tokenizer = tiny_hybrid(), word_tokenizer()
    dreams = [
        dream(f"d{i}", ids=(1, 4 + i, 5 + i, 9), sources=("day-1",), number=i) for i in range(6)
    ]
    seen = []
    found = choose_dreams(
        model, tokenizer, dreams, DAYS, top=0.5, more=0.0, progress=lambda *at: seen.append(at)
    )
    ranked = sorted(score(model, tokenizer, dreams, DAYS), key=lambda d: -d.score)
    assert {d.id for d in found if d.kept} == {d.id for d in ranked[:3]}
    assert seen == [(i, 6) for i in range(1, 7)]
    assert choose_dreams(model, tokenizer, dreams, DAYS, top=0.75, more=0.25) == dreams
    # Nothing is asked of a model for dreams that no check has left.
    gone = [d for d in DREAMS if not d.kept]
    assert choose_dreams(None, None, gone, [], top=0.5, more=0.0, helping=True) == gone


def test_a_dream_helps_if_a_step_on_it_lowers_the_loss_of_what_else_is_said_of_its_source():
    model, tokenizer, rate = tiny_hybrid(), word_tokenizer(), 3e-2
    dreams = [
        dream(f"d{i}", ids=(1, 4 + i, 5 + 2 * i, 9), sources=(f"day-{1 + i % 2}",), number=i)
        for i in range(6)
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = choose_dreams(
        model, tokenizer, dreams, DAYS, top=1.0, more=0.0, helping=True, rate=rate
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    names = scored_weights(model)
    for i, got in enumerate(found):
        others = [(encode(tokenizer, DAYS[i % 2].text), 1)]
        others += [(d.ids, d.start) for d in dreams[i % 2 :: 2] if d.number != i]
        wanted = [dict(model.named_parameters())[name] for name in names]
        out = model(input_ids=torch.tensor([dreams[i].ids])).logits[0].log_softmax(-1)
        mean = -sum(out[at - 1, dreams[i].ids[at]] for at in range(1, 4)) / 3
        signs = [g.sign() for g in torch.autograd.grad(mean, wanted)]
        was = sum(loss(model, *row) for row in others) / len(others)
        moved(model, names, signs, -rate)
        rise = was - sum(loss(model, *row) for row in others) / len(others)
        model.load_state_dict(before)
        assert got.checks[-1].name == "helps" and got.checks[-1].value == pytest.approx(rise)
        assert got.kept is (rise > 0)
    assert {d.kept for d in found} == {True, False}
