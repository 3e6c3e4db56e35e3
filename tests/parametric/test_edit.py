"""Facts written into weights, against dense edits applied by hand to fp64 models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from editable import LIVES, people, tiny_gpt2, tiny_hybrid, tiny_llama, tiny_opt, word_tokenizer

from hybrid_sleep.parametric.edit import EditOptions, Plan, plan_facts, solve_plan
from hybrid_sleep.parametric.edited import EditedWeights
from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.measure import ask
from hybrid_sleep.parametric.sites import find_sites, site_at
from hybrid_sleep.parametric.solve import Preconditioner, Spectrum
from hybrid_sleep.parametric.targets import TargetOptions
from hybrid_sleep.sleep.weights import weights_version

WORDS = word_tokenizer()
# One context a fact, so that it has one key.
ONE = EditOptions(statements=1, questions=0, target=TargetOptions(steps=4, stop=0.0))
SMALL, LARGE = 1e-9, 1e9


def items_of(count, first=0):
    return [(first + i, fact, LIVES) for i, fact in enumerate(people(count))]


def inverse_of(*sites, weight=SMALL):
    moment = {site: torch.eye(site.inputs, dtype=torch.float64) for site in sites}
    return {site: Preconditioner(Spectrum.of(moment[site]), weight) for site in sites}


def apply(model, edit):
    """Add the edit to the weights, dense and in fp64."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for site in find_sites(model):
            if site.name in edit.factors:
                part = edit.factors[site.name]
                dense = part.left.double() @ part.right.double()
                weights[site.parameter].add_(dense.T if site.transposed else dense)


def seen_at(model, name, contexts):
    """The outputs `[applications, o]` of a module at the key tokens of each context."""
    found = []

    def look(module, given, out):
        found.append(out[0] if isinstance(out, tuple) else out)

    hook = model.get_submodule(name).register_forward_hook(look)
    rows = []
    with torch.no_grad():
        for c in contexts:
            found.clear()
            model(input_ids=torch.tensor([c.ids]), use_cache=False)
            rows.append(torch.stack([x.flatten(0, -2)[list(c.at)] for x in found]))
    hook.remove()
    return rows


MODELS = {
    "ours": lambda: tiny_hybrid(intermediate_size=48),
    "ours, no MLP": lambda: tiny_hybrid(intermediate_size=0, linear_value_head_dim=24),
    "llama": lambda: tiny_llama(intermediate_size=48),
    "gpt2": lambda: tiny_gpt2(n_inner=48),
    "opt": lambda: tiny_opt(ffn_dim=48),
}


@pytest.mark.parametrize("kind", MODELS)
def test_with_a_small_weight_the_site_gives_what_was_wanted(kind):
    model = MODELS[kind]()
    site = site_at(model, 1)
    # Several contexts, and in chats two keys a context.
    options = replace(ONE, statements=2, questions=1)
    plan = plan_facts(model, WORDS, items_of(3), site, options)
    edit = solve_plan(model, plan, inverse_of(site))
    before = [seen_at(model, site.name, own) for own in plan.contexts]
    apply(model, edit)
    assert max(len(c.at) for own in plan.contexts for c in own) == 2
    for f, own in enumerate(plan.contexts):
        for old, new in zip(before[f], seen_at(model, site.name, own), strict=True):
            wanted = old + plan.targets.delta[f]
            torch.testing.assert_close(new, wanted, rtol=1e-4, atol=1e-4 * float(wanted.norm()))
    solution = edit.solutions[site.name]
    assert solution["error"] < 1e-4 and solution["leak"] == 0.0
    dense = edit.factors[site.name].left.double() @ edit.factors[site.name].right.double()
    assert solution["norm"] == pytest.approx(float(dense.norm()), rel=1e-4)
    assert edit.factors[site.name].left.shape[1] == 3
    told = edit.facts[2][site.name]
    assert told["loss"] == pytest.approx(float(plan.targets.loss[2]))
    assert told["loss_before"] > told["loss"] and told["delta"] > 0
    parts = edit.factors[site.name]
    alone = parts.left[:, 2:].double() @ parts.right[2:].double()
    assert told["norm"] == pytest.approx(float(alone.norm()), rel=1e-4)


def test_with_a_large_weight_nothing_is_written():
    model = tiny_llama()
    site = site_at(model, 1)
    plan = plan_facts(model, WORDS, items_of(2), site, ONE)
    edit = solve_plan(model, plan, inverse_of(site, weight=LARGE))
    assert edit.solutions[site.name]["error"] == pytest.approx(1.0, abs=1e-6)


