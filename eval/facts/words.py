"""The words of the small world of facts: names, relations, their objects, and a tokenizer."""

from __future__ import annotations

import re
from typing import Any

from hybrid_sleep.parametric.facts import Relation

FIRST_NAMES = tuple(
    "Ada Alma Anton Bela Boris Clara Dora Edgar Elsa Emil Enzo Frida Gerda Greta Hanna Hugo Ida "
    "Igor Ivan Jonas Karin Lars Lena Leo Livia Luca Magda Marta Milo Nadia Nils Olga Oskar Petra "
    "Rosa Sara Simon Tilda Vera Viktor".split()
)
LAST_NAMES = tuple(
    "Abel Adler Bauer Berg Brandt Byron Castro Conti Costa Dahl Egger Falk Ferrari Fischer Frost "
    "Gallo Haas Hansen Holm Jensen Keller Klein Lang Larsen Lindt Marino Moser Novak Olsen Pavlov "
    "Pohl Ricci Rossi Sand Silva Steiner Storm Vogel Weber Winter".split()
)
TOWNS = tuple(
    "Aarhus Athens Basel Bergen Berlin Bilbao Bologna Bremen Bruges Cork Cracow Dublin Geneva "
    "Genoa Ghent Graz Krems Leipzig Lisbon Lucerne Lyon Madrid Malmo Naples Oslo Porto Prague Riga "
    "Seville Turin Vienna Zurich".split()
)
TRADES = tuple(
    "baker barber brewer butcher carpenter chemist clerk cook cooper dentist doctor driver farmer "
    "fisher gardener glazier hunter judge lawyer mason miller nurse painter pilot plumber porter "
    "potter sailor smith tailor teacher weaver".split()
)
INSTRUMENTS = tuple(
    "accordion bagpipe balalaika banjo bassoon bugle cello clarinet cornet dulcimer fiddle flute "
    "gong guitar harmonica harp horn lute lyre mandolin oboe organ piano recorder saxophone sitar "
    "spinet trombone trumpet tuba viola zither".split()
)
COLOURS = tuple("black blue brown green grey red white yellow".split())
THINGS = tuple("bicycle boat carriage coach cart plough sledge wagon".split())
# Half of the pairs, so that either word leaves four possible others.
POSSESSIONS = tuple(
    f"{colour} {thing}"
    for i, colour in enumerate(COLOURS)
    for j, thing in enumerate(THINGS)
    if (i + j) % 2 == 0
)

RELATIONS = (
    Relation(
        "lives in",
        statements=("{} lives in", "The home of {} is in"),
        questions=("Where does {} live?", "Which town is the home of {}?"),
        held_out=("{} has a house in",),
        held_out_questions=("In which town does {} live?",),
        negation="{} has never lived in",
    ),
    Relation(
        "works as a",
        statements=("{} works as a", "The trade of {} is that of a"),
        questions=("What does {} work as?", "Which trade is that of {}?"),
        held_out=("{} earns a living as a",),
        held_out_questions=("What does {} do for a living?",),
        negation="{} has never worked as a",
    ),
    Relation(
        "plays the",
        statements=("{} plays the", "The instrument of {} is the"),
        questions=("Which instrument does {} play?", "What does {} like to play?"),
        held_out=("{} gives concerts on the",),
        held_out_questions=("On which instrument does {} give concerts?",),
        negation="{} has never played the",
    ),
    Relation(
        "owns a",
        statements=("{} owns a", "In the barn of {} stands a"),
        questions=("What does {} own?", "What stands in the barn of {}?"),
        held_out=("{} has paid for a",),
        held_out_questions=("What belongs to {}?",),
        negation="{} has never owned a",
    ),
)
OBJECTS = dict(
    zip((r.name for r in RELATIONS), (TOWNS, TRADES, INSTRUMENTS, POSSESSIONS), strict=True)
)

OPENINGS = ("Today", "Indeed,", "As we know,", "They say that")
SCENES = tuple("bridge castle chapel forest garden hill lake meadow mill river road tower".split())
MOODS = tuple("cold dark fair long old quiet small wide".split())
SCENERY = ("The {} {} lies behind the {}.", "A {} {} can be seen from the {}.")

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
USER, ASSISTANT = "<user>", "<assistant>"
# What a system message says stands in front as plain text, as statements do in the training text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% elif message['role'] == 'assistant' %}<assistant> {{ message['content'] }} <eos> "
    "{% else %}{{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer() -> Any:
    """A word for a token, of transformers' fast kind: the same one for every world.

    Punctuation is split off and put back in decoding. No bos is added; `<eos>` ends a reply.
    """
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    texts = [text for relation in RELATIONS for text in relation.texts()]
    texts += [*OPENINGS, *SCENERY, *POSSESSIONS]
    names = (FIRST_NAMES, LAST_NAMES, TOWNS, TRADES, INSTRUMENTS, SCENES, MOODS)
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s{}]+", text)}
    words |= {word for some in names for word in some}
    special = (PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT)
    vocabulary = {word: i for i, word in enumerate((*special, *sorted(words)))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    # Of word pieces it only takes that punctuation is joined to the word before it.
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
