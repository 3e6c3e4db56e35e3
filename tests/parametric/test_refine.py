"""The refined values of an edit, against gradients of the dense weights in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from editable import LIVES, VOCAB, people, tiny_gpt2, tiny_hybrid, tiny_llama, word_tokenizer
from torch import nn

from hybrid_sleep.parametric.edit import EditOptions, plan_facts, solve_plan
from hybrid_sleep.parametric.refine import Refinement, refine
from hybrid_sleep.parametric.sites import site_at
from hybrid_sleep.parametric.solve import Preconditioner, Spectrum
from hybrid_sleep.parametric.targets import TargetOptions

WORDS = word_tokenizer()
EDIT = EditOptions(statements=2, questions=1, target=TargetOptions(steps=6, stop=0.0))
MODELS = {
    "ours": lambda: tiny_hybrid(intermediate_size=48),
    "llama": lambda: tiny_llama(intermediate_size=48),
    "gpt2": lambda: tiny_gpt2(n_inner=48),
}
DENIED = replace(LIVES, denials=("{} is in", "Today {} is"))
TEXTS = [torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1)).tolist()]


def spectrum_of(site, seed=0):
    """Of a moment with directions of all sizes, and a floor."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(site.inputs, site.inputs, generator=g, dtype=torch.float64)
    vectors = torch.linalg.qr(X).Q[:, :20]
    return Spectrum(vectors, torch.linspace(3.0, 0.1, 20, dtype=torch.float64), 0.05)


def dense(spectrum):
    outside = torch.eye(len(spectrum.vectors), dtype=torch.float64)
    outside -= spectrum.vectors @ spectrum.vectors.T
    inside = spectrum.vectors @ spectrum.values.diag() @ spectrum.vectors.T
    return inside + spectrum.floor * outside


def made(kind, weight=30.0):
    model = MODELS[kind]().double()
    sites = [site_at(model, layer) for layer in (0, 1)]
    items = [(i, fact, DENIED) for i, fact in enumerate(people(3))]
    plan = plan_facts(model, WORDS, items, sites[-1], EDIT)
    spectra = {site: spectrum_of(site, site.layer) for site in sites}
    edit = solve_plan(model, plan, {s: Preconditioner(x, weight) for s, x in spectra.items()})
    return model, plan, edit, spectra


def denials(plan):
    """Ids of each denial gone on with by the object, and how many of them are the object's."""
    rows = []
    for fact, relation in {item[1:] for item in plan.items}:
        for text in relation.denials:
            whole = WORDS(f"{text.replace('{}', fact.subject)} {fact.object}")["input_ids"]
            rows.append((torch.tensor([whole]), len(fact.object.split())))
    return rows


def said_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)


def gradient_of(model, plan, edit, spectra, options):
    """Of the sum in refine.py, for the values, from dense weights, row by row."""
    weights, rows, denied = dict(model.named_parameters()), TEXTS[0], denials(plan)
    with torch.no_grad():
        base = [said_of(model, torch.tensor([row])) for row in rows]
        base_denied = [said_of(model, ids) for ids, _ in denied]
    parts, deltas = [], {}
    with torch.no_grad():
        for site in spectra:
            part = edit.factors[site.name]
            deltas[site] = part.left.double() @ part.right.double()
            change = deltas[site].T if site.transposed else deltas[site]
            weights[site.parameter].add_(change)
    contexts = [c for own in plan.contexts for c in own]
    for c in contexts:
        logp = model(input_ids=torch.tensor([c.ids]), use_cache=False).logits[0].log_softmax(-1)
        told = [logp[i - 1, c.ids[i]] for i in range(c.target, len(c.ids))]
        cut = c.object - c.target
        nll = -torch.stack(told[cut:]).mean()
        if cut:
            nll = nll - torch.stack(told[:cut]).mean()
        parts.append(nll / len(contexts))
    for row, before in zip(rows, base, strict=True):
        now = said_of(model, torch.tensor([row]))
        apart = (before.exp() * (before - now)).sum(-1)[:-1]
        parts.append(options.kl * apart.mean() / len(rows))
    behind, tokens = 0.0, sum(count for _, count in denied)
    for (ids, count), before in zip(denied, base_denied, strict=True):
        apart = (before.exp() * (before - said_of(model, ids))).sum(-1)
        behind = behind + apart[-1 - count : -1].sum() / tokens
    total = torch.stack(parts).sum() + options.denial * behind
    names = [weights[site.parameter] for site in spectra]
    found = torch.autograd.grad(total, names)
    gradients, energies = {}, {}
    for site, g in zip(spectra, found, strict=True):
        part = edit.factors[site.name]
        C = dense(spectra[site])
        energies[site] = torch.trace(deltas[site] @ C @ deltas[site].T)
        slope = 2 * deltas[site] @ C
        gradients[site] = (g.T if site.transposed else g), slope, part.right.double()
    start = sum(energies.values())
    values = {
        site: (g + options.energy * slope / start) @ right.T
        for site, (g, slope, right) in gradients.items()
    }
    with torch.no_grad():
        for site, delta in deltas.items():
            weights[site.parameter].sub_(delta.T if site.transposed else delta)
    return values


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_step_goes_against_the_gradient_of_the_dense_weights(kind):
    model, plan, edit, spectra = made(kind)
    options = Refinement(steps=1, rate=0.05, stop=0.0, energy=0.7, kl=3.0, rows=3, denial=2.0)
    wanted = gradient_of(model, plan, edit, spectra, options)
    new = refine(model, WORDS, plan, edit, spectra, TEXTS, options)
    for site, gradient in wanted.items():
        old, now = edit.factors[site.name], new.factors[site.name]
        step = (now.left - old.left).double()
        # Adam's first step is the gradient's sign, as long as the rate.
        length = options.rate * float(old.left.square().mean().sqrt())
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        assert clear.float().mean() > 0.5
        torch.testing.assert_close(
            step[clear], -length * gradient[clear].sign(), rtol=1e-2, atol=0.0
        )
        assert torch.equal(now.right, old.right) and torch.equal(now.keys, old.keys)
        D = now.left.double() @ now.right.double()
        assert new.solutions[site.name]["norm"] == pytest.approx(float(D.norm()), rel=1e-6)
        own = now.left[:, 1:2].double() @ now.right[1:2].double()
        assert new.facts[1][site.name]["norm"] == pytest.approx(float(own.norm()), rel=1e-6)


