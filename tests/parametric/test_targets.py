"""v*: what it does to the model, against full forward passes with the delta put in by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from editable import (
    LIVES,
    people,
    tiny_gpt2,
    tiny_hybrid,
    tiny_llama,
    tiny_opt,
    word_tokenizer,
)

from hybrid_sleep.parametric.contexts import Context, context, edit_contexts
from hybrid_sleep.parametric.sites import site_at
from hybrid_sleep.parametric.targets import Replay, TargetOptions, find_targets

WORDS = word_tokenizer()
QUICK = TargetOptions(rate=0.3, steps=6, stop=0.0)


MODELS = {
    "ours": tiny_hybrid,
    "ours, mamba2": lambda: tiny_hybrid(
        state_space="mamba2", linear_num_key_heads=1, layer_types=["linear_attention"] * 3
    ),
    "ours, shared": lambda: tiny_hybrid(distinct_layers=2),
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
}


# transformers computes the norms of a llama in fp32.
EXACT = {kind: 1e-5 if kind == "llama" else 1e-10 for kind in MODELS}


def contexts_of(count: int, reply: str = "statement"):
    return [edit_contexts(WORDS, fact, LIVES, reply=reply) for fact in people(count)]


def essences_of(count: int):
    return [context(WORDS, f"{f.subject} is", f.subject, "") for f in people(count)]


def by_hand(model, site, c, delta):
    """Log probabilities `[T, vocab]` of one row alone, with delta added where the row's key is."""

    def change(module, given, out):
        new = out.clone()
        rows = new if new.ndim == 2 else new[0]
        for i in c.at:
            rows[i] += delta
        return new

    hook = model.get_submodule(site.name).register_forward_hook(change)
    logits = model(input_ids=torch.tensor([c.ids]), use_cache=False).logits[0]
    hook.remove()
    return logits.log_softmax(-1)


