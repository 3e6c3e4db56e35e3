"""The integer in a free-text reply: every rule, and what each settles."""

from __future__ import annotations

import pytest

from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.gsm_infinite import parse_answer


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


def test_written_solutions_parse_to_their_answers():
    task = tasks.load("gsm_infinite", ops=[1, 2, 5], d=3, length=200, windows=1, noise=False)
    for example in task.examples("train", 8, 100):
        assert parse_answer(example["meta"]["solution"]) == example["meta"]["answer"]
