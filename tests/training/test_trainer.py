"""Training end to end on a tiny model: depths, batches, rates, reports, accuracy."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.eval import tasks
from hybrid_sleep.eval.tasks.accuracy import measure_accuracy
from hybrid_sleep.sleep import forward
from hybrid_sleep.training import optimizer
from hybrid_sleep.training.config import load_run_config, run_config
from hybrid_sleep.training.data import HeldOut, TaskBatches
from hybrid_sleep.training.depth import Uniform, parse_depth
from hybrid_sleep.training.folder import checkpoints
from hybrid_sleep.training.run import build_trainer, train
from hybrid_sleep.training.trainer import SleepTrainer

FROM_TASK = ("vocab_size", "window")  # fields of a model that its task sets


def test_a_step_trains_at_the_depth_of_its_seed_and_number(tmp_path, tiny):
    run = tiny.run(tmp_path, seed=3)
    seen = []
    trainer = build_trainer(run)
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: (
        seen.append((kwargs["sleep_passes"], kwargs["input_ids"].clone())) or forward(**kwargs)
    )
    trainer.train()
    assert [depth for depth, _ in seen] == [Uniform(1, 3).draw(3, step) for step in range(6)]
    batches = TaskBatches(run.load_task(), length=6, size=8, seed=3)
    assert all(torch.equal(ids, batches[i]["input_ids"]) for i, (_, ids) in enumerate(seen))


def test_depth_tied_to_difficulty_trains_each_step_on_one_difficulty(tmp_path, tiny):
    params = {"width": 4, "states": 2, "steps": [0, 1, 2]}
    content = tiny.run(tmp_path, task=params, seed=3).to_dict()
    run = run_config({**content, "sleep_passes": {"by_difficulty": {0: 1, 2: 3}}})
    task = run.load_task()
    seen = []
    trainer = build_trainer(run)
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: (
        seen.append((kwargs["sleep_passes"], kwargs["input_ids"].clone())) or forward(**kwargs)
    )
    trainer.train()
    for depth, ids in seen:
        assert {task.parse(row)["steps"] for row in ids.tolist()} == {0 if depth == 1 else 2}
    assert {depth for depth, _ in seen} == {1, 3}
    message = r"sleep_passes: difficulty must .*steps=\[0, 1, 2\], got 3"
    with pytest.raises(ValueError, match=message):
        run_config({**content, "sleep_passes": {"by_difficulty": {3: 1}}})


@pytest.mark.parametrize(
    "levels", [{1: [1, 2], 4: [1, 4]}, {1: [1], 4: [1, 2, 4]}, {3: [[1], [2, 4]]}]
)
def test_depths_at_once_are_the_mean_of_their_labels(tmp_path, tiny, levels):
    """The gradient of a step is that of each group alone, on the same contexts and in rows of its
    own length, averaged over labels."""
    params = {"wires": 3, "levels": 4}
    content = tiny.run(tmp_path, task={"width": 4}, steps=1, warmup=0).to_dict()
    content |= {"task": {"name": "circuit", "params": params}}
    content["model"] = {k: v for k, v in content["model"].items() if k not in FROM_TASK}
    content = {**content, "sleep_passes": {"at_once": levels}}
    policy = parse_depth(content["sleep_passes"])
    depths, asked_of = policy.draw(0, 0), policy.asked(0, 0)
    trainer = build_trainer(run_config(content))
    task, model = trainer.train_dataset.task, trainer.model
    limited = [task.only(*some) for some in asked_of]

    def forward(*args, given=model.forward, **kwargs):
        assert kwargs["sleep_passes"] == depths
        one, other = groups = kwargs["input_ids"].chunk(2)
        assert torch.equal(one[:, : task.nodes], other[:, : task.nodes])
        for ids, own, some in zip(groups, limited, asked_of, strict=True):
            for row in ids.tolist():
                found = own.parse(row[: own.length])["queries"]
                assert {level for level, _, _ in found} == {*some}
        return given(*args, **kwargs)

    model.forward = forward
    batch = trainer.train_dataset[0]
    model.train()
    trainer.compute_loss(model, dict(batch)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    del model.forward
    by_depth = trainer.losses.summary()["loss_by_depth"]
    labels = int((batch["labels"] != -100).sum())
    means = {depth: [0.0, 0] for depth in depths}
    for depth, own, part in zip(depths, limited, (slice(8), slice(8, 16)), strict=True):
        rows = {name: tensor[part, : own.length] for name, tensor in batch.items()}
        loss = model(**rows, sleep_passes=depth, use_cache=False).loss
        count = int((rows["labels"] != -100).sum())
        (loss * count / labels).backward()
        means[depth][0] += loss.item() * count
        means[depth][1] += count
    for depth, (total, count) in means.items():
        assert by_depth[depth] == pytest.approx(total / count, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_is_refused_in_words(tmp_path, tiny):
    trainer = build_trainer(tiny.run(tmp_path))
    ids = trainer.train_dataset[0]["input_ids"]
    with pytest.raises(ValueError, match="did not return a loss from the inputs"):
        trainer.compute_loss(trainer.model.train(), {"input_ids": ids})


def test_contexts_that_several_examples_ask_about_are_read_once(tmp_path, tiny, monkeypatch):
    """As many groups as questions share a window, and learn what they learn apart."""
    content = tiny.run(tmp_path, task={"width": 4}, steps=1, warmup=0).to_dict()
    params = {"nodes": 8, "hops": [1, 2], "back": 2, "queries": 4, "apart": True}
    content |= {"task": {"name": "ancestor", "params": params}, "sleep_passes": 3}
    content["model"] = {k: v for k, v in content["model"].items() if k not in FROM_TASK}
    trainer = build_trainer(run_config(content))
    odd = {**content, "train": {**content["train"], "batch_size": 6}}
    with pytest.raises(ValueError, match="train.batch_size must be a multiple of the 4 examples"):
        run_config(odd)
    model, batch = trainer.model.train(), trainer.train_dataset[0]
    calls = []

    def counted(*args, real=forward.branch):
        calls.append((len(args[1].counts), args[2]))
        return real(*args)

    monkeypatch.setattr(forward, "branch", counted)
    trainer.compute_loss(model, dict(batch)).backward()
    assert calls == [(2, (3, 3, 3, 3))]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(**batch, sleep_passes=3, use_cache=False).loss.backward()
    assert len(calls) == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_of_a_step_are_one_batch(tmp_path, tiny, monkeypatch):
    """Same examples, same depth: accumulating in two parts gives the gradient of the whole."""
    # Where Muon orthogonalises in bfloat16, a last bit of a gradient becomes a percent of its step.
    monkeypatch.setattr(optimizer, "bfloat16_is_native", lambda device: False)
    task = tasks.load("rule110", width=4, states=2, steps=1)
    whole = TaskBatches(task, length=2, size=8, seed=0)

    class Halves(TaskBatches):
        def __getitem__(self, index):
            half = slice(4) if index % 2 == 0 else slice(4, 8)
            return {name: rows[half] for name, rows in whole[index // 2].items()}

    states = []
    for accumulate, data in ((1, whole), (2, Halves(task, length=4, size=4))):
        trainer = build_trainer(
            tiny.run(tmp_path / str(accumulate), steps=2, accumulate=accumulate, warmup=0)
        )
        trainer.train_dataset = data
        trainer.train()
        states.append(trainer.model.state_dict())
        assert trainer.last_step.tokens == 8 * task.length
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_checkpointing_of_transformers_means_our_own(tmp_path, tiny):
    built = build_trainer(tiny.run(tmp_path))
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, gradient_checkpointing=True
    )
    SleepTrainer(built.model, arguments, train_dataset=built.train_dataset).train()
    assert built.model.model.checkpointing.group == 1


def test_own_checkpointing_changes_nothing(tmp_path, tiny):
    plain = train(tiny.run(tmp_path / "plain"), progress=False)
    for granularity in ("block", "pass"):
        run = tiny.run(tmp_path / granularity, activation_checkpointing=granularity)
        recomputed = train(run, progress=False)
        tiny.assert_same(tiny.weights(recomputed.model_dir), tiny.weights(plain.model_dir))


def test_training_improves_on_the_majority_and_saves_what_it_measured(tmp_path, tiny):
    task = {"width": 3, "states": 1, "steps": 1}
    settings = {"batch_size": 64, "eval_every": 50, "lr_muon": 0.05, "lr_adamw": 0.01}
    run = tiny.run(tmp_path, task=task, steps=150, **settings)
    result = train(run, progress=False)
    majority = run.load_task().majority().exact
    assert min(result.metrics["exact"].values()) > majority + 0.2
    assert result.steps == 150
    model = HybridSleepForCausalLM.from_pretrained(result.model_dir)
    held_out = HeldOut(task=run.load_task(), depths=(1, 2, 3), count=1000, seed=0)
    again = measure_accuracy(model, held_out.task, held_out.batches(), held_out.depths)
    assert {depth: score.exact for depth, score in again.items()} == result.metrics["exact"]
    assert load_run_config(result.model_dir / "run.yaml") == run


def test_evaluating_is_what_a_user_would_do(tmp_path, tiny):
    """Against generating the answers one by one, through a cache, at each depth."""
    run = tiny.run(tmp_path)
    trainer, task = build_trainer(run), run.load_task()
    held_out = HeldOut(task=task, depths=(1, 3), count=40, seed=1, batch_size=16)
    metrics = trainer.evaluate(held_out)
    trainer.model.eval()
    batches = list(held_out.batches())
    assert [len(batch["labels"]) for batch in batches] == [16, 16, 8]
    ids = torch.cat([batch["input_ids"] for batch in batches])
    for depth in held_out.depths:
        answered = trainer.model.generate(
            ids[:, : -task.states], max_new_tokens=task.states, do_sample=False, sleep_passes=depth
        )
        exact = (answered == ids).all(1).float().mean().item()
        assert metrics[f"eval_exact_{depth}"] == pytest.approx(exact)


def test_held_out_examples_are_in_no_training_batch():
    task = tasks.load("rule110", width=24, states=4, steps=1)
    held_out = HeldOut(task=task, depths=(1,), count=1000)
    held = {tuple(row) for b in held_out.batches() for row in b["input_ids"].tolist()}
    batches = TaskBatches(task, length=40, size=64, seed=0)
    rows = [tuple(row) for i in range(40) for row in batches[i]["input_ids"].tolist()]
    assert len(held) == 1000
    assert not held & set(rows)
    assert len(set(rows)) == len(rows)
    other_rank = TaskBatches(task, length=40, size=64, seed=0, rank=1)
    assert not torch.equal(other_rank[0]["input_ids"], batches[0]["input_ids"])
    with pytest.raises(IndexError, match="batch must be in 0..39, got 40"):
        batches[40]


class Rows(Dataset):
    """An ordinary dataset of single examples."""

    def __init__(self, task):
        batch = task.batch("train", 0, 32)
        self.rows = [{name: rows[i] for name, rows in batch.items()} for i in range(32)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_the_trainer_takes_ordinary_datasets_and_keeps_the_best_checkpoint(tmp_path, tiny):
    run = tiny.run(tmp_path)
    model = build_trainer(run).model
    rows = Rows(run.load_task())
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        max_steps=6,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        remove_unused_columns=False,
        use_cpu=True,
        use_cache=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = SleepTrainer(model, arguments, sleep_passes=2, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best in checkpoints(tmp_path / "plain")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert best.name == f"checkpoint-{2 * (1 + losses.index(min(losses)))}"
    shutil.rmtree(best)
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "trapezoid"])
def test_rates_rise_and_fall_as_configured(tmp_path, schedule, tiny):
    steps, warmup, cooldown = 10, 4, 0.4
    train(
        tiny.run(tmp_path, steps=steps, warmup=warmup, cooldown=cooldown, schedule=schedule),
        progress=False,
    )
    after = {
        "constant": lambda share, left: 1.0,
        "linear": lambda share, left: 1 - share,
        "cosine": lambda share, left: (1 + math.cos(math.pi * share)) / 2,
        "trapezoid": lambda share, left: min(1.0, left / (cooldown * steps)),
    }[schedule]
    for i, record in enumerate(tiny.steps(tmp_path)):
        share = (i - warmup) / (steps - warmup)
        factor = i / warmup if i < warmup else after(share, steps - i)
        assert record["lr"] == pytest.approx({"muon": 0.02 * factor, "adamw": 0.003 * factor})


def test_bfloat16_computes_roughly_and_keeps_its_weights_in_float32(tmp_path, tiny):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        result = train(tiny.run(tmp_path / dtype, dtype=dtype, warmup=0), progress=False)
        losses[dtype] = [record["loss"] for record in tiny.steps(result.model_dir)]
        assert all(
            value.dtype == torch.float32 for value in tiny.weights(result.model_dir).values()
        )
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)


def test_progress_is_on_stderr_and_says_what_the_metrics_say(tmp_path, capfd, tiny):
    result = train(tiny.run(tmp_path, eval_every=4))
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    last = tiny.steps(tmp_path)[-2:]
    mean = sum(record["loss"] for record in last) / 2
    assert lines[-2].startswith(f"step 6/6  loss {mean:.3f}  depth {last[-1]['depth']}  ")
    assert lines[-2].endswith(" tokens/s")
    shares = ", ".join(f"{x:.3f} at depth {n}" for n, x in result.metrics["exact"].items())
    assert lines[-1] == f"step 6: exact accuracy {shares}"