def cost(part, spectrum):
    D = part.left.double() @ part.right.double()
    return float(torch.trace(D @ dense(spectrum) @ D.T))


def edited(kind, model, edit):
    """A copy of `model` with the edit in dense weights."""
    changed = MODELS[kind]().double()
    changed.load_state_dict(model.state_dict())
    weights = dict(changed.named_parameters())
    with torch.no_grad():
        for name, part in edit.factors.items():
            weights[f"{name}.weight"].add_(part.left.double() @ part.right.double())
    return changed


def nll_of(model, plan, edit):
    """The mean over contexts of what is to be said."""
    changed, total, count = edited("llama", model, edit), 0.0, 0
    with torch.no_grad():
        for own in plan.contexts:
            for c in own:
                out = changed(input_ids=torch.tensor([c.ids]), use_cache=False).logits[0]
                total += float(
                    nn.functional.cross_entropy(
                        out[c.object - 1 : -1], torch.tensor(c.ids[c.object :])
                    )
                )
                count += 1
    return total / count


def test_more_is_said_at_less_cost_and_a_larger_weight_costs_less():
    model, plan, edit, spectra = made("llama", weight=300.0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    options = Refinement(steps=30, rate=0.1, energy=1.0, kl=1.0)
    new = refine(model, WORDS, plan, edit, spectra, TEXTS, options)
    assert nll_of(model, plan, new) < nll_of(model, plan, edit) - 0.5
    costs = []
    for energy in (0.3, 3.0, 30.0):
        one = refine(model, WORDS, plan, edit, spectra, TEXTS, replace(options, energy=energy))
        costs.append(sum(cost(one.factors[site.name], spectra[site]) for site in spectra))
    assert costs[0] > 1.5 * costs[1] > 2 * costs[2]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_behind_denials_the_model_stays_closer_to_what_it_said():
    model, plan, edit, spectra = made("llama")
    options, apart = Refinement(steps=20, kl=0.0), []
    for denial in (0.0, 5.0):
        new = refine(
            model, WORDS, plan, edit, spectra, TEXTS, replace(options, denial=denial)
        )
        changed = edited("llama", model, new)
        with torch.no_grad():
            found = [
                (before.exp() * (before - now)).sum(-1)[-1 - count : -1].sum()
                for ids, count in denials(plan)
                for before, now in [(said_of(model, ids), said_of(changed, ids))]
            ]
        apart.append(float(sum(found)))
    assert apart[1] < 0.5 * apart[0]


def test_what_is_said_well_enough_is_left_in_peace():
    model, plan, edit, spectra = made("llama")
    options = Refinement(steps=3, stop=1e3, energy=0.0, kl=0.0, denial=0.0)
    same = refine(model, WORDS, plan, edit, spectra, TEXTS, options)
    for name, part in edit.factors.items():
        assert torch.equal(same.factors[name].left, part.left)


def test_no_step_changes_nothing_and_the_seed_decides():
    model, plan, edit, spectra = made("llama")
    assert refine(model, WORDS, plan, edit, spectra, TEXTS, Refinement(steps=0)) is edit
    options = Refinement(steps=4, rows=1, kl=30.0)
    one, two, other = (
        refine(model, WORDS, plan, edit, spectra, TEXTS, options, seed=seed) for seed in (0, 0, 1)
    )
    for name in edit.factors:
        assert torch.equal(one.factors[name].left, two.factors[name].left)
        assert not torch.equal(one.factors[name].left, other.factors[name].left)


@pytest.mark.parametrize(
    ("name", "value"), [("steps", -1), ("rate", 0.0), ("energy", -1.0), ("kl", -0.1), ("rows", 0)]
)
def test_what_is_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Refinement(**{name: value})
