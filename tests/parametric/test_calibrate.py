"""How strongly to write: the front, and the point that is chosen on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybrid_sleep.eval.facts.world import load_world
from hybrid_sleep.parametric.calibrate import Point, calibrate, choose
from hybrid_sleep.parametric.edit import EditOptions
from hybrid_sleep.parametric.gate import Measured, Thresholds
from hybrid_sleep.parametric.measure import encode
from hybrid_sleep.parametric.probes import Probes
from hybrid_sleep.parametric.sites import site_at
from hybrid_sleep.parametric.statistics import collect
from hybrid_sleep.parametric.targets import TargetOptions

BUDGET = Thresholds()


def point(weight, recall, locality, ratio=1.0, paraphrase=0.9, negation=0.0, clamp=1.0):
    return Point(weight, clamp, Measured(recall, paraphrase, negation, locality, ratio), 0.1, 1.0)


def test_the_largest_weight_with_all_that_is_asked_for_is_chosen():
    points = [point(1, 1.0, 0.98), point(10, 0.96, 0.99), point(100, 0.5, 1.0)]
    best, why = choose(points, BUDGET)
    assert best is points[1] and "Weight 10 is the largest with all of locality 0.97" in why


def test_of_two_clamps_the_smaller_one_is_chosen():
    points = [point(10, 1.0, 1.0, clamp=2.0), point(10, 1.0, 1.0, clamp=1.0)]
    assert choose(points, BUDGET)[0] is points[1]


def test_what_costs_too_much_is_not_chosen_however_much_it_recalls():
    points = [
        point(1, 1.0, 0.9),
        point(5, 0.9, 1.0, 1.2),
        point(10, 0.8, 0.98),
        point(100, 0.4, 1.0),
    ]
    best, why = choose(points, BUDGET)
    assert best is points[2] and why.startswith("No weight has all of")
    denied = [point(1, 1.0, 1.0, negation=0.9), point(10, 0.2, 1.0)]
    assert choose(denied, BUDGET)[0] is denied[1]


def test_if_all_cost_too_much_the_least_harm_is_chosen_and_said():
    points = [point(1, 1.0, 0.5), point(10, 0.8, 0.9)]
    best, why = choose(points, BUDGET)
    assert best is points[1] and "Every weight costs more" in why


def test_what_was_not_measured_and_not_asked_for_counts_as_held():
    points = [point(10, 0.1, 0.2)]
    nothing = Thresholds(recall=None, paraphrase=None, locality=None)
    assert choose(points, nothing)[1].startswith("Weight 10 is the largest")
    unmeasured = [point(10, 1.0, 1.0, paraphrase=None)]
    assert choose(unmeasured, BUDGET)[1].startswith("Weight 10 is the largest")


def test_the_front_of_the_small_world():
    model, tokenizer, world = load_world(0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    facts = [(f, world.relations[f.relation]) for f in world.unseen_facts(4, seed=2)]
    site = site_at(model, 3)
    rows = [encode(tokenizer, text)[:32] for text in world.texts("train", count=100)]
    found = collect(model, [site], [rows], "digest")
    known = [
        (world.relations[f.relation].statements[0].replace("{}", f.subject), f.object)
        for f in world.known_facts()[::80]
    ]
    ordinary = [tuple(encode(tokenizer, text)[:32]) for text in world.texts("test", count=10)]
    options = EditOptions(
        position="prompt_last", reply="object", target=TargetOptions(rate=0.05, steps=20, kl=0.0)
    )
    done = calibrate(
        model, tokenizer, facts, Probes(tuple(known), tuple(ordinary)),
        {site: found[site].spectrum}, options=options, weights=(1.0, 1e5),
    )  # fmt: skip
    strong, weak = (next(p for p in done.points if p.weight == x) for x in (1.0, 1e5))
    assert strong.measured.recall > 0.7 and weak.measured.recall < 0.5
    assert weak.measured.locality == 1.0 and weak.measured.perplexity_ratio < 1.01
    assert strong.norm > weak.norm and strong.error < weak.error
    assert done.options == replace(options, weight=done.chosen.weight)
    assert done.text().count("chosen") == 1 and len(done.to_dict()["points"]) == 2
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_bad_input_is_refused():
    facts = [(None, None)]
    for given, words in (
        (dict(facts=[]), "facts must be one or more, got none"),
        (dict(facts=facts, weights=()), "weights and clamps must be one or more"),
        (dict(facts=facts, weights=(0.0,)), "weights must be a finite number above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(None, None, probes=Probes((), ()), statistics={}, **given)
