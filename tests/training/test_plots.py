"""The figure of a run: that its lines are the numbers of metrics.jsonl."""

import json
import math

import pytest

from hybrid_sleep.support.plots import save_figure
from hybrid_sleep.training import plots
from hybrid_sleep.training.plots import plot_run, save_run_plot, smoothed


@pytest.fixture(autouse=True)
def _every_figure_is_drawn(monkeypatch):
    monkeypatch.setattr(plots, "save_figure", save_figure)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_records(deepest=2):
    """Twenty steps at depths in turn, loss 2 / step, evaluated twice."""
    records = []
    for step in range(1, 21):
        depth = 1 + step % deepest
        records.append({"step": step, "depth": depth, "loss": 2 / step, "lr": {"adamw": 0.1}})
        if step % 10 == 0:
            position = [0.1 * step, None, 0.3]
            records.append({"step": step, "loss_by_position": position, "loss_by_depth": {}})
            records.append({"step": step, "exact": {"1": 0.25, "2": step / 20}})
            records.append({"step": step, "perplexity": {"1": 30 - step}})
    return records


def lines(axes):
    """The points of each line, those that are not numbers left out."""
    return [
        [(x, y) for x, y in line.get_xydata().tolist() if not math.isnan(y)] for line in axes.lines
    ]


def test_lines_are_the_records(tmp_path):
    figure = plot_run(write(tmp_path / "metrics.jsonl", run_records()), majority=0.125)
    loss, exact, perplexity, position = figure.axes
    even, odd = ([(step, 2 / step) for step in range(first, 21, 2)] for first in (2, 1))
    # A window of 4 % of 20 steps holds one step, so smoothed is raw.
    assert lines(loss) == [even, even, odd, odd]
    one, two, majority = lines(exact)
    assert one == [(10, 0.25), (20, 0.25)]
    assert two == [(10, 0.5), (20, 1.0)]
    assert {y for _, y in majority} == {0.125}
    assert lines(perplexity)[0] == [(10, 20), (20, 10)]
    early, late = lines(position)
    assert early == [(pytest.approx(1 / 6), 1.0), (pytest.approx(5 / 6), 0.3)]
    assert late == [(pytest.approx(1 / 6), 2.0), (pytest.approx(5 / 6), 0.3)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1", "2"]


def test_only_what_was_recorded_has_a_panel(tmp_path):
    metrics = write(tmp_path / "metrics.jsonl", [r for r in run_records() if "loss" in r])
    with open(metrics, "a") as killed:
        killed.write('{"step": 21, "exa')
    assert len(plot_run(metrics).axes) == 1


def test_every_depth_is_told_apart(tmp_path):
    for deepest in (6, 16):
        figure = plot_run(write(tmp_path / "metrics.jsonl", run_records(deepest)))
        handles = figure.legends[0].legend_handles
        assert len(handles) == deepest
        assert len({handle.get_color() for handle in handles}) == deepest


def test_steps_at_several_depths_have_a_line_of_their_own(tmp_path):
    records = [{"step": n, "depth": [1, 4] if n > 10 else 2, "loss": n} for n in range(1, 21)]
    figure = plot_run(write(tmp_path / "metrics.jsonl", records))
    two, at_once = lines(figure.axes[0])[::2]
    assert two == [(n, n) for n in range(1, 11)]
    assert at_once == [(n, n) for n in range(11, 21)]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["2", "1, 4 at once"]


def test_smoothing_is_a_mean_of_the_steps_around():
    points = [(1, 4.0), (2, 8.0), (10, 1.0), (13, 3.0), (14, 8.0)]
    assert smoothed(points, 6) == [6.0, 6.0, 2.0, 4.0, 5.5]
    assert smoothed(points, 0) == [4.0, 8.0, 1.0, 3.0, 8.0]


def test_the_same_metrics_give_the_same_file(tmp_path):
    metrics = write(tmp_path / "metrics.jsonl", run_records())
    path = save_run_plot(metrics, tmp_path / "a", 0.5)
    assert path == tmp_path / "a" / "run.png"
    assert path.read_bytes() == save_run_plot(metrics, tmp_path / "b", 0.5).read_bytes()


def test_files_without_a_run_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics_path must be a run's metrics.jsonl, got"):
        plot_run(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="metrics_path must hold training steps, got none in"):
        plot_run(write(tmp_path / "metrics.jsonl", [{"step": 1, "exact": {}}]))
