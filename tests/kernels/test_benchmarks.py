"""The benchmark against transformers' fallback: what it compares, and what it writes."""

from __future__ import annotations

import json

import pytest

from hybrid_sleep.kernels.benchmarks import fallback

SHAPES = (fallback.Shape(5, 2, 2, 4), fallback.Shape(70, 1, 2, 4))


def test_it_compares_equal_results_and_writes_them(tmp_path):
    seen = []
    result = fallback.run(SHAPES, repeats=3, least_seconds=0, progress=seen.append)
    assert seen == result["rows"]
    assert len(seen) == len(SHAPES) * len(fallback.TARGETS)
    for row in seen:
        assert len(row["ours_seconds"]) == len(row["fallback_seconds"]) == 3
        assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        # Different algorithms in float32: equal, but not to the last bit.
        assert 0 < row["error"] < 1e-4
    paths = fallback.save(result, tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.md", "fallback.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert json.loads(paths[0].read_text()) == result
    assert paths[1].read_text().count("\n| 70 | 1 | 2 | 4 |") == 1


def test_the_summary_is_a_geometric_mean_that_one_slow_shape_fails():
    rows = [{"direction": "forward", "ratio": ratio} for ratio in (2.0, 4.5)]
    assert fallback._summary(rows, "forward") == {
        "geometric_mean": pytest.approx(3.0),
        "least": 2.0,
        "target": 2.0,
        "reached": True,
    }
    rows.append({"direction": "forward", "ratio": 0.99})
    assert not fallback._summary(rows, "forward")["reached"]


@pytest.mark.parametrize("flag", ["--threads", "--repeats"])
def test_bad_numbers_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        fallback.main([flag, "0"])
    assert f"{flag}: must be at least" in capsys.readouterr().err
