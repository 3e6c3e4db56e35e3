"""The window's curriculum: what holds when, and what is refused."""

import pytest
import yaml

from hybrid_sleep.training.curriculum import WindowSchedule, parse_windows


def test_a_window_holds_until_the_next_begins():
    config = {0: 8, 500: 16, 501: 4, 1000: 24}
    schedule = parse_windows(config)
    window, expected = None, []
    for step in range(1100):
        window = config.get(step, window)
        expected.append(window)
    assert [schedule.at(step) for step in range(1100)] == expected
    assert parse_windows(yaml.safe_load(yaml.safe_dump(schedule.to_config()))) == schedule
    assert parse_windows(schedule) is schedule
    with pytest.raises(ValueError, match="step must be an integer of at least 0, got -1"):
        schedule.at(-1)


def test_the_last_window_is_the_models_and_is_reached():
    schedule = WindowSchedule(((0, 8), (500, 16)))
    schedule.check(16, 501)
    with pytest.raises(ValueError, match="ends at 16; allowed: to end at the model's window, 24"):
        schedule.check(24, 501)
    with pytest.raises(ValueError, match="at step 500; allowed: steps below train.steps=500"):
        schedule.check(16, 500)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (24, "train.windows=24; allowed: {0: window"),
        ([8, 16], r"train.windows=\[8, 16\]; allowed"),
        ({}, "train.windows is empty; allowed: a first stage at step 0"),
        ({1: 8}, "train.windows starts at step 1; allowed"),
        ({0: 8, 5: 9, 5.5: 9}, "train.windows step must be an integer of at least 0, got 5.5"),
        ({0: 8, 9: 16, 5: 24}, "train.windows has step 5 after 9; allowed: ascending"),
        ({0: 8, 5: 0}, "train.windows from step 5 must be an integer of at least 1, got 0"),
        ({0: True}, "train.windows from step 0 must be an integer of at least 1, got True"),
    ],
)
def test_wrong_schedules_name_the_key_and_what_is_allowed(value, message):
    with pytest.raises(ValueError, match=message):
        parse_windows(value)
