"""Every recipe for a CPU, shortened, learns more than a guess knows."""

import math
from collections import Counter
from pathlib import Path

import pytest
from marks import slow

from hybrid_sleep.training import load_run_config, train

RUNS = Path(__file__).parents[2] / "configs/runs"

# Overrides that make a recipe a matter of seconds, and by how much it must beat the majority: for
# tasks of labels, in bits per byte for text. What they reach is in the comments of the YAML.
SHORT = {
    "rule110_cpu": (
        [
            "task.params={width: 5, states: 2, steps: 1}",
            "train.steps=80",
            "train.eval_every=80",
            "train.eval_depths=[2]",
        ],
        0.1,
    ),
    "rule110_cpu_n1": (
        [
            "task.params={width: 5, states: 2, steps: 1}",
            "train.steps=80",
            "train.eval_every=80",
            "train.eval_depths=[1]",
        ],
        0.1,
    ),
    "depo_cpu": (
        [
            "task.params.hops=1",
            "train.steps=80",
            "train.eval_every=80",
            "train.eval_depths=[2]",
        ],
        0.3,
    ),
    "mqar_cpu": (
        [
            "task.params={vocab_size: 32, length: 16, pairs: 4}",
            "train.steps=100",
            "train.eval_every=100",
            "train.eval_depths=[2]",
        ],
        0.4,
    ),
    "parity_cpu": (
        [
            "task.params.prefixes=[1, 2]",
            "train.steps=60",
            "train.eval_every=60",
            "train.eval_depths=[2]",
        ],
        0.3,
    ),
    "word_problem_cpu": (
        [
            "task.params={group: S3, elements: 6, prefixes: [1, 2]}",
            "train.steps=80",
            "train.eval_every=80",
            "train.eval_depths=[2]",
        ],
        0.4,
    ),
    "ancestor_cpu": (
        [
            "task.params.hops=[1]",
            "task.params.nodes=8",
            "task.params.queries=1",
            "sleep_passes={at_once: {1: 1, 2: 1}}",
            "train.steps=120",
            "train.eval_every=120",
        ],
        0.3,
    ),
    "circuit_cpu": (
        [
            "task.params={wires: 2, levels: 1}",
            "sleep_passes=2",
            "train.steps=200",
            "train.eval_every=200",
        ],
        0.3,
    ),
    "circuit_scattered_cpu": (
        [
            "task.params={wires: 2, levels: 1, order: random}",
            "sleep_passes=2",
            "train.steps=200",
            "train.eval_every=200",
        ],
        0.3,
    ),
    "gsm_infinite_cpu": (
        [
            "model.num_hidden_layers=2",
            "model.layer_types=[full_attention, linear_attention]",
            "task.params={ops: [1, 2], length: 48, windows: 2, noise: false}",
            "sleep_passes=2",
            "train.steps=40",
            "train.eval_every=40",
        ],
        0.05,
    ),
}


@pytest.mark.parametrize("name", [n if n == "rule110_cpu" else slow(n) for n in SHORT])
def test_a_task_is_learned_beyond_the_majority(tmp_path, name):
    overrides, margin = SHORT[name]
    overrides = [*overrides, "train.eval_examples=400", f"output_dir={tmp_path}"]
    run = load_run_config(RUNS / f"{name}.yaml", overrides)
    result = train(run, progress=False)
    majority = run.load_task().majority().per_label
    assert min(result.metrics["per_label"].values()) > majority + margin
    assert (tmp_path / "run.png").stat().st_size > 0


RINGS = "task.params={width: 5, states: 2, steps: %d}"


@pytest.mark.parametrize(
    ("base", "of_base", "name", "of_recipe", "margin"),
    [
        (
            "rule110_cpu",
            [RINGS % 1, "model.window=5", "train.batch_size=64", "train.steps=60"],
            "finetune_cpu",
            [RINGS % 2, "model.window=5", "train.steps=60"],
            0.15,
        ),
        slow(
            "attention_cpu",
            [RINGS % 1, "model.window=13", "train.steps=150"],
            "two_stage_cpu",
            [
                RINGS % 1,
                "model.window=5",
                "stages=[{train.steps: 40, train.trainable: new_layers, model.eviction: hard}, "
                "{train.steps: 120}]",
            ],
            0.08,
        ),
    ],
    ids=["finetune_cpu", "two_stage_cpu"],
)
def test_a_checkpoint_is_taken_beyond_the_majority(
    tmp_path, base, of_base, name, of_recipe, margin
):
    start = tmp_path / "base"
    more = ["train.eval_every=null", f"output_dir={start}"]
    train(load_run_config(RUNS / f"{base}.yaml", [*of_base, *more]), progress=False)
    more = [f"init.checkpoint={start}", "train.eval_every=20", "train.eval_depths=[2]"]
    more += ["train.eval_examples=400", f"output_dir={tmp_path / 'out'}"]
    run = load_run_config(RUNS / f"{name}.yaml", [*of_recipe, *more])
    result = train(run, progress=False)
    assert result.metrics["exact"][2] > run.load_task().majority().exact + margin


def test_text_is_predicted_better_than_its_letters(tmp_path, capsys):
    """Against the entropy of the held-out bytes themselves, which no guess without context beats;
    and the model goes on for several windows behind a prompt."""
    source = sorted((Path(__file__).parents[2] / "kernels").rglob("*.py"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\f".join(path.read_text() for path in source))
    out = tmp_path / "out"
    overrides = [f"text.files=[{corpus}]", "text.length=128", "text.held_out=0.1"]
    overrides += ["model.window=32", "model.num_hidden_layers=2"]
    overrides += ["train.steps=30", "train.warmup=5"]
    overrides += ["train.eval_every=null", "train.eval_examples=32", f"output_dir={out}"]
    run = load_run_config(RUNS / "text_cpu.yaml", overrides)
    result = train(run, progress=False)
    counts = Counter(corpus.read_bytes())
    total = sum(counts.values())
    letters = -sum(n / total * math.log2(n / total) for n in counts.values())
    assert all(bits < letters - 0.5 for bits in result.metrics["bits_per_byte"].values())
    assert all(len(text.encode()) > 4 * 32 for text in result.samples)
    report = result.report()
    assert "bits_per_byte" in report and result.samples[0] in report
    assert result.samples[0] in (out / "samples.txt").read_text()
