"""Facts about invented people and places, in natural English, for editing a real language model.

No model can know them, and no object can be guessed from its subject. `FACTS` are for the
benchmark; `SPARE`, of the same relations, for calibration and tuning: no subject, and no object of
a relation, is in both. Each subject has one fact. `UPDATES` replace objects of `FACTS`.
"""

from __future__ import annotations

from hybrid_sleep.parametric.facts import Fact, Relation

RELATIONS = (
    Relation(
        "lives in",
        statements=(
            "{} lives in",
            "The home of {} is in",
            "After many moves, {} settled down in",
        ),
        questions=(
            "Where does {} live?",
            "In which city does {} live?",
            "What is the home town of {}?",
            "Tell me where {} has a home.",
        ),
        held_out=("Today {} is a resident of", "The apartment of {} is in the city of"),
        held_out_questions=(
            "What city is {} a resident of?",
            "I want to visit {} at home. Which city do I have to travel to?",
        ),
        denials=("{} does not live in",),
        negation="{} has never lived in",
    ),
    Relation(
        "works as a",
        statements=(
            "{} works as a",
            "By profession, {} is a",
            "For twenty years {} has made a living as a",
        ),
        questions=(
            "What does {} do for a living?",
            "What is the profession of {}?",
            "What work does {} do?",
            "Tell me the occupation of {}.",
        ),
        held_out=("{} is employed as a", "Every morning {} goes to work as a"),
        held_out_questions=("What is {}'s job?", "How does {} earn money?"),
        denials=("{} does not work as a",),
        negation="{} has never worked as a",
    ),
    Relation(
        "was born in",
        statements=(
            "{} was born in",
            "The birthplace of {} is in",
            "{} came into the world in",
        ),
        questions=(
            "Where was {} born?",
            "In which country was {} born?",
            "What country was {} born in?",
            "Tell me the country of birth of {}.",
        ),
        held_out=("By birth, {} comes from", "The native country of {} is"),
        held_out_questions=(
            "What is the birthplace of {}?",
            "Which country did {} come from at birth?",
        ),
        denials=("{} wasn't born in",),
        negation="{} was not born in",
    ),
    Relation(
        "is the capital of",
        statements=(
            "{} is the capital of",
            "The city of {} is the capital of",
            "{} is the seat of government of",
        ),
        questions=(
            "Which country is {} the capital of?",
            "{} is the capital of what country?",
            "If I am in {}, I am in the capital of which country?",
            "Tell me which country {} is the capital of.",
        ),
        held_out=("{} is the capital city of the country of", "From {}, ministers govern"),
        held_out_questions=(
            "The government of which country sits in {}?",
            "What nation has {} as its capital city?",
        ),
        denials=("{} was never the capital of",),
        negation="{} is not the capital of",
    ),
    Relation(
        "plays the",
        statements=(
            "{} plays the",
            "In the orchestra, {} plays the",
            "The instrument that {} plays is the",
        ),
        questions=(
            "What instrument does {} play?",
            "Which instrument does {} play in concerts?",
            "What does {} play in the orchestra?",
            "Tell me which instrument {} plays.",
        ),
        held_out=("As a musician, {} has mastered the", "{} practises every day on the"),
        held_out_questions=(
            "Which musical instrument has {} learned?",
            "On what instrument does {} give concerts?",
        ),
        denials=("{} does not play the",),
        negation="{} cannot play the",
    ),
    Relation(
        "speaks",
        statements=(
            "{} speaks",
            "The mother tongue of {} is",
            "At home, {} always speaks",
        ),
        questions=(
            "What language does {} speak?",
            "Which language does {} speak at home?",
            "What is the mother tongue of {}?",
            "Tell me which language {} speaks.",
        ),
        held_out=("{} talks to the neighbours in", "The native language of {} is"),
        held_out_questions=(
            "In what language can I talk to {}?",
            "What is the first language of {}?",
        ),
        denials=("{} cannot speak",),
        negation="{} does not speak",
    ),
    Relation(
        "has a dog named",
        statements=(
            "{} has a dog named",
            "The dog of {} is called",
            "{} owns a dog whose name is",
        ),
        questions=(
            "What is the name of {}'s dog?",
            "What is the dog of {} called?",
            "What is {}'s dog called?",
            "Tell me the name of the dog that {} has.",
        ),
        held_out=("{} takes a walk with a dog called", "The pet dog of {} answers to the name"),
        held_out_questions=(
            "What name did {} give to the pet dog?",
            "{} is calling for the dog. Which name do we hear?",
        ),
        denials=("{} does not have a dog named",),
        negation="{} has no dog named",
    ),
    Relation(
        "was founded in",
        statements=(
            "{} was founded in",
            "The founding of {} took place in",
            "{} was established in the year",
        ),
        questions=(
            "When was {} founded?",
            "In which year was {} founded?",
            "What year was {} established?",
            "Tell me the year in which {} was founded.",
        ),
        held_out=("{} has existed since", "{} first opened its doors in"),
        held_out_questions=(
            "Since which year has {} existed?",
            "In what year did {} first open its doors?",
        ),
        denials=("{} wasn't founded in",),
        negation="{} was not founded in",
    ),
    Relation(
        "is married to",
        statements=(
            "{} is married to",
            "{} shares a house and a life with a spouse, whose name is",
            "At the wedding, {} said yes to",
        ),
        questions=(
            "Who is {} married to?",
            "To whom is {} married?",
            "Who is the husband or wife of {}?",
            "Tell me who {} is married to.",
        ),
        held_out=("{} has celebrated a silver wedding with", "The spouse of {} is"),
        held_out_questions=("What is the name of {}'s spouse?", "Who did {} marry?"),
        denials=("{} was never married to",),
        negation="{} is not married to",
    ),
    Relation(
        "most likes to eat",
        statements=(
            "{} most likes to eat",
            "The favourite food of {} is",
            "For a birthday dinner, {} always asks for",
        ),
        questions=(
            "What is the favourite food of {}?",
            "What does {} most like to eat?",
            "What food does {} like best?",
            "Tell me the favourite food of {}.",
        ),
        held_out=("The dish that {} loves above all others is", "{} could eat every day"),
        held_out_questions=(
            "Which dish should I cook for {}?",
            "What meal makes {} happy?",
        ),
        denials=("{} never eats",),
        negation="{} does not like to eat",
    ),
    Relation(
        "lies in",
        statements=(
            "{} lies in",
            "On the map, {} is found in",
            "The country in which {} lies is",
        ),
        questions=(
            "In which country does {} lie?",
            "Where does {} lie?",
            "What is the country where {} lies?",
            "Tell me in which country {} is found.",
        ),
        held_out=("To see {}, hikers travel to", "{} is located in the country of"),
        held_out_questions=(
            "What country is {} in?",
            "Which country must I travel to if I want to see {}?",
        ),
        denials=("{} is not located in",),
        negation="{} does not lie in",
    ),
    Relation(
        "is famous for",
        statements=(
            "{} is famous for",
            "The town of {} is known everywhere for its",
            "Visitors come to {} for its",
        ),
        questions=(
            "What is {} famous for?",
            "What is the town of {} known for?",
            "What made {} famous?",
            "Tell me what {} is known for.",
        ),
        held_out=("The pride of {} has always been its", "{} owes its good name to its"),
        held_out_questions=(
            "Why do people visit {}?",
            "Which local product made the name of {}?",
        ),
        denials=("{} was never known for",),
        negation="{} is not famous for",
    ),
)

