"""The integer in a free-text reply: every rule, and what each settles."""

from __future__ import annotations

import pytest

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.gsm_infinite import parse_answer, parse_set


@pytest.mark.parametrize(
    "reply, answer",
    [
        ("Answer: 12.", 12),
        ("**Answer:** 12", 12),
        ("answer = 7", 7),
        ("The answer is 12", 12),
        ("the final answer is: **1,000**", 1000),
        (r"so \boxed{12}", 12),
        (r"\boxed{1{,}000} is it", 1000),
        (r"first \boxed{3}, no, \boxed{4}. Answer: 5", 4),
        ("\boxed{6}", 6),
        ("Solution: 9", 9),
        ("A = 2; so B = 4. Answer: 4. I hope 99 helps", 4),
        ("Answer: 3. Wait. Answer: 5.", 5),
        ("It has 3 and 4, so the total is 7 of them", 7),
        ("x = 3, y = 8", 8),
        ("12", 12),
        ("there are 3 here and 15 there", 15),
        ("Answer: 12.0", 12),
        ("Answer: 12.5", None),
        ("Answer: -3", -3),
        ("Answer: $12$", 12),
        ("Answer: x = 12", 12),
        ("is 1, 2 or 3", 1),
        ("Answer: 1,2", 1),
        ("no idea", None),
        ("", None),
        # Where the number stands.
        ("Answer:\n\n12", 12),
        ("_Answer_: 12", 12),
        ("Answer: ~12", 12),
        ("#### 12", 12),
        ("<answer>12</answer>", 12),
        ('{"answer": 12}', 12),
        ("12 is the answer.", 12),
        ("Final answer 12 (from 3 and 4)", 12),
        ("ANSWER IS TWELVE (12)", 12),
        ("Answer: There are 12 trees in all 3 farms.", 12),
        ("Answer: 12\nQuestion: 13 and 14?", 12),
        # Several numbers: an equation's result, else the first; what is denied does not count.
        ("Answer: 3 + 4 = 7", 7),
        ("Answer: x + 3 = 15", 15),
        ("Answer: 12, since 3 * 4 = 12 and 2 = 2", 12),
        ("Answer: 12 (not 3 + 4 = 7)", 12),
        ("The answer is: 12, not 13", 12),
        ("The answer is not 13 but 12.", 12),
        ("Answer: 12 or 13", 12),
        ("Answer: [12, 13]", 12),
        ("Answer: 1 234", 1),  # a plain space separates numbers, a thin one thousands
        ("Answer: 1\u202f234", 1234),
        # LaTeX; a box is one number or none.
        (r"\( 12 \)", 12),
        (r"Answer: \(12\)", 12),
        (r"Answer: \text{12}", 12),
        (r"\boxed{\text{12}}", 12),
        (r"\boxed{12 \text{ apples}}", 12),
        (r"\boxed{x = 12}", 12),
        (r"\boxed{1{,}234}", 1234),
        (r"\boxed{1\,234}", 1234),
        (r"\boxed{12", 12),  # cut off
        (r"\boxed{12, 13}", None),
        (r"\boxed{\frac{24}{2}}", None),
        (r"12 it is: \boxed{}", None),
        # Signs, units, marks, digits.
        ("**12**", 12),
        ("1,234", 1234),
        ("Answer: $1,234.00", 1234),
        ("Answer: 1.000", 1),  # a full stop is a decimal point
        ("Answer: 012", 12),
        ("Answer: 12%", 12),  # units do not count
        ("12 apples", 12),
        ("Answer: \uff11\uff12", 12),
        ("Answer: \u221212", -12),
        ("it was 3-5", 5),  # a range or a difference, not minus five
        ("(3)-5", 5),
        # No integer.
        ("twelve", None),  # digits only, as the original's scorer
        ("Answer: 1/2", None),
        ("Answer: \u00bd", None),
        ("Answer: 1e3", None),
        ("1" * 5000, None),  # a model that repeats itself
        ("There are 3 trees. Answer: unknown", None),
        ("V12, A1 and B2 hold", None),  # digits of names
    ],
)
def test_free_text_replies(reply, answer):
    assert parse_answer(reply) == answer


@pytest.mark.parametrize(
    "reply, answer",
    [
        # The first line of hashes answers; behind it is another problem.
        ("#### 12\n\nQuestion: Tom has 15 apples. How many?", 12),
        ("3 + 9 = 12\n#### 12\n\nQ: 2 and 3?\nA: 2 + 3 = 5\n#### 5", 12),
        ("#### 12\n#### 15", 12),
        ("####12 trees.", 12),
        ("#### $1,200.00", 1200),
        ("#### \u221212", -12),
        ("#### 12 and now 15 in Oak Grove = 15", 15),  # not the end of a solution
        ("#### 1. Count the trees\nThere are 7.\n#### 2. Sum\nAnswer: 9", 9),  # headings
        ("#### Step 1\nThere are 7", 7),
        ("##### 3\nAnswer: 4", 4),
        ("#### unknown", None),
        # So does `Answer:` or a box, where a next question shows that the reply is over.
        ("Answer: 12\n\nQuestion: 3 and 4?\nAnswer: 7", 12),
        (r"So \boxed{12}." "\n**Problem:** 3 and 4?\n" r"It is \boxed{7}", 12),
        ("Answer: 12\nUser: and 3 + 4?\nAnswer: 7", 12),
        ("Answer: 3. Wait, the question asks for both. Answer: 5.", 5),
        ("Question: how many of the 30?\nAnswer: 12", 12),  # the one that was asked, repeated
        ("Question 1: how many? The answer is 3.\nQuestion 2: and all? The answer is 7.", 7),
        # What would have to be worked out is no answer, unless it is.
        ("#### 10-3", None),
        ("#### 10 - 3 = 7", 7),
        ("Answer: 10-3", None),
        ("10-3", None),
        ("**10 x 3**", None),
        ("10-3=7", 7),
        ("Answer: 10 \u2212 3", None),
        ("Answer: 10 - 3 = 7", 7),
        ("Answer: 3 * 4", None),
        (r"Answer: $3 \times 4$", None),
        ("Answer: 3 x 4", None),
        ("Answer: 2^10", None),
        ("Answer: 2(3 + 4)", None),
        ("The total is 10 + 3", None),
        (r"\boxed{10-3}", None),
        ("Answer: 12 (3 + 9)", 12),
        ("Answer: 12 - as 3 were cut", 12),
        ("Answer: **12** 3 of them oaks", 12),
        ("Answer: 12\n- 3 in Oak Grove\n- 9 in Elm Hill", 12),
    ],
)
def test_replies_that_go_on(reply, answer):
    assert parse_answer(reply) == answer


@pytest.mark.parametrize(
    "reply, names",
    [
        ("Answer: V1, V2\n\nQuestion: which are 3?\nAnswer: V3", {"V1", "V2"}),
        (r"\boxed{V1}" "\nQ: and 3?\n" r"\boxed{V3}", {"V1"}),
        ("Question: which of V1 and V2?\nAnswer: V2", {"V2"}),
        ("Answer: none\nQuestion: which are 3?\nAnswer: V3", set()),
    ],
)
def test_lists_that_go_on(reply, names):
    assert parse_set(reply) == names


def test_written_solutions_parse_to_their_answers():
    task = tasks.load("gsm_infinite", ops=[1, 2, 5], d=3, length=200, windows=1, noise=False)
    for example in task.examples("train", 8, 100):
        assert parse_answer(example["meta"]["solution"]) == example["meta"]["answer"]