def losses_by_hand(model, site, c, delta):
    """Of the reply and of the object."""
    logp = by_hand(model, site, c, delta)
    parts = []
    for first, last in ((c.target, c.object), (c.object, len(c.ids))):
        told = [logp[i - 1, c.ids[i]] for i in range(first, last)]
        parts.append(-sum(told, logp.new_zeros(())) / max(1, len(told)))
    return parts


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_replay_is_the_full_forward_pass_with_the_delta(kind, layer):
    model = MODELS[kind]()
    site = site_at(model, layer)
    rows = [c for own in contexts_of(3) for c in own]
    assert len({len(c.ids) for c in rows}) > 2
    owner = [i // 3 for i in range(len(rows))]
    run = Replay(model, site, rows, owner)
    delta = torch.randn(len(rows), site.outputs, dtype=torch.float64)
    # All rows, and some, the longest not among them.
    short = [i for i, c in enumerate(rows) if len(c.ids) < max(len(c.ids) for c in rows) - 2]
    for chosen in (None, torch.tensor(short[::-1]), torch.tensor([len(rows) - 1, 0])):
        which = range(len(rows)) if chosen is None else chosen.tolist()
        with torch.no_grad():
            said, reply, logp = run.losses(delta[list(which)], chosen)
        for i, row in enumerate(which):
            c = rows[row]
            with torch.no_grad():
                wanted = by_hand(model, site, c, delta[row])[c.target - 1]
                wanted_reply, wanted_said = losses_by_hand(model, site, c, delta[row])
            torch.testing.assert_close(logp[i], wanted, rtol=0, atol=EXACT[kind])
            torch.testing.assert_close(said[i], wanted_said, rtol=0, atol=EXACT[kind])
            torch.testing.assert_close(reply[i] + 0.0, wanted_reply, rtol=0, atol=EXACT[kind])


@pytest.mark.parametrize("kind", ["ours", "llama", "gpt2", "opt"])
def test_what_all_rows_begin_with_is_computed_once(kind):
    model = MODELS[kind]()
    site, begun = site_at(model, 1), tuple(range(3, 13))
    rows = [
        Context((*begun, *c.ids), tuple(i + 10 for i in c.at), c.target + 10, c.object + 10)
        for c in contexts_of(3)[1]
    ]
    run = Replay(model, site, rows, [0] * len(rows))
    widths = []
    hook = model.get_submodule(site.name).register_forward_hook(
        lambda m, given, out: widths.append(out.numel() // site.outputs // len(rows))
    )
    delta = torch.randn(len(rows), site.outputs, dtype=torch.float64).requires_grad_()
    said, reply, logp = run.losses(delta)
    hook.remove()
    # Ours remembers in another way.
    left = 0 if kind == "ours" else 10
    assert run.start >= left and widths == [max(len(c.ids) for c in rows) - run.start]
    got = torch.autograd.grad((said + reply).sum(), delta)[0]
    for i, c in enumerate(rows):
        wanted = by_hand(model, site, c, delta[i])[c.target - 1]
        torch.testing.assert_close(logp[i], wanted, rtol=0, atol=EXACT[kind])
        reply_by_hand, said_by_hand = losses_by_hand(model, site, c, delta[i])
        torch.testing.assert_close(said[i], said_by_hand, rtol=0, atol=EXACT[kind])
        loss = said_by_hand + reply_by_hand
        wanted = torch.autograd.grad(loss, delta)[0][i]
        torch.testing.assert_close(got[i], wanted, rtol=0, atol=EXACT[kind])


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_blocks_below_the_site_are_not_computed_again(kind):
    model = MODELS[kind]()
    site = site_at(model, 2)
    rows = contexts_of(1)[0]
    run = Replay(model, site, rows, [0] * len(rows))
    ran = []
    hooks = [
        module.register_forward_pre_hook(lambda m, given, name=name: ran.append(name))
        for name, module in model.named_modules()
        if name.endswith("down_proj")
    ]
    run.losses(torch.zeros(len(rows), site.outputs, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    layers = len(model.model.layers)
    assert ran == [f"model.layers.{i}.mlp.down_proj" for i in range(2, layers)]


def test_the_norm_is_that_of_the_stream_behind_the_block():
    model = tiny_llama()
    rows = contexts_of(1)[0]
    run = Replay(model, site_at(model, 1), rows, [0] * len(rows))
    for c, norm in zip(rows, run.norm, strict=True):
        states = model(input_ids=torch.tensor([c.ids]), output_hidden_states=True).hidden_states
        wanted = states[2][0, list(c.at)].norm(dim=-1).mean()
        torch.testing.assert_close(norm, wanted.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_is_that_of_the_full_forward_pass(kind):
    model = MODELS[kind]()
    site = site_at(model, 1)
    rows = contexts_of(1)[0]
    run = Replay(model, site, rows, [0] * len(rows))
    delta = torch.randn(len(rows), site.outputs, dtype=torch.float64).requires_grad_()
    got = torch.autograd.grad(sum(run.losses(delta)[:2]).sum(), delta)[0]
    loss = sum(sum(losses_by_hand(model, site, c, delta[i])) for i, c in enumerate(rows))
    wanted = torch.autograd.grad(loss, delta)[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=EXACT[kind])


@pytest.mark.parametrize("kind", ["ours", "gpt2", "ours, shared"])
def test_the_gradient_is_that_of_finite_differences(kind):
    model = MODELS[kind]()
    site = site_at(model, 1)
    rows = contexts_of(1)[0]
    run = Replay(model, site, rows, [0] * len(rows))
    delta = torch.randn(len(rows), site.outputs, dtype=torch.float64).requires_grad_()
    got = torch.autograd.grad(sum(run.losses(delta)[:2]).sum(), delta)[0]
    way = torch.randn_like(got)
    step = 1e-5
    with torch.no_grad():
        up, down = (sum(run.losses(delta + s * way)[:2]).sum() for s in (step, -step))
    assert float((got * way).sum()) == pytest.approx(float(up - down) / (2 * step), rel=1e-7)


@pytest.mark.parametrize("kind", ["ours", "gpt2"])
def test_facts_do_not_see_each_other(kind):
    """A fact's delta is the same alone or among others that finish before it or after."""
    model = MODELS[kind]()
    site = site_at(model, 1)
    every, essence = contexts_of(4), essences_of(4)
    options = replace(QUICK, steps=8, stop=3.5, clamp=3.0, kl=0.1, decay=0.01)
    # Of different lengths, so that some groups of rows run empty before others.
    every = [own[: 1 + f % 3] for f, own in enumerate(every)]
    essence[2] = None
    together = find_targets(model, site, every, essence, options)
    assert 0 < int((together.loss < options.stop).sum()) < 4
    for f in range(4):
        alone = find_targets(model, site, [every[f]], [essence[f]], options)
        torch.testing.assert_close(together.delta[f], alone.delta[0], rtol=1e-6, atol=1e-6)
        for name in ("loss", "before", "share"):
            got, wanted = getattr(together, name)[f], getattr(alone, name)[0]
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("reply", "least"), [("object", 0.02), ("statement", 0.005)])
def test_the_loss_falls_to_what_it_says_and_the_clamp_holds(kind, reply, least):
    """What is told is the object's; a reply in front of it takes a part of what delta can do."""
    model = MODELS[kind]()
    site = site_at(model, 1)
    every = contexts_of(2, reply)
    options = replace(QUICK, kl=0.0, clamp=0.8)
    got = find_targets(model, site, every, [None] * 2, options)
    assert (got.loss < got.before - least).all()
    assert (got.share <= 0.8 + 1e-9).all()
    none = torch.zeros(site.outputs, dtype=torch.float64)
    for f, own in enumerate(every):
        for delta, told in ((none, got.before[f]), (got.delta[f], got.loss[f])):
            with torch.no_grad():
                wanted = sum(losses_by_hand(model, site, c, delta)[1] for c in own) / len(own)
            torch.testing.assert_close(told, wanted, rtol=0, atol=EXACT[kind])
        norms = Replay(model, site, own, [0] * len(own)).norm
        share = float(got.delta[f].norm() / norms.mean())
        assert float(got.share[f]) == pytest.approx(share)
    tight = find_targets(model, site, every, [None] * 2, replace(options, clamp=0.01))
    assert (tight.share <= 0.01 + 1e-9).all() and (tight.loss > got.loss).all()


def test_a_fact_that_is_known_is_left_alone_and_one_that_is_learned_stops():
    model = tiny_llama()
    site, every = site_at(model, 1), contexts_of(2, "object")
    free = replace(QUICK, steps=20, kl=0.0, clamp=10.0)
    start = find_targets(model, site, every, [None] * 2, replace(free, steps=0))
    assert start.steps == 0 and not start.delta.any()
    torch.testing.assert_close(start.loss, start.before)
    done = find_targets(model, site, every, [None] * 2, replace(free, stop=float(start.loss.max())))
    assert done.steps <= 1
    further = find_targets(model, site, every, [None] * 2, free)
    stop = float(0.5 * (further.loss + start.before).max())
    stopped = find_targets(model, site, every, [None] * 2, replace(free, stop=stop))
    assert 0 < stopped.steps < 20 and (further.loss < stopped.loss).all()
    assert (stopped.loss < stop).all()
    # Of steps back and forth the best place is kept: more of them are never worse.
    wild = replace(free, rate=1.0, decay=20.0)
    path = [find_targets(model, site, every, [None] * 2, replace(wild, steps=n)) for n in range(6)]
    losses = torch.stack([x.loss for x in path])
    assert (losses.diff(dim=0) <= 0).all() and (losses.diff(dim=0) == 0).any()


def test_the_divergence_keeps_the_essence_as_it_was():
    model = tiny_llama()
    site, every, essence = site_at(model, 1), contexts_of(3), essences_of(3)
    zero = torch.zeros(site.outputs, dtype=torch.float64)
    moved = {}
    for kl in (0.0, 0.3, 3.0):
        got = find_targets(model, site, every, essence, replace(QUICK, steps=15, kl=kl))
        apart = []
        for c, delta in zip(essence, got.delta, strict=True):
            with torch.no_grad():
                base, now = (by_hand(model, site, c, x)[-1] for x in (zero, delta))
            apart.append(float((base.exp() * (base - now)).sum()))
        moved[kl] = sum(apart)
    assert moved[0.0] > 2 * moved[0.3] > 2 * moved[3.0]


def test_decay_makes_it_smaller():
    model = tiny_llama()
    site, every = site_at(model, 1), contexts_of(2)
    sizes = [
        find_targets(model, site, every, [None] * 2, replace(QUICK, decay=d, clamp=9.0)).share
        for d in (0.0, 5.0)
    ]
    assert (sizes[1] < sizes[0]).all()


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_the_model_is_as_it_was(kind):
    model = MODELS[kind]().train()
    model.lm_head.weight.requires_grad_(False)
    # As accelerate does where weights are offloaded.
    first = model.model.layers[0]
    whole = first.forward
    first.forward = wrapped = lambda *args, **kwargs: whole(*args, **kwargs)
    before = {name: p.clone() for name, p in model.named_parameters()}
    asking = {name: p.requires_grad for name, p in model.named_parameters()}
    find_targets(model, site_at(model, 1), contexts_of(2), essences_of(2), QUICK)

    def boom(*args):
        raise KeyError

    with pytest.raises(KeyError):
        find_targets(model, site_at(model, 1), contexts_of(2), [None] * 2, QUICK, boom)
    hook = model.lm_head.register_forward_hook(boom)
    with pytest.raises(KeyError):
        find_targets(model, site_at(model, 1), contexts_of(2), [None] * 2, QUICK)
    hook.remove()
    assert all(m.training for m in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad == asking[name]
    assert vars(first)["forward"] is wrapped
    assert not any("forward" in vars(m) for m in model.modules() if m is not first)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_context_that_no_window_holds_is_refused():
    model = tiny_hybrid(window=5)
    with pytest.raises(ValueError, match="contexts must fit one window, got .* read 5 first"):
        find_targets(model, site_at(model, 1), contexts_of(1), [None], QUICK)


def test_half_precision_is_computed_in_fp32():
    model = tiny_llama().bfloat16()
    got = find_targets(model, site_at(model, 1), contexts_of(2), essences_of(2), QUICK)
    assert got.delta.dtype == torch.float32 and (got.loss < got.before).all()


def test_progress_is_told_and_options_are_checked():
    model, told = tiny_llama(), []
    find_targets(
        model, site_at(model, 0), contexts_of(1), [None], QUICK, lambda *at: told.append(at)
    )
    assert told == [(i, 6) for i in range(1, 7)]
    for wrong in ({"rate": 0.0}, {"clamp": 0}, {"steps": -1}, {"stop": -1.0}, {"kl": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            TargetOptions(**wrong)
