"""The demo's bookkeeping and words on a model that is hardly trained."""

from __future__ import annotations

import pytest

from hybrid_sleep.eval import demo, results, tasks
from hybrid_sleep.eval.measure.checkpoints import bench_checkpoints
from hybrid_sleep.eval.measure.depth import Baseline

REAL_RECIPE = demo.recipe


def short_recipe(seed, output_dir):
    run = REAL_RECIPE(seed, output_dir)
    run.train.steps, run.train.batch_size = 2, 8
    run.train.warmup, run.train.eval_every = 0, None
    return run


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "recipe", short_recipe)
    monkeypatch.setattr(demo, "EXAMPLES", 20)


BASE = Baseline(
    depth=1, seeds=[0, 1, 2], exact=[0.0, 0.0, 0.0],
    by_difficulty={1: [1, 1, 1], 2: [1, 0.5, 0.9], 3: [1, 0.6, 0.8], 4: [0.1, 0.15, 0.2]},
    examples_ratio=3.0, compute_ratio=1.2, command="hybrid-sleep bench depth a b c", provenance={},
)  # fmt: skip


def test_the_packaged_recipe_is_found_and_takes_seed_and_folder(tmp_path):
    run = REAL_RECIPE(7, tmp_path)
    assert run.train.seed == 7
    assert run.output_dir == str(tmp_path)
    assert run.load_task().name == "circuit"
    assert run.sleep_passes.deepest > 1
    assert run.train.threads in (1, 2)


def test_demo_writes_what_it_measured(short, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "comparison", lambda: "compared")
    monkeypatch.setattr(demo, "baseline", lambda run, compared: BASE)
    monkeypatch.setattr(demo, "on_hardest", lambda compared, variant: [0.25, 0.75])
    path = demo.run_demo(seed=3, out=tmp_path / "d", command="hybrid-sleep demo --seed 3")
    result = results.read(path, demo.DemoResult)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "accuracy.png", "results.json", "results.md", "training",
    ]  # fmt: skip
    assert result.depths == list(range(1, 7))
    (run,) = result.runs
    assert all(0 <= accuracy.exact <= 1 for accuracy in run.accuracy.values())
    task = tasks.load(result.task.name, **result.task.params)
    assert result.task.majority["exact"] == task.majority().exact
    assert 0 < result.seconds_training < result.seconds
    assert result.config["train"]["seed"] == 3
    trained = REAL_RECIPE(3, tmp_path).sleep_passes.probabilities()
    assert run.trained_depths == sorted(trained)

    # The saved model gives the same numbers again, by the other command.
    again = bench_checkpoints([tmp_path / "d" / "training"], range(1, 7), count=20)
    for depth in result.depths:
        assert again.shares("exact", depth) == result.shares("exact", depth)

    generation = result.generation
    window, prompt = generation.window, generation.prompt
    first = next(e for e in task.examples("test", 0) if e["meta"]["difficulty"][0] == 4)
    assert prompt == first["input_ids"][: task.nodes + 1]
    level, wire, value = task.parse(first["input_ids"])["queries"][0]
    asked = f"wire {wire} of level 4: {value}"
    assert (level, generation.question) == (4, asked)
    # The token of the first input with that value.
    assert generation.answer == value * task.nodes * len(task.pairs)
    assert len(generation.generated) == 3 * window
    # Each window but the last, which nothing followed, slept once.
    read = len(prompt) + len(generation.generated) - 1
    assert len(generation.reports) == (read - 1) // window >= 3
    assert all(sleep["tokens"] == window for sleep in generation.reports)
    assert all(sleep["passes"] == result.best_depth for sleep in generation.reports)

    shown = capsys.readouterr().out
    page = path.with_name("results.md").read_text()
    for text in (shown, page):
        assert "accuracy on level = 4 of 0.150 (0.100 to 0.200 over 3 seeds)" in text
        assert "trained at N = 1 alone" in text and "floor" in text
        assert "Where each window is written 4 times, N = 1 reaches 0.500 for the same" in text
        assert f"sleep 3: {window} tokens" in text
        assert f"Asked for {asked}, it says token" in text
    assert "`hybrid-sleep demo --seed 3`" in page and "hybrid-sleep bench depth a b c" in page

    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir() if p.is_file()}
    results.render(path)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir() if p.is_file()}


def test_without_the_baseline_it_says_where_it_is(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "comparison", lambda: None)
    path = demo.run_demo(seed=0, out=tmp_path)
    for text in (capsys.readouterr().out, path.with_name("results.md").read_text()):
        assert "eval/results/depth_demo" in text


def test_the_committed_baseline_belongs_to_the_recipe(tmp_path):
    """Read as the demo reads it: same task, same model, one depth; or there is none."""
    run = REAL_RECIPE(0, tmp_path)
    compared = demo.comparison()
    if compared is None:
        pytest.skip("eval/results/depth_demo is not here")
    found = demo.baseline(run, compared)
    assert found.depth == 1
    assert len(found.seeds) >= 3
    once = compared.trials("once")
    assert found.by_difficulty[4] == demo.on_hardest(compared, "once")
    assert len(once) == len(found.seeds)


@pytest.mark.parametrize("stopped, kept", [("measure", "bench depth"), ("generate", "accuracies")])
def test_interrupted_it_says_what_is_kept(short, tmp_path, monkeypatch, stopped, kept):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    place = {"measure": (demo, "measure_depth"), "generate": (demo, "generate")}[stopped]
    monkeypatch.setattr(*place, interrupt)
    with pytest.raises(KeyboardInterrupt, match=kept):
        demo.run_demo(seed=0, out=tmp_path)
    assert (tmp_path / "training" / "model.safetensors").is_file()
    assert (tmp_path / "results.json").is_file() == (stopped == "generate")
    if stopped == "generate":
        result = results.read(tmp_path / "results.json", demo.DemoResult)
        assert result.generation is None and len(result.depths) == 6


def test_a_negative_seed_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        demo.run_demo(seed=-1, out=tmp_path / "d")
    assert not (tmp_path / "d").exists()
