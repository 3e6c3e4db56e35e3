"""Training in memory, against loops written out by hand and against the Trainer."""

import copy
import math

import pytest
import torch
from small import TINY
from torch import nn

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.training import fit, optimizer_for
from hybrid_sleep.training.build import build_trainer
from hybrid_sleep.training.depth import Uniform

SIZES = {"vocab_size": 5, "window": 4, **TINY}
KEPT = 3  # the last columns, whose logits the labels of `token_batches` need


def small_model():
    torch.manual_seed(0)
    return HybridSleepForCausalLM(HybridSleepConfig(**SIZES))


def token_batches(count, rows=4):
    """Two windows and a half of tokens, of which those in the last window have labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, (count, rows, 10), generator=generator)
    labels = ids.clone()
    labels[..., :8] = -100
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


class Line(nn.Module):
    """The least that can be trained: weights `[3]`, and dropout."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(x) @ self.weight


def squares(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def points(count, rows=8):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, rows, 3, generator=generator)
    return [{"x": one, "y": one.sum(1)} for one in x]


def assert_same(one, other):
    """Bit for bit."""
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_it_is_the_loop_that_everyone_writes():
    """Bit for bit: depths of the seed, a warm-up, a cosine, clipping, AdamW, and no logit that no
    label needs."""
    model, batches, steps, warmup = small_model(), token_batches(6), 6, 2
    by_hand = copy.deepcopy(model)
    record = fit(
        model,
        batches,
        steps=steps,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        schedule="cosine",
        warmup=warmup,
        grad_clip=0.5,
        sleep_passes={"uniform": [1, 3]},
        seed=7,
    )
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        share = (step - warmup) / (steps - warmup)
        factor = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = 0.01 * factor
        optimizer.zero_grad()
        logits = by_hand(
            batch["input_ids"],
            sleep_passes=Uniform(1, 3).draw(7, step),
            supervised=batch["labels"] != -100,
            logits_to_keep=KEPT,
        ).logits
        # Each position predicts the next token, the last one nothing.
        told = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        assert (told[:, :-KEPT] == -100).all() and (told[:, -KEPT] != -100).any()
        told = told[:, -KEPT:].flatten()
        total = nn.functional.cross_entropy(logits.flatten(0, 1), told, reduction="sum")
        loss = total / (told != -100).sum()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5).item())
        optimizer.step()
        losses.append(loss.item())
    assert record.losses == losses and record.steps == 6 and record.seconds > 0
    assert record.depths == [Uniform(1, 3).draw(7, step) for step in range(6)]
    assert len(set(record.depths)) > 1 and max(norms) > 0.5
    assert_same(model, by_hand)


@pytest.mark.parametrize("lr_muon", [0.02, None])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_takes_the_steps_of_the_trainer(tmp_path, tiny, lr_muon, accumulate):
    settings = {"schedule": "trapezoid", "weight_decay": 0.1, "grad_clip": 0.3, "seed": 3}
    run = tiny.run(tmp_path, lr_muon=lr_muon, accumulate=accumulate, **settings)
    trainer = build_trainer(run)
    model = copy.deepcopy(trainer.model)
    batches = trainer.train_dataset
    trainer.train()
    record = fit(
        model,
        batches,
        steps=6,
        optimizer=optimizer_for(model, lr_muon, run.train.lr_adamw, 0.1),
        schedule="trapezoid",
        warmup=2,
        grad_clip=0.3,
        accumulate=accumulate,
        sleep_passes=run.sleep_passes,
        seed=3,
    )
    assert_same(model, trainer.model)
    assert record.losses[-1] == trainer.last_step.loss.item()
    assert len({round(loss, 6) for loss in record.losses}) == 6


def test_a_stopped_call_goes_on_where_it_was():
    """With dropout, a schedule and a loss that draws numbers itself: as if it had not stopped."""

    def noisy(model, batch):
        return squares(model, batch) * (1 + torch.rand(()))

    whole, parts, batches = Line(), Line(), points(6)
    settings = {"steps": 6, "schedule": "linear", "warmup": 1, "seed": 5}
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.1)
    expected = fit(whole, batches, noisy, optimizer=optimizer, **settings)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=0.1)
    torch.manual_seed(99)
    first = fit(
        parts,
        batches,
        noisy,
        optimizer=optimizer,
        on_step=lambda done: done.step == 2,
        **settings,
    )
    assert first.steps == 3 and optimizer.param_groups[0]["lr"] == 0.1
    rest = fit(parts, batches[3:], noisy, optimizer=optimizer, start=first.steps, **settings)
    assert first.losses + rest.losses == expected.losses and rest.steps == 6
    assert_same(parts, whole)