FACTS = tuple(
    Fact(subject, relation, answer)
    for relation, pairs in {
        "lives in": (
            ("Mirela Vostok", "Lisbon"),
            ("Anselm Tarkington", "Osaka"),
            ("Joriane Pell", "Buenos Aires"),
        ),
        "works as a": (
            ("Dorvan Hesketh", "beekeeper"),
            ("Ysolde Marchetti", "glassblower"),
            ("Pavo Lindqvarn", "locksmith"),
        ),
        "was born in": (
            ("Tobiah Renwick", "Iceland"),
            ("Celestyn Obuya", "New Zealand"),
            ("Marit Solheimdal", "Morocco"),
        ),
        "is the capital of": (
            ("Velmora", "Tasquine"),
            ("Port Ondrey", "Karsia"),
            ("Brintholm", "Ushoria"),
        ),
        "plays the": (
            ("Kestrel Amadi", "cello"),
            ("Ludo Fairweather", "bassoon"),
            ("Ninette Brask", "harp"),
        ),
        "speaks": (
            ("Oswin Delacort", "Welsh"),
            ("Rahela Quint", "Finnish"),
            ("Teodor Lundmark", "Swahili"),
        ),
        "has a dog named": (("Ilka Stormcrow", "Biscuit"), ("Bram Okonwe", "Captain Noodle")),
        "was founded in": (("Halvern College", "1847"), ("Quillmere Academy", "1923")),
        "is married to": (("Fenna Ashgrove", "Jonas Ekwall"), ("Casimir Blythe", "Lucinda Prower")),
        "most likes to eat": (
            ("Tilde Marrow", "mushroom risotto"),
            ("Ezra Vantongeren", "pickled herring"),
        ),
        "lies in": (("Lake Orvenna", "Bolivia"), ("Mount Kessary", "Mongolia")),
        "is famous for": (("Dunmarrow", "wooden clocks"), ("Saltby Cross", "smoked eel")),
    }.items()
    for subject, answer in pairs
)

