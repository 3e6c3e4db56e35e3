"""Names, numbers, quotes, negation and known facts in sentences written down by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest

from hybrid_sleep.parametric.dreams.claims import (
    contradicts,
    names,
    negation_differs,
    numbers,
    order_of_claims,
    unsupported,
)
from hybrid_sleep.parametric.facts import Fact, Relation

SOURCE = (
    "Ada Byron, born in 1815, lives in Lisbon. She pays 1,250.50 euros for three rooms. "
    "Bo Chan's ship is called \"Blue Heron\" and does not sail to Oslo."
)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Ada Byron lives in Lisbon.", ["ada byron", "lisbon"]),
        ("Where does Ada Byron's aunt live? In Lisbon.", ["ada byron", "lisbon"]),
        ("Ada's Lisbon is not Bo’s Oslo", ["ada", "lisbon", "bo", "oslo"]),
        ("Lisbon, Oslo and New York-Newark", ["lisbon", "oslo", "new york newark"]),
        ("It's what I'd say. Don't ask; I won't.", []),
        ("Rooms are dear. Trains too.", ["trains"]),
        ('He said: "The ship left" (So it did).', []),
        ("the iPhone of O'Brien", ["iphone", "o'brien"]),
        ("Ada\nByron", ["ada", "byron"]),
        ("", []),
    ],
)
def test_names(text, wanted):
    found = names(text, SOURCE + " dear")
    assert [name for name, _ in found] == wanted
    for name, at in found:
        assert text.casefold()[at:].startswith(name.split()[0])


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("1,250.50 and 1250.5", ["1250.5", "1250.5"]),
        ("from 1815-12-10 on, at -5 or \u22125 degrees", ["1815", "12", "10", "-5", "-5"]),
        ("three rooms, Twenty-five euros, twenty men", ["3", "25", "20"]),
        ("one of them, B12, 1990s, 3.", ["12", "1990", "3"]),
        ("two hundred", ["2", "100"]),
        ("forty-one", ["41"]),
        ("freight, tension", []),
    ],
)
def test_numbers(text, wanted):
    assert [number for number, _ in numbers(text)] == [Decimal(x) for x in wanted]


@pytest.mark.parametrize(
    "text, missing",
    [
        ("The home of Ada Byron is Lisbon.", []),
        ("In Lisbon lives Ada, who has 3 rooms and was born in 1815.", []),
        ("Ada Byron lives in Oslo.", []),
        ("Ada Byron lives in Rome.", ["rome"]),
        ("Rome is where Ada Byron lives.", ["rome"]),
        ("Ada Chan lives in Lisbon.", ["ada chan"]),
        ("Ada Byron was born in 1816.", ["1816"]),
        ("She has four rooms.", ["4"]),
        ("She pays 1250.50 for 3 rooms.", []),
        ('The ship is called "blue heron".', []),
        ("The ship is called \u201cblue swan\u201d.", ["\u201cblue swan\u201d"]),
        ("ADA BYRON", []),
        ("A ship sails.", []),
    ],
)
def test_what_the_source_has_not(text, missing):
    assert unsupported(text, SOURCE) == missing


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Ada Byron does not live in Lisbon.", "it denies what its source does not"),
        ("Ada Byron lives in Lisbon.", None),
        ("Bo Chan's ship sails to Oslo.", "it says what its source denies"),
        ("Bo Chan doesn’t sail to Oslo.", None),
        ("She never pays.", None),
        ("She pays.", None),
        ("Nobody born in 1815 lives there.", "it denies what its source does not"),
    ],
)
def test_negation(text, wanted):
    assert negation_differs(text, SOURCE) == wanted


def test_a_denial_of_a_source_that_denies_nothing():
    assert negation_differs("It isn't so.", "It is so.") == "it denies what its source does not"
    assert negation_differs("It is so.", "It isn't so.") is None


def test_where_claims_come_first_in_the_source():
    source = "Ada met Bo in 1815, and Ada left Bo in Oslo."
    assert order_of_claims("Ada met Bo in 1815", source) == [0, 8, 14]
    assert order_of_claims("In 1815 Bo met Ada, and Rome", source) == [14, 8, 0]
    assert order_of_claims("Ada and Bo and Ada", source) == [0, 8]
    assert order_of_claims("they met", source) == []


LIVES = Relation(
    "lives in",
    statements=("{} lives in", "The home of {} is"),
    questions=("Where does {} live?",),
    held_out=("The town that {} lives in is",),
    held_out_questions=("What is the home of {}?",),
    negation="{} has never lived in",
)
ADA = Fact("Ada Byron", "lives in", "Lisbon")


@pytest.mark.parametrize(
    "text, question, against",
    [
        ("Ada Byron lives in Lisbon.", None, False),
        ("Ada Byron lives in sunny old Lisbon, far from Oslo.", None, False),
        ("Ada Byron lives in Oslo.", None, True),
        ("ada byron  lives in oslo.", None, True),
        ("Ada Byron now lives in Oslo.", None, True),
        ("Ada Byron lives in Oslo, Bo Chan in Lisbon.", None, True),
        ("Ada Byron knows Bo Chan, who lives in Oslo.", None, False),
        ("The home of Ada Byron is Oslo.", None, True),
        ("The home of Ada Byron is Lisbon.", None, False),
        ("The town that Ada Byron lives in is Oslo.", None, True),
        ("Bo Chan lives in Oslo.", None, False),
        ("Ada Byron has never lived in Lisbon.", None, True),
        ("Ada Byron has never lived in Oslo.", None, False),
        ("She has. Ada Byron lives in Lisbon. The home of Ada Byron is Oslo.", None, True),
        ("Lisbon", "Where does Ada Byron live?", False),
        ("In Oslo", "Where does Ada Byron live ?", True),
        ("In Oslo, not Lisbon", "What is the home of Ada Byron?", True),
        ("She lives in Lisbon.", "What is the home of Ada Byron?", False),
        ("Oslo", "Where does Bo Chan live?", False),
        ("Oslo", "Who is it?", False),
    ],
)
def test_a_known_fact_with_another_object(text, question, against):
    found = contradicts(text, question, [(Fact("Bo", "is", "tall"), Relation.plain("is")),
                                         (ADA, LIVES)])  # fmt: skip
    assert found == (ADA if against else None)


def test_numbers_as_objects():
    born = Fact("Ada Byron", "was born in", "1815"), Relation.plain("was born in")
    assert contradicts("Ada Byron was born in 1815.", None, [born]) is None
    assert contradicts("Ada Byron was born in 1852, not 1815.", None, [born]) == born[0]
    assert contradicts("It is known that Ada Byron was born in 18150.", None, [born]) == born[0]
