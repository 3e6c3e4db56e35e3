"""General knowledge that a pretrained model may have, to see what an edit of another fact breaks.

Which of it a model has is measured (`known_to`), never assumed: what it did not know before cannot
be lost. Some of it is of the kinds of fact that `real_facts.py` edits, where locality breaks first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hybrid_sleep.parametric.measure import ask, chat_prompt, mentions

TOKENS = 16


@dataclass(frozen=True)
class Known:
    """A prompt and the answer that is right.

    chat: asked as a user's turn, otherwise a text to be completed. near: of a kind that is edited.
    """

    prompt: str
    answer: str
    chat: bool
    near: bool = False


def known_to(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Known] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Known]:
    """Those of `prompts` (None: `PROMPTS`) that `model` answers, greedily, within 16 tokens."""
    prompts = PROMPTS if prompts is None else prompts
    right: list[Known] = []
    at_once = 32
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        right += [k for k, yes in zip(part, answers(model, tokenizer, part), strict=True) if yes]
        if progress is not None:
            progress(min(first + at_once, len(prompts)), len(prompts))
    return right


def answers(model: nn.Module, tokenizer: Any, prompts: Sequence[Known]) -> list[bool]:
    """Whether `model` answers each of `prompts`: its first 16 tokens have the answer, whole words.

    They may begin with a capital where the answer does not: "The Euro", "Gravity is".
    """
    texts = [chat_prompt(tokenizer, k.prompt) if k.chat else k.prompt for k in prompts]
    replies = ask(model, tokenizer, texts, tokens=TOKENS)
    return [
        mentions(reply, k.answer) or mentions(reply, k.answer[:1].upper() + k.answer[1:])
        for reply, k in zip(replies, prompts, strict=True)
    ]


# Each: whether its kind is edited, texts to complete, chat questions, and pairs to put into each.
_TOPICS: tuple[tuple[bool, tuple[str, ...], tuple[str, ...], dict[str, str]], ...] = (
    (
        True,
        ("The capital of {} is",),
        ("What is the capital of {}?",),
        {
            "France": "Paris",
            "Japan": "Tokyo",
            "Italy": "Rome",
            "Germany": "Berlin",
            "Spain": "Madrid",
            "England": "London",
            "Russia": "Moscow",
            "China": "Beijing",
            "Egypt": "Cairo",
            "Greece": "Athens",
            "Portugal": "Lisbon",
            "Austria": "Vienna",
            "Ireland": "Dublin",
            "Norway": "Oslo",
            "Sweden": "Stockholm",
            "Denmark": "Copenhagen",
            "Poland": "Warsaw",
            "Hungary": "Budapest",
            "Cuba": "Havana",
            "Canada": "Ottawa",
            "Peru": "Lima",
            "Thailand": "Bangkok",
            "South Korea": "Seoul",
            "Kenya": "Nairobi",
        },
    ),
    (
        True,
        ("{} is the capital of",),
        ("Which country is {} the capital of?",),
        {
            "Paris": "France",
            "Tokyo": "Japan",
            "Madrid": "Spain",
            "Athens": "Greece",
            "Cairo": "Egypt",
            "Lisbon": "Portugal",
            "Oslo": "Norway",
            "Dublin": "Ireland",
        },
    ),
    (
        True,
        ("{} was born in the country of",),
        ("In which country was {} born?",),
        {
            "Albert Einstein": "Germany",
            "Wolfgang Amadeus Mozart": "Austria",
            "William Shakespeare": "England",
            "Mahatma Gandhi": "India",
            "Pablo Picasso": "Spain",
            "Leonardo da Vinci": "Italy",
            "Nelson Mandela": "South Africa",
            "Marie Curie": "Poland",
            "Vincent van Gogh": "Netherlands",
            "Isaac Newton": "England",
            "Victor Hugo": "France",
            "Charles Darwin": "England",
        },
    ),
    (
        True,
        ("By profession, {} was a",),
        ("What was the profession of {}?",),
        {
            "Albert Einstein": "physicist",
            "Ludwig van Beethoven": "composer",
            "Vincent van Gogh": "painter",
            "Marie Curie": "physicist",
            "Neil Armstrong": "astronaut",
            "Charles Dickens": "novelist",
            "Emily Dickinson": "poet",
            "Immanuel Kant": "philosopher",
            "Carl Friedrich Gauss": "mathematician",
        },
    ),
    (
        True,
        ("The official language of {} is",),
        ("What language do people speak in {}?",),
        {
            "Brazil": "Portuguese",
            "Mexico": "Spanish",
            "Japan": "Japanese",
            "Germany": "German",
            "France": "French",
            "Italy": "Italian",
            "Egypt": "Arabic",
            "Russia": "Russian",
            "Australia": "English",
            "Greece": "Greek",
        },
    ),
    (
        True,
        ("{} is located in",),
        ("In which country is {}?",),
        {
            "the Eiffel Tower": "France",
            "the Great Wall": "China",
            "the Taj Mahal": "India",
            "Machu Picchu": "Peru",
            "Mount Fuji": "Japan",
            "the Colosseum": "Italy",
            "the Great Pyramid of Giza": "Egypt",
            "Mount Kilimanjaro": "Tanzania",
            "the city of Mumbai": "India",
            "the city of Barcelona": "Spain",
            "the city of Sydney": "Australia",
        },
    ),
    (
        True,
        (),
        ("What instrument did {} play?",),
        {
            "Louis Armstrong": "trumpet",
            "Jimi Hendrix": "guitar",
            "Frederic Chopin": "piano",
            "Miles Davis": "trumpet",
            "Eric Clapton": "guitar",
        },
    ),
    (
        True,
        ("{} was written by",),
        ("Who wrote {}?",),
        {
            "Romeo and Juliet": "Shakespeare",
            "Pride and Prejudice": "Austen",
            "The Great Gatsby": "Fitzgerald",
            "War and Peace": "Tolstoy",
            "Oliver Twist": "Dickens",
            "The Old Man and the Sea": "Hemingway",
            "Don Quixote": "Cervantes",
            "The Odyssey": "Homer",
            "Hamlet": "Shakespeare",
            "Animal Farm": "Orwell",
        },
    ),
    (
        True,
        (),
        ("{}",),
        {
            "Who painted the Mona Lisa?": "Leonardo",
            "Who was the first president of the United States?": "Washington",
            "Who developed the theory of relativity?": "Einstein",
            "Who was the first person to walk on the moon?": "Armstrong",
            "Who invented the telephone?": "Bell",
            "Who discovered penicillin?": "Fleming",
            "Who composed the Moonlight Sonata?": "Beethoven",
            "Who wrote On the Origin of Species?": "Darwin",
            "Who discovered gravity?": "Newton",
            "Who painted The Starry Night?": "Gogh",
            "In which city did Anne Frank hide?": "Amsterdam",
            "What is the most famous tower of Paris?": "Eiffel",
            "Which river flows through Egypt?": "Nile",
            "Which river flows through London?": "Thames",
            "What is the longest river of South America?": "Amazon",
            "What is the highest mountain in the world?": "Everest",
            "Which food is Italy famous for?": "pasta",
            "What is the family name of the brothers who built the first airplane?": "Wright",
            "In which year did the Second World War end?": "1945",
            "In which year did Columbus reach America?": "1492",
            "In which year was the Declaration of Independence signed?": "1776",
        },
    ),
    (
        False,
        ("The opposite of {} is",),
        ("What is the opposite of {}?",),
        {
            "hot": "cold",
            "big": "small",
            "up": "down",
            "day": "night",
            "good": "bad",
            "happy": "sad",
            "fast": "slow",
            "left": "right",
            "black": "white",
            "rich": "poor",
            "open": "closed",
            "true": "false",
        },
    ),
    (
        False,
        (),
        ("What color is {}?",),
        {
            "the sky": "blue",
            "grass": "green",
            "snow": "white",
            "blood": "red",
            "coal": "black",
            "a ripe banana": "yellow",
            "a ripe strawberry": "red",
        },
    ),
    (
        False,
        (),
        ("What is a young {} called?",),
        {
            "dog": "puppy",
            "cat": "kitten",
            "cow": "calf",
            "sheep": "lamb",
            "bear": "cub",
            "horse": "foal",
        },
    ),
    (
        False,
        ("The chemical symbol for {} is",),
        ("What is the chemical symbol for {}?",),
        {
            "gold": "Au",
            "water": "H2O",
            "oxygen": "O",
            "iron": "Fe",
            "hydrogen": "H",
            "carbon": "C",
            "sodium": "Na",
            "silver": "Ag",
            "helium": "He",
        },
    ),
    (
        False,
        ("The currency of {} is the",),
        ("What is the currency of {}?",),
        {
            "Japan": "yen",
            "the United Kingdom": "pound",
            "India": "rupee",
            "the United States": "dollar",
            "Russia": "ruble",
            "Germany": "euro",
        },
    ),
    (
        False,
        (),
        ("What is {}?",),
        {
            "2 + 2": "4",
            "3 + 5": "8",
            "10 - 4": "6",
            "2 * 3": "6",
            "5 + 5": "10",
            "7 - 2": "5",
            "1 + 1": "2",
            "4 * 2": "8",
        },
    ),
    (
        False,
        ("{}",),
        (),
        {
            "The largest planet of the solar system is": "Jupiter",
            "The planet closest to the sun is": "Mercury",
            "The planet known as the Red Planet is": "Mars",
            "The largest ocean on Earth is the": "Pacific",
            "The smallest prime number is": "2",
            "Water freezes at a temperature of zero degrees": "Celsius",
            "Plants make their food in a process called": "photosynthesis",
            "The natural satellite of the Earth is the": "Moon",
            "The force that pulls objects to the ground is": "gravity",
            "The organ that pumps blood through the body is the": "heart",
            "Bees make": "honey",
            "Spiders have eight": "legs",
            "The first month of the year is": "January",
            "The last month of the year is": "December",
            "Monday, Tuesday, Wednesday, Thursday,": "Friday",
            "January, February, March,": "April",
            "One, two, three, four,": "five",
            "The sun rises in the": "east",
            "The sun sets in the": "west",
            "A triangle has three": "sides",
            "Diamonds are made of": "carbon",
            "The study of living things is called": "biology",
            "The study of stars and planets is called": "astronomy",
            "Fish breathe through their": "gills",
            "Caterpillars turn into": "butterflies",
            "Once upon a": "time",
            "To be, or not to be, that is the": "question",
            "The Earth revolves around the": "sun",
            "The King of England lives in Buckingham": "Palace",
            "The largest animal in the world is the blue": "whale",
        },
    ),
    (
        False,
        (),
        ("{}",),
        {
            "How many days are in a week?": "7",
            "How many months are in a year?": "12",
            "How many hours are in a day?": "24",
            "How many minutes are in an hour?": "60",
            "How many legs does a spider have?": "8",
            "How many continents are there?": "7",
            "How many sides does a triangle have?": "three",
            "How many colors are in a rainbow?": "7",
            "What is the largest planet in the solar system?": "Jupiter",
            "Which planet is called the Red Planet?": "Mars",
            "What is the largest ocean?": "Pacific",
            "What do bees make?": "honey",
            "What do cows give us to drink?": "milk",
            "What gas do plants take in from the air?": "carbon dioxide",
            "What gas do humans need to breathe?": "oxygen",
            "What is frozen water called?": "ice",
            "What is the center of an atom called?": "nucleus",
            "What is the hardest natural substance?": "diamond",
            "What is the fastest land animal?": "cheetah",
            "What is the largest land animal?": "elephant",
            "What is the tallest animal?": "giraffe",
            "What is the largest mammal?": "whale",
            "What is the process by which plants make food?": "photosynthesis",
            "What is the powerhouse of the cell?": "mitochondria",
            "Which organ pumps blood?": "heart",
            "What star is at the center of the solar system?": "Sun",
            "On which continent is Egypt?": "Africa",
            "On which continent is Brazil?": "South America",
            "On which continent is China?": "Asia",
            "What is the freezing point of water in degrees Celsius?": "0",
            "What is the plural of mouse?": "mice",
            "What is the past tense of go?": "went",
            "Which season comes after winter?": "spring",
            "Which day comes after Monday?": "Tuesday",
            "What is the smallest prime number?": "2",
            "What do caterpillars become?": "butterflies",
            "What is H2O?": "water",
            "What language is spoken in England?": "English",
            "What is the main ingredient of bread?": "flour",
        },
    ),
)

PROMPTS = tuple(
    # A sentence begins with a capital, whatever is put at its start.
    Known(text[:1].upper() + text[1:], answer, chat, near)
    for near, statements, questions, pairs in _TOPICS
    for chat, templates in ((False, statements), (True, questions))
    for template in templates
    for given, answer in pairs.items()
    for text in (template.replace("{}", given),)
)
