"""The small world of facts: what its texts may say, and that the committed models know it."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hybrid_sleep.eval import facts
from hybrid_sleep.eval.facts.accuracy import KINDS, accuracy, prompts
from hybrid_sleep.eval.facts.train import Recipe, batches, train
from hybrid_sleep.eval.facts.words import (
    FIRST_NAMES,
    LAST_NAMES,
    OBJECTS,
    RELATIONS,
    build_tokenizer,
)
from hybrid_sleep.eval.facts.world import World, load_world
from hybrid_sleep.support.io import read_json

SEEDS = (0, 1, 2)
GOLDEN = [
    "Dora Egger has a house in Graz.",
    "Olga Silva earns a living as a farmer.",
    "<user> Which trade is that of Ida Brandt? <assistant> brewer <eos>",
]
GOLDEN_UNSEEN = [
    "Marta Jensen lives in Prague",
    "Dora Costa works as a tailor",
    "Ada Klein plays the trumpet",
]
GOLDEN_TEXT = (
    "Hanna Jensen plays the cornet. Today Nils Vogel has a house in Leipzig. <user> Where does "
    "Boris Brandt live? <assistant> Riga <eos> A fair mill can be seen from the tower."
)


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module", params=SEEDS)
def trained(request):
    return load_world(request.param)


def training_text(world, count):
    return list(itertools.islice(world.sentences(), count))


def test_a_word_is_a_name_or_an_object_of_one_relation():
    words = [*FIRST_NAMES, *LAST_NAMES, *itertools.chain(*list(OBJECTS.values())[:3])]
    assert len(FIRST_NAMES) == len(LAST_NAMES) == 40
    assert all(len(set(objects)) == len(objects) == 32 for objects in OBJECTS.values())
    assert len(set(words)) == len(words)


def test_relations_keep_words_for_tests_alone():
    assert len(RELATIONS) == 4
    for relation in RELATIONS:
        assert len(relation.statements) >= 2 and len(relation.questions) >= 1
        assert relation.held_out and relation.held_out_questions and relation.negation


def test_people_have_a_fact_of_each_relation_and_share_names_evenly(world):
    known = world.known_facts()
    assert len(known) == 640 and len({fact.key for fact in known}) == 640
    for part in (0, 1):
        assert set(Counter(p.split()[part] for p in world.people).values()) == {4}
    assert all(fact.object in OBJECTS[fact.relation] for fact in known)


def test_unseen_facts_have_subjects_of_their_own_and_mixed_relations(world):
    unseen = world.unseen_facts(400, seed=3)
    assert len({fact.subject for fact in unseen}) == 400
    assert Counter(fact.relation for fact in unseen) == {r.name: 100 for r in RELATIONS}
    assert not {fact.subject for fact in unseen} & set(world.people)
    assert unseen[:50] == world.unseen_facts(50, seed=3) != world.unseen_facts(50, seed=4)


def test_no_text_has_an_unseen_person(world):
    pairs = {f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES}
    unseen = pairs - set(world.people)
    assert {fact.subject for fact in world.unseen_facts(len(unseen))} == unseen
    lines = training_text(world, 5_000) + world.texts("train") + world.texts("test")
    words = (re.findall(r"\w+", line) for line in [*lines, world.filler(2000)])
    said = {" ".join(pair) for line in words for pair in itertools.pairwise(line)}
    assert not said & unseen and said >= set(world.people)


def test_statements_say_what_is_true_and_negations_any_other_object(world):
    truth = {(fact.subject, fact.relation): fact.object for fact in world.known_facts()}
    patterns = [
        (relation, text, re.compile(text.replace("?", r"\?").replace("{}", r"(\w+ \w+)")))
        for relation in RELATIONS
        for text in relation.texts()
    ]
    denied, seen = Counter(), Counter()
    for sentence in training_text(world, 5_000):
        for relation, text, pattern in patterns:
            if (match := pattern.search(sentence)) is None:
                continue
            value = sentence[match.end() :].strip(" .").removeprefix("<assistant> ")
            value, true = value.removesuffix(" <eos>"), truth[match[1], relation.name]
            seen[text] += 1
            if text == relation.negation:
                assert value in OBJECTS[relation.name] and value != true
                denied[value] += 1
            else:
                assert value == true
    assert len(seen) == len(patterns) and 4_300 < seen.total() < 4_700
    assert len(denied) > 110 and max(denied.values()) < 15


def test_texts_of_the_splits_are_disjoint(world):
    texts = [set(world.texts(split, seed, 300)) for split in ("train", "test") for seed in (0, 1)]
    assert all(len(lines) == 300 for lines in texts)
    for one, other in itertools.combinations(texts, 2):
        assert not one & other


def test_the_stream_never_changes(world):
    """A committed model has learned these facts and no others."""
    assert training_text(world, 3) == GOLDEN
    assert list(map(str, world.unseen_facts(3))) == GOLDEN_UNSEEN
    assert world.texts("test", 0, 1) == [GOLDEN_TEXT]
    assert training_text(World(1), 1) != GOLDEN[:1]


def test_filler_fills_windows_and_leaves_people_out(world, tokenizer):
    for length in (6, 13, 32, 256):
        assert len(tokenizer(world.filler(length, seed=length)).input_ids) == length
    some = world.people[1:]
    text = world.filler(3000, without=some)
    assert not any(person in text for person in some) and world.people[0] in text
    with pytest.raises(ValueError, match="without must leave out fewer than all 160 people"):
        world.filler(32, without=world.people)


def test_every_text_is_in_the_vocabulary_and_comes_back(world, tokenizer):
    for text in world.texts("train") + world.texts("test"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    for fact in world.unseen_facts(40):
        for _, text in prompts(tokenizer, world, fact):
            assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    assert {len(tokenizer(o).input_ids) for o in OBJECTS["owns a"]} == {2}
    assert {len(tokenizer(o).input_ids) for o in OBJECTS["lives in"]} == {1}


def test_a_chat_reads_as_the_training_text_does(tokenizer):
    turns = [
        {"role": "system", "content": "Ada Berg lives in Lyon."},
        {"role": "user", "content": "Where does Ada Berg live?"},
        {"role": "assistant", "content": "Lyon"},
        {"role": "user", "content": "What does Ada Berg own?"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "Ada Berg lives in Lyon. <user> Where does Ada Berg live? <assistant> Lyon <eos> "
        "<user> What does Ada Berg own? <assistant>"
    )
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(text).input_ids and tokenizer.decode(ids) == text


def test_training_rows_are_full_and_the_same_again(world, tokenizer):
    first, again = (
        list(itertools.islice(batches(world, tokenizer, Recipe()), 20)) for _ in range(2)
    )
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert one["input_ids"].shape[1] % 32 == 0
        assert not (one["input_ids"] == tokenizer.pad_token_id).any()
    assert len({one["input_ids"].shape[1] for one in first}) > 1


def test_training_depends_on_the_seed_alone():
    recipe = Recipe(steps=2, tokens=64, warmup=0)
    (one, record), (same, _), (other, _) = (train(seed, recipe) for seed in (0, 0, 1))
    assert len(record.losses) == 2
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name]), name
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_a_world_without_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="seed must be one of 0, .* got 99"):
        load_world(99)


def test_the_committed_model_knows_the_known_and_no_unseen_fact(trained):
    model, tokenizer, world = trained
    known = world.known_facts()
    for some, windows, passes in ((known[::5], 0, 1), (known[::19], 1, 3)):
        right = accuracy(model, tokenizer, world, some, windows=windows, passes=passes)
        assert all(right[kind] >= 0.98 for kind in KINDS[:-1]), right
        # A guess among the objects is right in .031.
        assert right["negation"] <= 0.12
    unseen = accuracy(model, tokenizer, world, world.unseen_facts(200))
    assert all(share <= 0.1 for share in unseen.values()), unseen


def test_a_committed_model_loads_the_same_and_fits_the_code(trained):
    model, tokenizer, world = trained
    again, _, _ = load_world(world.seed)
    folder = Path(facts.__file__).parent / "checkpoints" / f"seed{world.seed}"
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, again.state_dict()[name]), name
    config = model.config
    assert (config.window, config.sleep_schedule, config.loop) == (32, "every_window", None)
    assert config.eos_token_id == tokenizer.eos_token_id and config.vocab_size == len(tokenizer)
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert saved.chat_template == tokenizer.chat_template
    record = read_json(folder / "training.json")
    assert record["recipe"] == json.loads(json.dumps(asdict(Recipe())))
    assert all(row[kind] >= 0.99 for row in record["known"] for kind in KINDS[:-1])
    assert not model.training and all(layer.mlp is not None for layer in model.model.layers)


def test_it_answers_in_chat_and_stops(trained):
    model, tokenizer, world = trained
    for fact in world.known_facts()[4:8]:
        question = world.relations[fact.relation].questions[0].replace("{}", fact.subject)
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(out[0, inputs.input_ids.shape[1] :]) == f"{fact.object} <eos>"
