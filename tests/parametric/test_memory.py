"""Memory on the small world: what it learns, what comes back, what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from editable import tiny_llama
from memories import OPEN, SURE, bits, options, same

from hybrid_sleep import SleepCache
from hybrid_sleep.parametric import workspace
from hybrid_sleep.parametric.contexts import beginnings
from hybrid_sleep.parametric.facts import Fact
from hybrid_sleep.parametric.gate import Measured, Thresholds, judge
from hybrid_sleep.parametric.probes import audit, is_healthy, measure
from hybrid_sleep.parametric.settle import spread
from hybrid_sleep.parametric.steps import health, validate
from hybrid_sleep.support.io import read_json, write_json_atomic


def healthy(model, world, facts):
    _, tokenizer, small = world
    pairs = [(fact, small.relations[fact.relation]) for fact in facts]
    return [is_healthy(result) for result in audit(model, tokenizer, pairs)]


def test_facts_are_learned_updated_forgotten_and_survive_sleep_and_restart(world, model, opened):
    _, tokenizer, small = world
    facts = small.unseen_facts(3, 7)
    first, second = facts[:2]
    before = {}
    question = small.relations[second.relation].statements[0].replace("{}", second.subject)
    with opened(model, options=options(SURE)) as memory:
        pristine = bits(model)
        before = memory.recall(question)
        assert not any(healthy(model, world, facts))
        for fact in facts:
            assert memory.learn(fact).outcome == "committed"
        assert all(healthy(model, world, facts))
        record = memory.sleep()
        assert record.outcome == "committed" and record.gate["after"]["recall"] == 1
        assert 0 < abs(record.gate["after"]["calibration"]) < 0.5
        assert all(healthy(model, world, facts))
        slept = bits(model)
        assert memory.sleep().outcome == "nothing to do"
        assert same(slept, bits(model))
        other = next(
            x.object
            for x in small.known_facts()
            if x.relation == first.relation and x.object != first.object
        )
        changed = Fact(first.subject, first.relation, other)
        memory.learn(changed)
        assert healthy(model, world, [changed, first]) == [True, False]
        memory.forget(second.subject)
        assert healthy(model, world, [changed, second, *facts[2:]]) == [True, False, True]
        assert memory.recall(question) == before
        assert [x["object"] for x in memory.explain(first.subject)] == [other]
        kept = bits(model)
    again = copy.deepcopy(world[0])
    with opened(again, options=None) as memory:
        assert same(kept, bits(again))
        memory.undo()
        memory.undo()
        assert same(slept, bits(again))
        assert healthy(again, world, facts) == [True] * 3
        for _ in range(4):
            memory.undo()
        assert same(pristine, bits(again))
        with pytest.raises(ValueError, match="must have a commit to take back"):
            memory.undo()


def test_commits_are_taken_back_as_far_as_the_options_keep_them(world, model, opened, tmp_path):
    first, second = world[2].unseen_facts(2, 7)
    with opened(model, options=replace(options(), undos=1)) as memory:
        memory.learn(first)
        memory.forget(first.subject)
        forgotten = bits(model)
        assert len([*(tmp_path / "memory").glob("commit-*")]) == 1
        memory.learn(second)
        assert [x.name[-18:-12] for x in (tmp_path / "memory").glob("commit-*")] == ["000003"]
        memory.undo()
        now = bits(model)
        assert same(now, forgotten)
        with pytest.raises(ValueError, match="files from before commit 2 .* option undos"):
            memory.undo()
        assert same(now, bits(model)) and memory.status()["commits"] == 4


def test_a_gate_that_does_not_pass_rolls_back_bit_for_bit(world, model, opened):
    facts = world[2].unseen_facts(2, 3)
    # Hasty edits: whatever the sleep does, what must not get worse does.
    strict = replace(OPEN, locality=1.0, perplexity_ratio=1.0)
    with opened(model, options=options(thresholds=strict, strengths=(1e-4, 1e-3))) as memory:
        memory.learn(facts)
        before, version = bits(model), model.config.weights_version
        for fact in facts:
            memory.learn(Fact(fact.subject, fact.relation, "Leipzig"))
        before = bits(model)
        record = memory.sleep()
        assert record.outcome == "rolled back"
        tried = record.gate["tried"]
        assert [x["strength"] for x in tried] == [1e-4, 1e-3] and all(x["failures"] for x in tried)
        assert tried[-1]["after"] == record.gate["after"] != tried[0]["after"]
        for x in tried:
            for failure in x["failures"]:
                assert f"failed at {x['strength']:g} times the weight: {failure}" in str(record)
        assert same(before, bits(model)) and model.config.weights_version > version
        assert {x.state for x in memory.facts()} == {"active", "retired"}


# By strength: measured locality, of which .9 is asked, and recall, of which .8 is.
GATES = {
    "the first that meets all": ({1: (0.7, 1.0), 3: (0.95, 1.0), 9: (1.0, 1.0)}, 3, [1, 3]),
    "none meets all: the first of what is no worse": (
        {1: (0.7, 1.0), 3: (0.8, 1.0), 9: (0.85, 1.0)}, 1, [1, 3, 9],
    ),
    "the fewest misses": ({1: (0.7, 0.6), 3: (0.8, 0.9), 9: (0.4, 0.9)}, 3, [1, 3, 9]),
    "more weight mends no recall": ({1: (0.95, 0.6)}, 1, [1]),
    "worse than before": ({1: (0.5, 1.0), 3: (0.7, 1.0), 9: (0.5, 1.0)}, 3, [1, 3, 9]),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_of_the_strengths_the_one_with_the_fewest_misses_stays(
    name, world, model, opened, monkeypatch, tmp_path
):
    measured, chosen, tried = GATES[name]
    facts = world[2].unseen_facts(2, 3)
    asked = Thresholds(recall=0.8, paraphrase=None, locality=0.9, perplexity_ratio=None)
    left = iter(tried)

    def scripted(*_):
        locality, recall = measured[next(left)]
        return Measured(recall=recall, locality=locality)

    monkeypatch.setattr(health, "measure", lambda *_: Measured(recall=0.5, locality=0.6))
    monkeypatch.setattr(validate, "measure", scripted)
    with opened(model, options=options(thresholds=asked, strengths=(1.0, 3.0, 9.0))) as memory:
        memory.learn(facts)
        record = memory.sleep()
        assert record.outcome == "committed" and next(left, None) is None
        assert [x["strength"] for x in record.gate["tried"]] == tried
        assert record.gate["after"]["locality"] == measured[chosen][0]
        assert record.why == ("" if chosen == 1 else f"at {chosen} times the weight")
        slept = bits(model)
    again = copy.deepcopy(world[0])
    left = iter([chosen])
    alone = options(thresholds=asked, strengths=(float(chosen),))
    with opened(again, folder=tmp_path / "alone", options=alone) as memory:
        memory.learn(facts)
        assert memory.sleep().outcome == "committed"
    assert same(slept, bits(again))


def test_what_fails_in_the_middle_leaves_weights_and_facts(world, model, opened, monkeypatch):
    facts = world[2].unseen_facts(2, 3)
    with opened(model) as memory:
        memory.learn(facts[0])
        before = bits(model)
        for broken in ("commit", "save_pristine"):
            with monkeypatch.context() as patch:

                def fail(*args, **kwargs):
                    raise OSError("no space left")

                patch.setattr(memory.store, broken, fail)
                if broken == "commit":
                    for work in (lambda: memory.learn(facts[1]), memory.sleep):
                        with pytest.raises(OSError, match="no space"):
                            work()
                        assert same(before, bits(model))
        assert [x.state for x in memory.facts()] == ["active", "pending"]
        assert memory.sleep().outcome == "committed"
        assert [x.state for x in memory.facts()] != ["active", "pending"]


def test_a_cache_from_before_an_edit_is_refused(world, model, opened, tmp_path):
    ids = torch.tensor([[5, 6, 7, 8]])
    with opened(model) as memory:
        memory.learn(world[2].unseen_facts(1, 3))
        cache = SleepCache(model.config)
        with torch.no_grad():
            model(ids, cache=cache)
        cache.save_pretrained(tmp_path / "cache")
        for change in (lambda: memory.learn(world[2].unseen_facts(2, 3)), memory.undo):
            change()
            with pytest.raises(ValueError, match="version"):
                model.sleep(cache)
            with pytest.raises(ValueError, match="weights"):
                SleepCache.from_pretrained(tmp_path / "cache", model=model)


def test_edited_models_are_ordinary_ones(world, model, opened, tmp_path):
    with opened(model) as memory:
        memory.learn(world[2].unseen_facts(2, 3))
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert same(bits(model), bits(loaded))
    # Opened with the edits in it, they can still be taken back to the last bit.
    with opened(loaded, options=None) as memory:
        memory.undo()
        assert same(bits(world[0]), bits(loaded))


def test_calibration_keeps_the_strength_and_the_front_and_touches_no_weight(
    world, model, opened, tmp_path
):
    _, _, small = world
    with opened(model, options=options(SURE)) as memory:
        before = bits(model)
        found = memory.calibrate(small.unseen_facts(2, 11), weights=(1.0, 1e6))
        assert same(before, bits(model)) and not memory.facts()
        strong, weak = (p.measured for p in sorted(found.points, key=lambda p: p.weight))
        assert strong.recall > weak.recall and strong.locality <= weak.locality
        assert memory.options.wake.weight == memory.options.night.weight == found.chosen.weight
    folder = tmp_path / "memory" / "calibration"
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "chosen" in (folder / "calibration.md").read_text()
    with opened(copy.deepcopy(world[0]), options=None) as memory:
        assert memory.options.night.weight == found.chosen.weight
        with pytest.raises(ValueError, match="probes must be one or more"):
            memory.calibrate([])


def test_keys_are_counted_on_plain_words_of_a_relation_too(world, model, opened, monkeypatch):
    _, tokenizer, small = world
    behind, write = [], workspace.own_samples
    monkeypatch.setattr(
        workspace,
        "own_samples",
        lambda *args, **given: behind.extend(given.get("behind", ())) or write(*args, **given),
    )
    fact = small.unseen_facts(1)[0]
    with opened(model, relations=[]) as memory:
        memory.learn(Fact(fact.subject, fact.relation, fact.object))
        plain = memory.relation(fact.relation)
    wanted = beginnings(tokenizer, [plain])
    assert wanted and behind[-len(wanted) :] == wanted


def test_a_model_is_unedited_in_the_middle_of_a_trial_too(world, model, opened):
    first, second = world[2].unseen_facts(2)
    with opened(model) as memory:
        pristine = bits(model)
        memory.learn(first)
        edited = bits(model)
        with memory.trial():
            memory.edited.materialise([])
            with memory.unedited(), memory.unedited(pristine=True):
                assert same(pristine, bits(model))
            # What the trial had put there, not what the memory holds.
            assert same(pristine, bits(model))
        assert same(edited, bits(model))
        with memory.unedited():
            with memory.unedited(pristine=True):
                pass
            assert same(pristine, bits(model))
        assert same(edited, bits(model))


def test_what_is_counted_already_is_not_written_again(world, model, opened, monkeypatch):
    first, second = world[2].unseen_facts(2)
    with opened(model) as memory:
        memory.learn(first)
        (memory.folder / "statistics/texts.json").unlink()
    monkeypatch.setattr(workspace, "own_samples", lambda *a, **k: pytest.fail("drew samples"))
    with opened(model) as memory:
        assert memory.learn(second).outcome == "committed"


def test_deep_models_share_a_change_among_layers():
    for depth, wanted in ((4, (3,)), (19, (3,)), (20, (2, 3)), (30, (1, 2, 3)), (60, (0, 1, 2, 3))):
        assert spread(tiny_llama(num_hidden_layers=depth), 3) == wanted


def test_where_nothing_is_said_a_place_is_found(world, model, opened, tmp_path):
    asked = options(SURE, layers=None)
    with opened(model, options=asked) as memory:
        memory.learn(world[2].unseen_facts(1, 4))
        assert memory.options.layers is not None
        told = read_json(tmp_path / "memory" / "located.json")
        assert told["layer"] == memory.options.layers[0]
        assert told["position"] == memory.options.wake.position == "prompt_last"
        best = max(told["table"], key=lambda one: one["held_out"])
        assert best["held_out"] - 0.02 <= next(
            one["held_out"]
            for one in told["table"]
            if (one["layer"], one["position"]) == (told["layer"], told["position"])
        )


def test_over_the_cap_what_is_worth_least_is_given_up(world, model, opened):
    facts = world[2].unseen_facts(3, 3)
    with opened(model, options=options(cap=2)) as memory:
        memory.learn(facts)
        record = memory.sleep()
        states = [x.state for x in memory.facts()]
        assert states.count("retired") == 1 and len(record.dropped) == 1
        assert memory.pressure().terms["load"] <= 1


def test_what_cannot_be_held_is_quarantined_and_named(world, model, opened):
    facts = world[2].unseen_facts(2, 3)
    tight = options()
    tight = replace(
        tight,
        wake=replace(tight.wake, hopeless=1e-9),
        night=replace(tight.night, hopeless=1e-9),
    )
    with opened(model, options=tight) as memory:
        before = bits(model)
        record = memory.learn(facts[0])
        assert list(record.dropped) == [str(facts[0])] and same(before, bits(model))
        assert memory.sleep().dropped and same(before, bits(model))
        assert [x.state for x in memory.facts()] == ["quarantined"]


def test_bad_input_is_refused_before_anything_changes(world, model, opened, tmp_path):
    fact = world[2].unseen_facts(1, 3)[0]
    with opened(model) as memory:
        memory.learn(fact)
        before, commits = bits(model), memory.status()["commits"]
        for given, message in (
            ("", "facts must be"),
            ("it rains", "facts must read"),
            ([fact, Fact(fact.subject, fact.relation, "Leipzig")], "contradict each other"),
        ):
            with pytest.raises(ValueError, match=message):
                memory.learn(given)
        with pytest.raises(ValueError, match="subject must have words"):
            Fact("", "lives in", "Leipzig")
        with pytest.raises(ValueError, match="subject must be of a fact"):
            memory.forget("Nobody Known")
        with pytest.raises(BlockingIOError):
            opened(copy.deepcopy(world[0]))
        assert same(before, bits(model)) and memory.status()["commits"] == commits
        assert len(memory.facts()) == 1
    stranger = copy.deepcopy(world[0])
    with torch.no_grad():
        stranger.lm_head.weight[0, 0] += 1
    before = bits(stranger)
    with pytest.raises(ValueError, match="model must have the weights"):
        opened(stranger)
    assert same(before, bits(stranger))
    with pytest.raises(ValueError, match="layer must be one with a site"):
        with opened(model, tmp_path / "other", options=options(layers=(9,))) as memory:
            memory.learn(fact)


def test_two_runs_are_the_same_and_do_not_leak(world, opened, tmp_path):
    facts = world[2].unseen_facts(3, 5)
    found = []
    for name in "ab":
        model = copy.deepcopy(world[0])
        with opened(model, tmp_path / name) as memory:
            for fact in facts:
                memory.learn(fact)
            memory.sleep()
        found.append(bits(model))
    assert same(*found)


def test_a_gate_needs_possible_thresholds():
    wrong = {"recall": 1.5, "locality": -0.1, "perplexity_ratio": 0.5, "calibration": -0.01}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            Thresholds(**{name: value})


def test_calibration_may_rise_so_far_above_the_pristine_model():
    asked = replace(OPEN, calibration=0.05)

    def failures(old, new):
        return judge(Measured(calibration=old), Measured(calibration=new), asked).failures

    assert failures(0.0, 0.05) == failures(-0.2, 0.04) == failures(0.3, 0.2) == ()
    assert failures(0.01, 0.06) == ("calibration 0.060 is above 0.05, 0.010 before",)
    # Ten nights of a little each are one too many.
    assert not failures(0.03, 0.045) and failures(0.045, 0.055)


def test_a_folder_from_before_calibration_was_measured_is_asked_once_more(
    world, model, opened, tmp_path
):
    with opened(model) as memory:
        first = memory.baseline
        now = measure(model, world[1], [], memory.probes, memory.baseline)
        # Nothing has changed yet.
        assert (now.calibration, now.perplexity_ratio) == (0, 1)
    path = tmp_path / "memory" / "baseline.json"
    kept = read_json(path)
    assert 0 < kept.pop("calibration_error") < 1
    write_json_atomic(path, kept)
    with opened(model) as memory:
        assert memory.baseline == first