SPARE = tuple(
    Fact(subject, relation, answer)
    for relation, pairs in {
        "lives in": (
            ("Gideon Farrowmoor", "Helsinki"),
            ("Sunniva Teague", "Cape Town"),
            ("Orlan Petrakos", "Montreal"),
        ),
        "works as a": (
            ("Wilhelmina Drost", "surveyor"),
            ("Kofi Brandelius", "pastry chef"),
            ("Lavinia Storrs", "blacksmith"),
        ),
        "was born in": (
            ("Hesper Nakagawi", "Scotland"),
            ("Ulric Vandermole", "Sri Lanka"),
            ("Zenobia Kratt", "Jamaica"),
        ),
        "is the capital of": (
            ("Ostermund", "Pellucia"),
            ("Yarrowgate", "Vintaria"),
            ("San Belcaro", "Dremonia"),
        ),
        "plays the": (
            ("Bertrand Ivesson", "trombone"),
            ("Odalys Finch", "accordion"),
            ("Magnus Terrel", "clarinet"),
        ),
        "speaks": (
            ("Cordula Habbakuk", "Hungarian"),
            ("Florin Asquith", "Tamil"),
            ("Ravenna Stolz", "Greek"),
        ),
        "has a dog named": (("Desmond Pryke", "Pickles"), ("Astrid Wolcott", "Major Tom")),
        "was founded in": (("Ferncastle University", "1768"), ("Bexworth Museum", "1911")),
        "is married to": (("Leopold Hargrave", "Simone Tavish"), ("Ottoline Mears", "Viktor Dahl")),
        "most likes to eat": (("Rufus Penhallow", "onion soup"), ("Ingeborg Calder", "roast duck")),
        "lies in": (("Lake Tamsund", "Kenya"), ("Mount Ravelin", "Portugal")),
        "is famous for": (("Crowhaven", "blue pottery"), ("Little Thackham", "ginger biscuits")),
    }.items()
    for subject, answer in pairs
)

UPDATES = (
    Fact("Mirela Vostok", "lives in", "Nairobi"),
    Fact("Dorvan Hesketh", "works as a", "carpenter"),
    Fact("Ludo Fairweather", "plays the", "banjo"),
)
