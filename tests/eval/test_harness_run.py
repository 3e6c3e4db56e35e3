"""`hybrid-sleep eval`: what is refused, what is written and kept, and the numbers in it."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from small import TINY
from transformers import ByT5Tokenizer

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.measure.accuracy import measure_depth
from hybrid_sleep.eval.tasks import TASKS
from hybrid_sleep.eval.tasks.base import Majority
from hybrid_sleep.training.config import run_config

pytest.importorskip("lm_eval")

from hybrid_sleep.eval import results
from hybrid_sleep.eval.harness import run
from hybrid_sleep.eval.harness import tasks as ours
from hybrid_sleep.eval.harness.result import HarnessResult
from hybrid_sleep.eval.harness.run import run as run_eval
from hybrid_sleep.eval.harness.scores import scores
from hybrid_sleep.eval.render import harness as pages

RULE = {"width": 4, "states": 2, "steps": [1, 2]}
SEED = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint as training leaves it; its weights make it right by chance, now and then."""
    folder = tmp_path_factory.mktemp("trained")
    task = tasks.load("rule110", **RULE)
    torch.manual_seed(5)
    config = HybridSleepConfig(
        **TINY, vocab_size=task.vocab_size, window=task.window, initializer_range=0.6
    )
    HybridSleepForCausalLM(config).save_pretrained(folder)
    content = {
        "model": TINY,
        "task": {"name": "rule110", "params": RULE},
        "train": {"steps": 60, "batch_size": 32, "device": "cpu"},
        "sleep_passes": {"uniform": [1, 2]},
        "output_dir": str(folder),
    }
    (folder / "run.yaml").write_text(run_config(content).to_yaml())
    return folder


def test_a_run_is_written_kept_and_shown(trained, tmp_path, monkeypatch):
    given = {"limit": 40, "batch_size": 8, "sleep_passes": "1-2", "seed": SEED, "out": tmp_path}
    steps = []
    result = run_eval(
        trained, ["hybrid_sleep_rule110"], progress=lambda *at: steps.append(at), **given
    )
    assert steps == [(1, 2), (2, 2)] and result.complete
    model = HybridSleepForCausalLM.from_pretrained(trained)
    task = tasks.load("rule110", **RULE)
    wanted = measure_depth(model, task, [1, 2], 40, SEED)
    floor, majority = task.floor(), task.majority()
    for row, depth in zip(result.rows, (1, 2), strict=True):
        exact, per_question, per_label = row.scores
        assert (exact.metric, exact.value) == ("exact", wanted[depth].exact)
        assert (per_label.metric, per_label.value) == ("per_label", wanted[depth].per_label)
        assert exact.majority == majority.exact and exact.floor is None
        assert per_label.majority == majority.per_label
        asked = {int(level): part.questions for level, part in row.by_difficulty.items()}
        assert per_question.floor == pytest.approx(
            sum(floor[level] * n for level, n in asked.items()) / 40
        )
        assert 0 < exact.interval[0] < exact.value < exact.interval[1] < 1
    path, _, _ = results.save(result, tmp_path)
    assert results.read(path, HarnessResult) == result
    assert result.provenance["lm_eval"] and result.config["train"]["steps"] == 60

    monkeypatch.setattr(run, "_evaluate", None)
    again = run_eval(trained, ["hybrid_sleep_rule110"], **given)
    assert again.rows == result.rows
    with pytest.raises(TypeError):
        run_eval(trained, ["hybrid_sleep_rule110"], **{**given, "seed": SEED + 1})

    table = pages.markdown(result)
    first = table.splitlines()[2]
    assert first.startswith(f"| hybrid_sleep_rule110 | exact | 40 |  | {majority.exact:.4f} |")
    assert f"| {wanted[1].exact:.4f} (" in first and f"| {wanted[2].exact:.4f} (" in first
    assert "accuracy by steps" in table and "Trained at depths 1, 2." in table
    axes = pages.figure(result).axes[0]
    heights = [list(line.get_ydata()) for line in axes.lines]
    assert [wanted[1].exact, wanted[2].exact] in heights
    assert any(set(ys) == {exact.majority} for ys in heights)


def test_an_interrupted_run_keeps_what_was_finished(trained, monkeypatch):
    real, calls = run._evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(run, "_evaluate", interrupted)
    result = run_eval(trained, ["hybrid_sleep_rule110"], limit=4, sleep_passes=[1, 2])
    assert [row.depth for row in result.rows] == [1] and not result.complete
    assert "Not complete" in pages.markdown(result) and pages.figure(result)


