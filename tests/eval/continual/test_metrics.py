"""Metrics of continual learning on a matrix of three tasks, worked out by hand."""

from __future__ import annotations

import math

import pytest

from hybrid_sleep.eval.continual.metrics import Scores

# Row 0 before any task; task j is learned in row j + 1.
R = (
    (0.10, 0.20, 0.30),
    (0.80, 0.30, 0.20),
    (0.90, 0.70, 0.40),
    (0.50, 0.60, 0.90),
)
FLOOR, JOINT = (0.1, 0.1, 0.2), (0.8, 0.9, 0.95)
DURING = ((0.7, 0.2, 0.6), (0.65, 0.4))


@pytest.fixture
def scores():
    return Scores.of([list(row) for row in R])


def test_what_is_known_at_the_end_and_right_behind_each_task(scores):
    assert scores.tasks == 3 and scores.learned == [0.8, 0.7, 0.9]
    assert scores.average == pytest.approx((0.5 + 0.6 + 0.9) / 3)
    assert scores.learning == pytest.approx(2.4 / 3)


def test_transfer(scores):
    # (.5 - .8 + .6 - .7) / 2; the last task cannot be forgotten yet.
    assert scores.backward_transfer == pytest.approx(-0.2)
    # Task 1 before it is learned .3, task 2 .4; the floors .1 and .2.
    assert scores.forward_transfer(FLOOR) == pytest.approx((0.2 + 0.2) / 2)


def test_the_two_meanings_of_forgetting(scores):
    # From the best: .9 - .5 and .7 - .6. From what was learned: .8 - .5 and .7 - .6.
    assert scores.forgetting_from_best == pytest.approx(0.25)
    assert scores.forgetting_from_learned == pytest.approx(0.2)
    assert scores.forgetting_from_learned == -scores.backward_transfer


def test_a_task_that_ends_at_its_best_has_negative_forgetting():
    """What was scored before a task was learned, and at the end, is not what it could lose."""
    better = Scores.of([[0.95, 0.0], [0.5, 0.0], [0.7, 0.9]])
    assert better.forgetting_from_best == pytest.approx(-0.2)
    assert better.backward_transfer == pytest.approx(0.2)
    # Nor is the score right behind it one of later sleeps.
    assert better.minimum([[]]) == pytest.approx(0.7)


def test_intransigence_is_against_joint_training(scores):
    assert scores.intransigence(JOINT) == pytest.approx((0.0 + 0.2 + 0.05) / 3)


def test_retention_is_the_share_above_the_floor(scores):
    assert scores.retention() == pytest.approx([0.5 / 0.8, 0.6 / 0.7, 1.0])
    assert scores.retention(FLOOR) == pytest.approx([0.4 / 0.7, 0.5 / 0.6, 1.0])
    assert scores.retention([0.1, 0.695, 0.2])[1] is None
    assert Scores.of([[0, 0], [0.0, 0], [0.5, 1]]).retention() == [None, 1.0]


def test_the_lowest_score_during_later_sleeps(scores):
    # Task 0: .2 within, .9 and .5 behind; task 1: .4 within, .6 behind.
    assert scores.minimum(DURING) == pytest.approx((0.2 + 0.4) / 2)
    assert scores.worst_case(DURING) == pytest.approx(0.9 / 3 + 2 / 3 * 0.3)
    # The rows count where nothing was measured within, but not the one right behind the task.
    assert scores.minimum([[], []]) == pytest.approx((0.5 + 0.6) / 2)
    assert scores.minimum([*DURING, [0.0]]) == scores.minimum(DURING)


def test_a_summary_has_what_was_given(scores):
    whole = scores.summary(floor=FLOOR, joint=JOINT, during=DURING)
    assert whole == {
        "average": pytest.approx(2 / 3),
        "learning": pytest.approx(0.8),
        "backward_transfer": pytest.approx(-0.2),
        "forgetting_from_best": pytest.approx(0.25),
        "forgetting_from_learned": pytest.approx(0.2),
        "retention": pytest.approx([4 / 7, 5 / 6, 1.0]),
        "forward_transfer": pytest.approx(0.2),
        "intransigence": pytest.approx(0.25 / 3),
        "minimum": pytest.approx(0.3),
        "worst_case": pytest.approx(0.5),
    }
    short = scores.summary()
    missing = {"forward_transfer", "intransigence", "minimum", "worst_case"}
    assert short.keys() == whole.keys() - missing


def test_it_changes_nothing_that_it_is_given():
    rows = [list(row) for row in R]
    Scores.of(rows).summary(floor=FLOOR)
    assert rows == [list(row) for row in R]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "one behind each of at least 2, got 0"),
        ([[0.1], [0.2]], "one behind each of at least 2, got 2"),
        (R[1:], r"rows\[0\] must be 2 finite numbers, got \[0.8, 0.3, 0.2\]"),
        ([*R[:3], [0.5, 0.6]], r"rows\[3\] must be 3 finite numbers"),
        ([*R[:3], [0.5, math.nan, 0.9]], r"rows\[3\] must be 3 finite numbers"),
        ([*R[:3], [0.5, None, 0.9]], r"rows\[3\] must be 3 finite numbers"),
        ([*R[:3], [0.5, True, 0.9]], r"rows\[3\] must be 3 finite numbers"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Scores.of(rows)


def test_what_does_not_fit_the_matrix_is_refused(scores):
    with pytest.raises(ValueError, match="floor must be 3 finite numbers"):
        scores.forward_transfer([0.1])
    with pytest.raises(ValueError, match="floor must be 3 finite numbers"):
        scores.retention([0.1])
    with pytest.raises(ValueError, match="joint must be 3 finite numbers"):
        scores.intransigence([0.1, 0.2, math.inf])
    with pytest.raises(ValueError, match="during must be of 2 tasks, or 3 with the last, got 1"):
        scores.minimum([[0.1]])
    with pytest.raises(ValueError, match=r"during\[1\] must be 1 finite numbers"):
        scores.minimum([[0.1], [math.nan]])
