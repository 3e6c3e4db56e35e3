"""SleepOptions as a value: what is refused, what crosses a boundary, which block writes last."""

from __future__ import annotations

import pytest
import torch

from hybrid_sleep.sleep.options import SleepOptions, last_writer


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("window", 0, "window must be an integer of at least 1, got 0"),
        ("loop", (2, 2), r"loop must be \(start, end\) with 0 <= start < end, got \(2, 2\)"),
        ("loop", [0, 2], "loop must be"),
        ("passes", "auto", "passes must be an integer of at least 1, got 'auto'"),
        ("eviction", "soft", "eviction must be one of 'hard', 'sliding', got 'soft'"),
        ("schedule", "never", "schedule must be one of 'context_windows', 'every_window'"),
        ("attention", "both", "attention must be one of 'causal', 'bidirectional', got 'both'"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SleepOptions(**{"window": 4, "loop": (0, 2), field: value})


@pytest.mark.parametrize(
    ("eviction", "held", "kept"),
    [
        ("hard", [0, 3, 9], [0, 0, 0]),
        # A token of the next window attends to itself and the three before it.
        ("sliding", [0, 2, 3, 4, 9], [0, 2, 3, 3, 3]),
    ],
)
def test_what_a_boundary_keeps(eviction, held, kept):
    options = SleepOptions(4, (0, 2), eviction=eviction)
    assert options.kept(torch.tensor(held)).tolist() == kept
    assert options.reach == (4 if eviction == "sliding" else None)


@pytest.mark.parametrize(
    ("eviction", "loop", "fast", "attention", "wanted"),
    [
        ("hard", (0, 4), [1, 3], [0, 2], 3),
        # Nothing that survives depends on the attention behind the last fast weights.
        ("hard", (0, 4), [0], [1, 2, 3], 0),
        ("sliding", (0, 4), [0], [1, 2, 3], 3),
        # What lies before the loop has run once and for all.
        ("hard", (2, 4), [0], [1, 2, 3], None),
        ("hard", (0, 2), [1, 5], [0], 5),
        ("sliding", (1, 2), [], [0], None),
    ],
)
def test_the_last_block_whose_state_survives(eviction, loop, fast, attention, wanted):
    options = SleepOptions(4, loop, eviction=eviction)
    assert last_writer(options, fast, attention) == wanted