YAML = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: OUTPUT
doc_to_text: question
doc_to_target: answer
METRICS
"""


def test_own_tasks_beside_ours_and_a_model_of_text(tmp_path, monkeypatch):
    """A text model: bytes, no run.yaml; bits of a YAML file's texts, replies to problems."""
    # Its own is measured on thousands of problems.
    guess = Majority(exact=0.25, per_label=0.5)
    monkeypatch.setattr(TASKS["gsm_infinite"], "floor", lambda self: {2: 0.125})
    monkeypatch.setattr(TASKS["gsm_infinite"], "majority", lambda self: guess)
    monkeypatch.setitem(ours.TextTask.settings["generation_kwargs"], "max_gen_toks", 20)
    torch.manual_seed(0)
    config = HybridSleepConfig(**TINY, vocab_size=259, window=8, eos_token_id=1, pad_token_id=0)
    model = HybridSleepForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    texts = ["sleep well, sleep deep", "a", "the window is full"]
    data = tmp_path / "data.json"
    rows = [json.dumps({"question": "", "answer": text}) for text in texts]
    data.write_text("\n".join(rows))
    yaml = YAML.replace("DATA", str(data)).replace("CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.yaml").write_text(
        yaml.replace("OUTPUT", "loglikelihood_rolling").replace(
            "METRICS",
            "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, "
            "higher_is_better: false}]",
        )
    )
    result = run_eval(
        tmp_path / "model",
        ["own", "hybrid_sleep_gsm_infinite"],
        include_path=tmp_path,
        sleep_passes=[1, 3],
        limit=3,
        batch_size="auto",
        task_params={"gsm_infinite": {"ops": [1], "length": 64, "windows": 1, "noise": False}},
        dtype="float64",
    )
    for row in result.rows[:2]:
        bits = 0.0
        for text in texts:
            ids = [1, *(b + 3 for b in text.encode())]
            with torch.no_grad():
                logits = model.double()(torch.tensor([ids]), sleep_passes=row.depth).logits[0]
            chosen = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
            bits -= chosen.sum().item() / math.log(2)
        (score,) = row.scores
        assert score.value == pytest.approx(bits / sum(map(len, texts)), rel=1e-9)
        assert score.higher_is_better is False and score.floor is None
    assert [row.task for row in result.rows[1:3]] == ["own", "hybrid_sleep_gsm_infinite"]
    exact = result.rows[2].scores[0]
    assert (exact.metric, exact.majority, exact.documents) == ("exact", 0.25, 3)
    assert result.tasks["hybrid_sleep_gsm_infinite"].in_words is True
    assert "bits_per_byte (less is better)" in pages.markdown(result)
    # Shares and other numbers have an axis each.
    below, shares = sorted(pages.figure(result).axes, key=lambda axes: -axes.get_ylim()[1])
    assert below.get_ylabel() == "bits_per_byte" and shares.get_ylabel() == "exact"
    assert shares.get_ylim() == (0, 1.04)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ([], {}, r"tasks must be a list of one or more names, .*got \[\]"),
        ("hybrid_sleep_rule110", {}, "tasks must be a list .*got 'hybrid_sleep_rule110'"),
        (["hybrid_sleep_rule110"] * 2, {}, "each once"),
        (["hybrid_sleep_depo"], {}, "must be .*trained on, hybrid_sleep_rule110, got 'hybrid_"),
        (["hybrid_sleep_rule110"], {"num_fewshot": 2}, "num_fewshot must be 0 with .*, got 2"),
        (["hybrid_sleep_rule110"], {"limit": 0}, "limit must be an integer of at least 1, got 0"),
        (
            ["hybrid_sleep_rule110"],
            {"sleep_passes": "0"},
            "depths must be integers of at least 1, .*got '0'",
        ),
        (["hybrid_sleep_rule110"], {"seed": -1}, "seed must be an integer of at least 0, got -1"),
        (["hybrid_sleep_rule110"], {"sleep_options": {"window": 0}}, "window must be an integer"),
        (["hybrid_sleep_rule110"], {"sleep_options": {"device": 1}}, "window, .*, got device=1"),
        (["hybrid_sleep_rule110"], {"task_params": {"depo": {}}}, "params must .* got 'depo'"),
        (
            ["hybrid_sleep_rule110"],
            {"task_params": {"rule110": {"width": 1}}},
            "width must be an integer of at least 3 .*, got 1",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(trained, names, changes, message):
    with pytest.raises(ValueError, match=message):
        run_eval(trained, names, **changes)


def test_options_of_the_command_line():
    assert run.parse_task_params("rule110: {steps: 4}") == {"rule110": {"steps": 4}}
    assert run.parse_task_params('{"depo": {"hops": 2}}') == {"depo": {"hops": 2}}
    options = {"window": 256, "loop": [1, 3], "eviction": "sliding"}
    texts = ["window=256", "loop=[1, 3]", "eviction=sliding"]
    assert run.parse_sleep_options(texts) == options
    for text in ("steps=4", "rule110: 4", "{", "[]"):
        with pytest.raises(ValueError, match=r"task_params must be such as 'rule110: .*, got "):
            run.parse_task_params(text)
    for text in ("window", "=3", "device=cpu"):
        with pytest.raises(ValueError, match="(such as window=256|among window, loop, .*), got"):
            run.parse_sleep_options([text])


def test_missing_folders_are_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="a trained model, got no folder"):
        run_eval(tmp_path / "nothing", ["hybrid_sleep_rule110"])
    with pytest.raises(FileNotFoundError, match="include_path must be a folder, got .*nothing"):
        run_eval(trained, ["hybrid_sleep_rule110"], include_path=tmp_path / "nothing")


