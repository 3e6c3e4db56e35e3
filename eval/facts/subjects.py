"""What a benchmark of facts is run on: a model, facts it cannot know, and things that it may."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_sleep.eval.facts.known import PROMPTS, Known
from hybrid_sleep.eval.facts.settings import SETTINGS, Settings
from hybrid_sleep.eval.facts.words import OBJECTS, build_tokenizer
from hybrid_sleep.eval.facts.world import World, load_world
from hybrid_sleep.eval.tasks.sampling import Stream
from hybrid_sleep.parametric.facts import SLOT, Fact, Relation
from hybrid_sleep.parametric.measure import encode
from hybrid_sleep.validation import check_count

WORLD = "world"
WORLD_LINES = 400
WORLD_KNOWN = 160
STATISTICS_TOKENS, PERPLEXITY_TOKENS = 15000, 2500
LEAST_FACTS = 2
LATER = 4  # one new fact in the second wave for so many of the first


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with what it is taught and asked.

    facts: taught first, in this order; more: in the second wave; update: replaces the object of one
    of `facts`; deleted: one of them. known: what the model may know. corpus, ordinary: rows of ids
    for key statistics and for perplexity. world: None for a real model.
    """

    path: str
    seed: int
    facts: list[Fact]
    more: list[Fact]
    update: Fact
    deleted: Fact
    relations: list[Relation]
    known: list[Known]
    corpus: list[list[int]]
    ordinary: list[list[int]]
    tokenizer: Any
    world: World | None

    def load(self) -> Any:
        """The pristine model, anew."""
        if self.world is not None:
            return load_world(self.seed)[0]
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()


def settings_of(model: str) -> Settings:
    """The settings for "world", or for any path."""
    return SETTINGS["world" if model == WORLD else "real"]


def digest_of(model: str) -> str:
    """A digest of the weights in a folder; none of the small world's, which come with the code."""
    if model == WORLD:
        return ""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def subject_of(model: str, seed: int, order: int, count: int) -> Subject:
    """The subject `model`: "world" (of `seed`) or the folder of a causal model.

    count: facts of the first wave; each `order` teaches the same ones in another order. Raises
    ValueError for fewer than two, one to update and one to delete, and for more than there are.
    """
    tokenizer = _tokenizer(model)
    world = World(seed) if model == WORLD else None
    check_count("facts", count, minimum=LEAST_FACTS)
    facts, more, relations = _of_world(world, count) if world else _of_real(count)
    facts = Stream(3, seed, order).shuffle(list(facts))
    update = _update(facts, world)
    deleted = next(fact for fact in reversed(facts) if fact.key != update.key)
    if world is not None:
        known = _known_of(world)
        corpus, ordinary = (
            [encode(tokenizer, text) for text in world.texts(split, count=WORLD_LINES)]
            for split in ("train", "test")
        )
    else:
        from hybrid_sleep.eval.facts.ordinary import ordinary_rows

        known = list(PROMPTS)
        corpus = ordinary_rows(tokenizer, "statistics", STATISTICS_TOKENS)
        ordinary = ordinary_rows(tokenizer, "perplexity", PERPLEXITY_TOKENS)
    return Subject(
        path=model,
        seed=seed,
        facts=facts,
        more=more,
        update=update,
        deleted=deleted,
        relations=relations,
        known=known,
        corpus=corpus,
        ordinary=ordinary,
        tokenizer=tokenizer,
        world=world,
    )


Parts = tuple[list[Fact], list[Fact], list[Relation]]


def _of_world(world: World, count: int) -> Parts:
    found = world.unseen_facts(count + _more(count))
    return found[:count], found[count:], list(world.relations.values())


def _of_real(count: int) -> Parts:
    from hybrid_sleep.eval.facts.real_facts import FACTS, RELATIONS, SPARE, UPDATES

    check_count("facts", count, maximum=len(FACTS))
    updated = {fact.key for fact in UPDATES}
    mixed = Stream(3).shuffle(list(FACTS))
    # Those with an update first, so that any count has one.
    mixed.sort(key=lambda fact: fact.key not in updated)
    pool = [*mixed, *Stream(4).shuffle(list(SPARE))]
    return pool[:count], pool[count : count + _more(count)], list(RELATIONS)


def _more(count: int) -> int:
    return -(-count // LATER)


def _update(facts: Sequence[Fact], world: World | None) -> Fact:
    if world is not None:
        old = facts[0]
        others = [value for value in OBJECTS[old.relation] if value != old.object]
        return Fact(old.subject, old.relation, Stream(5, world.seed).pick(others))
    from hybrid_sleep.eval.facts.real_facts import UPDATES

    taught = {fact.key for fact in facts}
    return next(fact for fact in UPDATES if fact.key in taught)


def _known_of(world: World) -> list[Known]:
    """Known facts, of every relation, half of them asked in a chat."""
    every = world.known_facts()
    found = []
    for i, fact in enumerate(Stream(6, world.seed).shuffle(every)[:WORLD_KNOWN]):
        relation, chat = world.relations[fact.relation], i % 2 == 1
        text = (relation.questions if chat else relation.statements)[0]
        found.append(Known(text.replace(SLOT, fact.subject), fact.object, chat, near=True))
    return found


def _tokenizer(model: str) -> Any:
    if model == WORLD:
        return build_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