def test_the_model_answers_what_was_written_and_before_it_did_not():
    model = tiny_llama()
    last = find_sites(model)[-1]
    facts = [Fact("Ada Byron", "lives in", "Oslo"), Fact("Bo Chan", "lives in", "Rome")]
    options = replace(ONE, position="prompt_last", target=TargetOptions(steps=60, clamp=40.0))
    prompts = ["Ada Byron lives in", "Bo Chan lives in"]
    before = ask(model, WORDS, prompts, tokens=1)
    items = [(i, fact, LIVES) for i, fact in enumerate(facts)]
    plan = plan_facts(model, WORDS, items, last, options)
    assert (plan.targets.loss < plan.targets.before).all()
    edited = EditedWeights(model)
    edited.keep([last])
    edited.materialise([solve_plan(model, plan, inverse_of(last)).factors])
    after = ask(model, WORDS, prompts, tokens=1)
    assert before[0] != "Oslo" and before[1] != "Rome" and after == ["Oslo", "Rome"]
    # The loss that v* had is the one that the weights have.
    for own, told in zip(plan.contexts, plan.targets.loss, strict=True):
        c = own[0]
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([c.ids])).logits[0].log_softmax(-1)
        assert -float(logp[-2, c.ids[-1]]) == pytest.approx(float(told), abs=1e-3)


def test_several_sites_share_what_is_left():
    model = tiny_llama(num_hidden_layers=4, intermediate_size=48)
    # A token behind the last block reaches no other, so v* would be zero there.
    sites = find_sites(model)[:3]
    plan = plan_facts(model, WORDS, items_of(3), sites[-1], ONE)
    assert (plan.targets.share > 0.01).all()
    block = "model.layers.2"
    before = [seen_at(model, block, own)[0] for own in plan.contexts]
    edit = solve_plan(model, plan, inverse_of(*sites))
    assert list(edit.factors) == [site.name for site in sites]
    # A third of it, then half of what is left, then all of that.
    torch.testing.assert_close(edit.factors[sites[0].name].left, (plan.targets.delta / 3).T.float())
    apply(model, edit)
    for f, own in enumerate(plan.contexts):
        moved = seen_at(model, block, own)[0] - before[f]
        wanted = plan.targets.delta[f].expand_as(moved)
        torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-3 * float(wanted.norm()))
    assert sites[0].name in edit.facts[0] and len(edit.solutions) == 3


def test_a_shared_block_has_a_key_for_every_time_it_is_applied():
    model = tiny_hybrid(distinct_layers=2, intermediate_size=48)
    site = site_at(model, 1)
    plan = plan_facts(model, WORDS, items_of(2), site, ONE)
    assert (plan.targets.share > 0.01).all()
    before = [seen_at(model, site.name, own)[0] for own in plan.contexts]
    edit = solve_plan(model, plan, inverse_of(site))
    assert edit.factors[site.name].left.shape[1] == 2 and edit.solutions[site.name]["error"] < 1e-4
    apply(model, edit)
    for f, own in enumerate(plan.contexts):
        moved = seen_at(model, site.name, own)[0] - before[f]
        assert len(moved) == 2
        # Later applications have other keys by then.
        torch.testing.assert_close(
            moved[0], plan.targets.delta[f].expand_as(moved[0]), rtol=1e-3, atol=1e-4
        )


def plan_of(plan, f, delta):
    """Fact `f` of a plan, which is to move its output by `delta`."""
    one = plan.only([plan.items[f][0]])
    return replace(one, targets=replace(one.targets, delta=delta[None]))


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_one_by_one_with_past_keys_is_the_same_as_at_once(batch):
    """For the same v*, and keys at one site, which an edit there leaves as they are."""
    model, count, weight = tiny_llama(intermediate_size=48), 9, 0.3
    site = site_at(model, 1)
    plan = plan_facts(model, WORDS, items_of(count), site, ONE)
    contexts = [own[0] for own in plan.contexts]
    wanted = [
        x[0, 0] + d
        for x, d in zip(seen_at(model, site.name, contexts), plan.targets.delta, strict=True)
    ]
    inverse = inverse_of(site, weight=weight)
    at_once = solve_plan(model, plan, inverse).factors[site.name]
    dense = at_once.left.double() @ at_once.right.double()
    for accumulate in (True, False):
        now = MODELS["llama"]()
        total, past = torch.zeros_like(dense), None
        for first in range(0, count, batch):
            ids = range(first, min(count, first + batch))
            said = seen_at(now, site.name, [contexts[i] for i in ids])
            part = plan.only(list(ids))
            delta = torch.stack([wanted[i] - x[0, 0] for i, x in zip(ids, said, strict=True)])
            part = replace(part, targets=replace(part.targets, delta=delta))
            edit = solve_plan(now, part, inverse, past if accumulate else None)
            apply(now, edit)
            new = edit.factors[site.name]
            total += new.left.double() @ new.right.double()
            known = (new.keys, new.facts)
            if past is not None:
                known = tuple(torch.cat(pair) for pair in zip(past[site.name], known, strict=True))
            past = {site.name: known}
        off = float((total - dense).norm() / dense.norm())
        # Factors and past keys are fp32.
        assert off < 1e-5 if accumulate or batch == 100 else off > 1e-2