def test_a_checkpoint_of_repeated_windows_is_not_asked_with_single_ones(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "repeated")
    run = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(run.replace("repeats: 1", "repeats: 2"))
    with pytest.raises(ValueError, match="task.repeats must be 1 .* hybrid_sleep_rule110, got 2"):
        run_eval(folder, ["hybrid_sleep_rule110"], limit=2)


def test_unknown_tasks_and_data_out_of_reach(trained, tmp_path, monkeypatch):
    """Without lm-eval's own list, which takes it seconds to read."""
    real = ours.task_manager
    monkeypatch.setattr(
        ours, "task_manager", lambda *a, **k: real(*a, **{**k, "include_defaults": False})
    )
    with pytest.raises(ValueError, match=r"tasks must be among hybrid_sleep_\w+, .*got 'chess'"):
        run_eval(trained, ["chess"])
    far = "task: far\ndataset_path: nobody/nothing\ntest_split: test\n"
    (tmp_path / "far.yaml").write_text(far)
    message = "loadable, got 'far' .*: most of lm-eval's tasks fetch their data from the hub"
    with pytest.raises(ValueError, match=message):
        run_eval(trained, ["far"], include_path=tmp_path)


def test_names_are_checked_before_lm_eval_lists_its_own(tmp_path, monkeypatch):
    from importlib.machinery import ModuleSpec

    from hybrid_sleep.eval.harness.names import check_names

    package = ModuleSpec("lm_eval", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path / "lm_eval")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    folder, mine = tmp_path / "lm_eval" / "tasks" / "arc", tmp_path / "mine"
    folder.mkdir(parents=True)
    mine.mkdir()
    (folder / "arc.yaml").write_text("task: arc_easy\ninclude: _common_yaml\n")
    (folder / "_common_yaml").write_text("tag:\n  - ai2_arc\n")
    (mine / "far.yaml").write_text("task: 'far'\n")
    check_names(["arc_easy", "ai2_arc", "hybrid_sleep_rule110"])
    check_names(["far", "arc_easy"], mine)
    for name, meant in [
        ("arc_esy", "arc_easy"),
        ("arc_eas", "arc_easy"),  # a part of it
        ("hybrid_sleep_rul110", "hybrid_sleep_rule110"),
        ("rule110", "hybrid_sleep_rule110"),
    ]:
        with pytest.raises(ValueError, match=rf"tasks must .* got '{name}' .*mean {meant}"):
            check_names(["arc_easy", name])


def test_the_error_of_a_share_is_that_of_independent_examples():
    """Against drawing examples again and again."""
    generator = torch.Generator().manual_seed(0)
    of = torch.randint(1, 5, (40,), generator=generator)
    right = torch.minimum(torch.randint(0, 5, (40,), generator=generator), of)
    samples = [[[None, r, n]] for r, n in zip(right.tolist(), of.tolist(), strict=True)]
    found = {
        "results": {"t": {"per_label,none": float(right.sum() / of.sum()), "sample_len": 40}},
        "samples": {"t": [{"filter": "none", "per_label": sample} for sample in samples]},
        "higher_is_better": {},
        "n-shot": {},
        "versions": {},
    }
    (score,) = scores(found, {"2": 0.5}, {"per_label": 0.25})["scores"]
    again = torch.randint(0, 40, (20000, 40), generator=generator)
    shares = right[again].sum(1) / of[again].sum(1)
    assert score["stderr"] == pytest.approx(shares.std().item(), rel=0.06)
    assert (score["floor"], score["majority"]) == (None, 0.25)
