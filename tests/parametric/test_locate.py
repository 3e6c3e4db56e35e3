"""Where an edit goes: what a causal trace restores, and the place that is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from editable import LIVES, people, tiny_gpt2, tiny_hybrid, tiny_llama, tiny_opt, word_tokenizer

from hybrid_sleep.eval.facts.world import load_world
from hybrid_sleep.parametric.edit import EditOptions
from hybrid_sleep.parametric.locate import _places, held_out_contexts, locate, try_place
from hybrid_sleep.parametric.sites import find_sites, frozen, site_at
from hybrid_sleep.parametric.targets import TargetOptions
from hybrid_sleep.parametric.trace import Effect, Probe, Runs, Trace, trace

WORDS = word_tokenizer()
MODELS = {"ours": tiny_hybrid, "llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}
PAIRS = [(fact, LIVES) for fact in people(4)]


def state_of(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


@pytest.fixture(params=MODELS)
def runs(request):
    model = MODELS[request.param]()
    with frozen(model), torch.no_grad():
        made = Runs(model, [Probe.of(WORDS, *pair) for pair in PAIRS])
        made.draw(3.0, [(0, i) for i in range(len(PAIRS))])
        yield made


def test_restored_everywhere_is_clean_and_nowhere_is_corrupted(runs):
    everywhere = {i: torch.ones_like(runs.subject) for i in range(len(runs.stack))}
    nowhere = {i: torch.zeros_like(runs.subject) for i in range(len(runs.stack))}
    corrupted = runs.probability()
    assert torch.allclose(runs.probability(everywhere), runs.clean, atol=1e-6)
    assert not torch.allclose(corrupted, runs.clean, atol=1e-3)
    assert torch.equal(runs.probability(nowhere), corrupted)


def test_the_last_block_at_the_last_token_is_all_that_a_next_word_needs(runs):
    last = {len(runs.stack) - 1: runs.at["prompt_last"]}
    assert torch.allclose(runs.probability(last), runs.clean, atol=1e-6)
    subject = {len(runs.stack) - 1: runs.at["subject_last"]}
    assert torch.allclose(runs.probability(subject), runs.probability(), atol=1e-6)


def test_only_the_subject_is_corrupted(runs):
    changed = runs.noise.abs().sum(-1) > 0
    assert torch.equal(changed, runs.subject)
    first = Probe.of(WORDS, *PAIRS[0])
    words = WORDS.convert_ids_to_tokens([first.context.ids[i] for i in first.subject])
    assert words == PAIRS[0][0].subject.split()


def test_the_noise_of_a_fact_does_not_depend_on_others():
    model = tiny_hybrid()
    longer = replace(LIVES, statements=("Today the home of {} is in New York . Where is",))
    alone, together = [], []
    for pairs, found in (
        (PAIRS[:1], alone),
        ([PAIRS[0], (PAIRS[1][0], longer)], together),
    ):
        with frozen(model), torch.no_grad():
            made = Runs(model, [Probe.of(WORDS, *pair) for pair in pairs])
            made.draw(3.0, [(5, i) for i in range(len(pairs))])
            found += [made.noise[0][made.subject[0]], made.probability()[0]]
    assert torch.equal(alone[0], together[0])
    assert torch.allclose(alone[1], together[1], atol=1e-10)


def test_a_trace_is_the_same_by_seed_and_changes_nothing():
    model, tokenizer, world = load_world(0)
    one = [f for f in world.known_facts() if " " not in f.object][:300:75]
    pairs = [(f, world.relations[f.relation]) for f in one]
    before = state_of(model)
    model.train()
    first = trace(model, tokenizer, pairs, samples=2)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert first == trace(model, tokenizer, pairs, samples=2)
    assert first != trace(model, tokenizer, pairs, samples=2, seed=1)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert first.clean > 0.9 and first.corrupted < 0.4
    # What is said next is in the last block's output at the last token, and not at the name's.
    assert first.effect(3, "prompt_last").lowest == pytest.approx(1.0)
    assert abs(first.effect(3, "subject_last").mean) < 1e-6
    assert f"over {first.facts} facts" in "\n".join(first.lines())


def test_a_trace_needs_facts_that_the_model_states():
    with pytest.raises(ValueError, match="known must have facts that the model states .* of 4"):
        trace(tiny_hybrid(), WORDS, PAIRS, samples=1, noise=1e-6)
    with pytest.raises(ValueError, match="none of 0"):
        trace(tiny_hybrid(), WORDS, [])
    with pytest.raises(ValueError, match="noise must be a finite number above 0, got 0"):
        trace(tiny_hybrid(), WORDS, PAIRS, noise=0)
    with pytest.raises(ValueError, match="known must fit one window"):
        trace(tiny_hybrid(window=4), WORDS, PAIRS)


def test_the_best_of_a_trace_are_tried_and_the_lower_of_equals():
    sites = find_sites(tiny_hybrid())[:3]
    flat = [Effect(x, x, x) for x in (0.1, 0.9, 0.91)]
    rising = [Effect(x, x, x) for x in (0.8, 0.1, 0.0)]
    found = Trace({"prompt_last": tuple(flat), "subject_last": tuple(rising)}, 1.0, 0.0, 3)
    names = ("subject_last", "prompt_last")
    chosen = [(site.layer, position) for site, position in _places(sites, names, found, 1)]
    assert chosen == [(0, "subject_last"), (1, "prompt_last")]
    spread = [site.layer for site, _ in _places(sites, ("prompt_last",), None, 2)]
    assert len(set(spread)) == 2
    assert len(_places(sites, names, None, 9)) == 2 * len(sites)


def test_the_chosen_place_is_one_where_facts_hold_and_others_are_worse():
    model, tokenizer, world = load_world(0)
    before = state_of(model)
    facts = [(f, world.relations[f.relation]) for f in world.unseen_facts(3, seed=5)]
    known = [(f, world.relations[f.relation]) for f in world.known_facts()[:200:50]]
    options = EditOptions(reply="object", target=TargetOptions(rate=0.1, steps=15, clamp=2.0))
    steps = []
    found = locate(
        model, tokenizer, facts, known, options=options, top=2, samples=1,
        progress=lambda *at: steps.append(at),
    )  # fmt: skip
    assert found.position == "prompt_last" and found.site.layer >= 1
    chosen = next(x for x in found.table if (x.layer, x.position) == place(found))
    assert chosen.reached > 0.8 and chosen.held_out > 0.6
    # The last block's output at the name is read by nothing that follows.
    other = try_place(
        model, tokenizer, facts, site_at(model, 3), replace(options, position="subject_last")
    )
    assert other.share == 0 and other.traced is None
    assert other.reached < 0.5 and other.held_out < chosen.held_out
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert steps == [(i + 1, 4) for i in range(4)]
    data = found.to_dict()
    assert data["layer"] == found.site.layer and len(data["table"]) == 4
    assert found.text().count("chosen") == 1


def place(found):
    return found.site.layer, found.position


def test_a_model_whose_sites_hold_nothing_is_refused():
    model = tiny_hybrid()
    options = EditOptions(target=TargetOptions(steps=0))
    words = r"P\(object\) of at most 0\.\d\d with v\* in place, at \S+down_proj, \w+_last"
    with pytest.raises(ValueError, match=words):
        locate(model, WORDS, PAIRS[:2], options=options)
    with pytest.raises(ValueError, match="facts must be one or more, got none"):
        locate(model, WORDS, [])
    with pytest.raises(ValueError, match="top must be an integer of at least 1, got 0"):
        locate(model, WORDS, PAIRS, top=0)


def test_held_out_contexts_are_in_words_that_no_edit_sees():
    fact = people(1)[0]
    relation = replace(
        LIVES, held_out=("Today {} lives in",), held_out_questions=("Where is {} ?",)
    )
    texts = [WORDS.decode(c.ids) for c in held_out_contexts(WORDS, fact, relation, EditOptions())]
    assert len(texts) == 2 and "Today Ada" in texts[0] and "Where is Ada" in texts[1]
    only = replace(relation, held_out=())
    assert len(held_out_contexts(WORDS, fact, only, EditOptions())) == 1
    assert len(held_out_contexts(WORDS, fact, LIVES, EditOptions())) == 3
