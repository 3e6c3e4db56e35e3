"""A small world of people and facts about them, on which weight edits are measured.

Known people are in the training text, with every relation in every wording. Unseen ones are made
of the same first and last names, in pairs that no text ever has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib.resources import as_file, files
from typing import Any

from hybrid_sleep.eval.facts.words import (
    ASSISTANT,
    EOS,
    FIRST_NAMES,
    LAST_NAMES,
    MOODS,
    OBJECTS,
    OPENINGS,
    RELATIONS,
    SCENERY,
    SCENES,
    USER,
    build_tokenizer,
)
from hybrid_sleep.eval.tasks.base import SPLITS
from hybrid_sleep.eval.tasks.sampling import Stream, in_test
from hybrid_sleep.parametric.facts import SLOT, Fact, Relation
from hybrid_sleep.validation import check_choice, check_count

KNOWN_OF_A_NAME = 4
SENTENCES = 4  # of a line of text
OPENED = 15  # percent of statements
SHORTEST = 6  # words and marks of a sentence
WORD = re.compile(r"<\w+>|\w+|[^\w\s]+")
# What a sentence of the training text is: weights.
KINDS = ((48, "statement"), (32, "question"), (10, "negation"), (10, "scenery"))


class World:
    """People, what is true of them, and text about them; all of it follows from `seed` (>= 0).

    relations: `facts.Relation` by name. people: those that the training text is about.
    """

    def __init__(self, seed: int = 0):
        self.seed = check_count("seed", seed, minimum=0)
        self.relations: dict[str, Relation] = {relation.name: relation for relation in RELATIONS}
        stream = Stream(seed, 0)
        last = stream.shuffle(list(LAST_NAMES))
        turns = stream.distinct(len(last), KNOWN_OF_A_NAME)
        known: list[str] = []
        unseen: list[str] = []
        # Every name has as many known people, so that no name alone says whether one is known.
        for i, first in enumerate(FIRST_NAMES):
            for turn in range(len(last)):
                person = f"{first} {last[(i + turn) % len(last)]}"
                (known if turn in turns else unseen).append(person)
        self.people, self._unseen = known, unseen
        self._objects = {
            (person, name): stream.pick(OBJECTS[name])
            for person in self.people
            for name in self.relations
        }

    def known_facts(self) -> list[Fact]:
        """What the training text says, by person and relation."""
        return [Fact(person, name, value) for (person, name), value in self._objects.items()]

    def unseen_facts(self, count: int, seed: int = 0) -> list[Fact]:
        """`count` facts, each about another unseen person, with relations in turn.

        Objects are uniform, so that a model that was never told is right in 1 of 32. Raises
        ValueError for more than there are unseen people.
        """
        check_count("count", count, maximum=len(self._unseen))
        check_count("seed", seed, minimum=0)
        stream = Stream(self.seed, 1, seed)
        people = stream.shuffle(list(self._unseen))[:count]
        names = list(self.relations)
        facts = []
        for i, person in enumerate(people):
            name = names[i % len(names)]
            facts.append(Fact(person, name, stream.pick(OBJECTS[name])))
        return facts

    def texts(self, split: str, seed: int = 0, count: int = 200) -> list[str]:
        """`count` lines of the kind that the model was trained on, about known people alone.

        split: `train` for statistics, `test` for perplexity; no line of one is ever in the other.
        """
        check_choice("split", split, SPLITS)
        check_count("seed", seed, minimum=0)
        check_count("count", count)
        stream = Stream(self.seed, 2, SPLITS.index(split), seed)
        lines: list[str] = []
        while len(lines) < count:
            line = " ".join(self.sentence(stream) for _ in range(SENTENCES))
            if in_test(line) == (split == "test"):
                lines.append(line)
        return lines

    def filler(self, tokens: int, seed: int = 0, without: Collection[str] = ()) -> str:
        """Whole sentences of `tokens` tokens (>= 6) together, none about a person of `without`.

        For text that lies between a fact and its question: several windows of it, say.
        """
        check_count("tokens", tokens, minimum=SHORTEST)
        if set(self.people) <= set(without):
            raise ValueError(f"without must leave out fewer than all {len(self.people)} people")
        stream = Stream(self.seed, 3, check_count("seed", seed, minimum=0))
        sentences: list[str] = []
        left = tokens
        while left:
            sentence = self.sentence(stream)
            rest = left - len(WORD.findall(sentence))
            if (rest == 0 or rest >= SHORTEST) and not any(name in sentence for name in without):
                sentences.append(sentence)
                left = rest
        return " ".join(sentences)

    def sentence(self, stream: Stream) -> str:
        """One sentence, or one question with its answer, as the training text has them."""
        kind = stream.weighted(KINDS)
        if kind == "scenery":
            text = stream.pick(SCENERY)
            for words in (MOODS, SCENES, SCENES):
                text = text.replace(SLOT, stream.pick(words), 1)
            return text
        person = stream.pick(self.people)
        relation = stream.pick(RELATIONS)
        value = self._objects[person, relation.name]
        if kind == "question":
            text = stream.pick(relation.questions + relation.held_out_questions)
            return f"{USER} {text.replace(SLOT, person)} {ASSISTANT} {value} {EOS}"
        if kind == "statement":
            text = stream.pick(relation.statements + relation.held_out)
        else:
            assert relation.negation is not None
            text = relation.negation
            # Any but the true one, all as likely.
            value = stream.pick([other for other in OBJECTS[relation.name] if other != value])
        text = f"{text.replace(SLOT, person)} {value}."
        if stream.chance(OPENED):
            text = f"{stream.pick(OPENINGS)} {text}"
        return text

    def sentences(self) -> Iterator[str]:
        """The training text: sentences without end."""
        stream = Stream(self.seed, 4)
        while True:
            yield self.sentence(stream)


def load_world(seed: int = 0) -> tuple[Any, Any, World]:
    """The model trained on world `seed`, its tokenizer, and the world: (model, tokenizer, world).

    Weights are fp32, the same in every call; the model is in eval mode. Raises ValueError for a
    seed whose checkpoint is not installed.
    """
    import torch

    from hybrid_sleep import HybridSleepForCausalLM

    check_count("seed", seed, minimum=0)
    folder = files("hybrid_sleep.eval") / "facts" / "checkpoints"
    found = sorted(int(f.name.removeprefix("seed")) for f in folder.iterdir() if f.is_dir())
    if seed not in found:
        raise ValueError(
            f"seed must be one of {', '.join(map(str, found))}, which have been trained, got {seed}"
        )
    with as_file(folder / f"seed{seed}") as path:
        model = HybridSleepForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), build_tokenizer(), World(seed)