def test_keys_of_a_fact_that_is_written_anew_do_not_hold_it_back():
    model = tiny_llama()
    site = site_at(model, 1)
    plan = plan_facts(model, WORDS, items_of(2), site, ONE)
    inverse = inverse_of(site, weight=1.0)
    edit = solve_plan(model, plan, inverse)
    keys, facts = edit.factors[site.name].keys, edit.factors[site.name].facts
    assert facts.tolist() == [0, 1]
    first = plan.only([0])

    def error(facts):
        past = {site.name: (keys, torch.tensor(facts))}
        return solve_plan(model, first, inverse, past).solutions[site.name]["error"]

    free = solve_plan(model, first, inverse).solutions[site.name]["error"]
    only_other = {site.name: (keys[1:], torch.tensor([1]))}
    other = solve_plan(model, first, inverse, only_other).solutions[site.name]["error"]
    assert error([0, 0]) == free and error([0, 1]) == other
    assert error([7, 1]) > other > free


def test_runs_do_not_see_each_other_and_leave_the_weights_alone():
    model = tiny_hybrid()
    sites = find_sites(model)[:2]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    version = weights_version(model)

    def run(model, items):
        plan = plan_facts(model, WORDS, items, sites[-1], ONE)
        assert (plan.targets.share > 0.01).all()
        return solve_plan(model, plan, inverse_of(*sites, weight=1.0))

    def same(a, b):
        return all(
            torch.equal(getattr(a.factors[s], name), getattr(b.factors[s], name))
            for s in a.factors for name in ("left", "right", "keys", "facts")
        )  # fmt: skip

    first, other = run(model, items_of(2)), run(model, items_of(3, first=5))
    assert not same(first, other)
    assert same(run(model, items_of(2)), first)
    assert same(run(tiny_hybrid(), items_of(3, first=5)), other)
    assert weights_version(model) == version
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_plans_are_cut_and_improved():
    model = tiny_llama()
    site = site_at(model, 1)
    items = items_of(3)
    plan = plan_facts(model, WORDS, items, site, ONE)
    harder = plan_facts(model, WORDS, items[1:], site, ONE.harder(4.0))
    both = plan.updated(harder)
    for i in range(3):
        candidates = [plan.only([i])] + ([harder.only([i])] if i else [])
        best = min(candidates, key=lambda p: float(p.targets.loss[0]))
        got: Plan = both.only([i])
        assert got.items == (items[i],) and got.contexts == best.contexts
        for name in ("delta", "loss", "before", "share"):
            assert torch.equal(getattr(got.targets, name), getattr(best.targets, name))
    assert (both.targets.loss <= plan.targets.loss).all()
    assert (both.targets.loss[1:] < plan.targets.loss[1:]).any()
    assert ONE.harder(4.0).target.steps == 16 and ONE.target.steps == 4


def test_what_cannot_be_written_is_refused():
    model = tiny_llama()
    site = site_at(model, 1)
    with pytest.raises(ValueError, match="items must be one or more"):
        plan_facts(model, WORDS, [], site, ONE)
    small = tiny_hybrid(window=5)
    with pytest.raises(ValueError, match="contexts must fit one window"):
        plan_facts(small, WORDS, items_of(1), site_at(small, 1), ONE)
    for wrong in (
        {"weight": 0}, {"filter": "x"}, {"position": "first"}, {"statements": 0},
        {"questions": -1}, {"hopeless": 0}, {"reply": "long"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            EditOptions(**wrong)