def test_micro_batches_are_one_batch_however_many_labels_each_has():
    whole, parts = small_model(), small_model()
    batches = token_batches(4, rows=6)
    for batch in batches:
        batch["labels"][0, 5:] = -100
    small = [
        {name: value[rows] for name, value in batch.items()}
        for batch in batches
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    settings = {"steps": 4, "grad_clip": None, "sleep_passes": 2}
    records = [
        fit(model, given, accumulate=count, **settings,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        for model, given, count in ((whole, batches, 1), (parts, small, 3))
    ]  # fmt: skip
    assert records[1].losses == pytest.approx(records[0].losses, rel=1e-6)
    for mine, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_a_penalty_in_the_loss_is_counted_once_a_step():
    """Elastic weights: the gradient is the task's and importance times distance, whatever the
    number of micro-batches."""
    importance, anchor = torch.tensor([0.0, 2.0, 8.0]), torch.tensor([1.0, -2.0, 0.5])

    def consolidating(model, batch):
        distance = model.weight - anchor
        return squares(model, batch) + (importance * distance.square()).sum() / 2

    model, rate = Line(), 0.05
    model.dropout.p = 0.0
    batches = points(20)
    fit(
        model, batches, consolidating, steps=5, accumulate=4, grad_clip=None,
        optimizer=torch.optim.SGD(model.parameters(), lr=rate),
    )  # fmt: skip
    weight = anchor.clone()
    for step in range(5):
        some = batches[4 * step : 4 * step + 4]
        x, y = (torch.cat([batch[name] for batch in some]) for name in "xy")
        task = 2 * x.T @ (x @ weight - y) / len(x)
        weight = weight - rate * (task + importance * (weight - anchor))
    torch.testing.assert_close(model.weight.detach(), weight)
    moved = (weight - anchor).abs() / (1 - anchor).abs().clamp(min=0.1)
    assert moved[2] < moved[1]


def test_a_hook_may_move_the_weights_and_ends_training():
    model, seen = Line(), []

    def pull_back(done):
        seen.append((done.step, done.depth, done.loss))
        with torch.no_grad():
            model.weight.zero_()
        return len(seen) == 2

    record = fit(model, points(4), squares, steps=4, on_step=pull_back)
    assert [step for step, *_ in seen] == [0, 1] and record.steps == 2
    assert [loss for *_, loss in seen] == record.losses
    assert not model.weight.any()


def test_what_it_found_it_leaves_as_it_was():
    model = Line()
    model.eval()
    model.weight.grad = torch.ones(3)
    twin = copy.deepcopy(model)
    before = torch.get_rng_state()
    fit(model, points(2), squares, steps=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and not model.dropout.training and model.weight.grad is None
    # The gradient that was there is in no step, and dropout was on.
    twin.train()
    fit(twin, points(2), squares, steps=2, optimizer=torch.optim.SGD(twin.parameters(), lr=0.1))
    assert twin.training and twin.dropout.training
    assert_same(model, twin)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be an integer of at least 1, got 0"),
        ({"accumulate": 2}, "batches must hold 8, accumulate of them for each step .*, got 4"),
        ({"start": 5}, "start must be at most steps=4, got 5"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"warmup": 5}, "warmup must be at most steps=4, got 5"),
        ({"cooldown": 2}, "cooldown must be a share of the steps, 0 to 1, got 2"),
        ({"schedule": "step"}, "schedule must be one of 'constant', .* got 'step'"),
        ({"grad_clip": 0}, "grad_clip must be a finite number above 0, got 0"),
        ({"sleep_passes": 0}, "sleep_passes must be an integer of at least 1, got 0"),
        ({"loss": 3}, "loss must be None or a function, got 3"),
        ({"on_step": 3}, "on_step must be None or a function, got 3"),
        ({"loss": None}, "batches must have labels where loss is None, got one of x, y"),
        ({"batches": [1, 2, 3, 4]}, "batches must hold mappings, got int"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)},
            "optimizer must be over parameters of model",
        ),
        ({"loss": lambda model, batch: model(batch["x"])}, "loss must return a scalar tensor"),
        ({"loss": lambda model, batch: 1.0}, "loss must return a scalar tensor .* got 1.0"),
        (
            {"loss": lambda model, batch: squares(model, batch) * math.inf},
            r"loss must be finite, got inf at step 1 \(sleep_passes=None\)",
        ),
    ],
    # Functions print with their address, by which processes would not collect the same tests.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named_and_change_nothing(arguments, message):
    model = Line().eval()
    before = torch.get_rng_state()
    given = {"batches": points(4), "loss": squares, "steps": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        fit(model, **given)
    assert_same(model, Line())
    assert not model.training and model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_that_end_too_early_leave_whole_steps():
    model, twin = Line(), Line()
    with pytest.raises(ValueError, match="batches must hold 6, .* got 5"):
        fit(model, iter(points(5)), squares, steps=3, accumulate=2)
    fit(twin, points(4), squares, steps=2, accumulate=2)
    assert_same(model, twin)
    assert model.training and model.weight.grad is None
