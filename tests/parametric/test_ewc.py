"""What holds weights, against closed forms; each published mistake is a test of its own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from continual import Bowl, Softmax, bowl, randn
from editable import VOCAB, tiny_hybrid, tiny_llama
from small import small_ids
from torch import nn
from transformers import Trainer, TrainingArguments

from hybrid_sleep.parametric import durable
from hybrid_sleep.parametric.ewc import L2, OnlineEWC, SynapticIntelligence
from hybrid_sleep.parametric.fisher import Fisher, estimate_fisher
from hybrid_sleep.parametric.guard import GuardCallback, trained_groups
from hybrid_sleep.sleep.weights import bump_version, rollback, snapshot, weights_digest
from hybrid_sleep.training import fit, optimizer_for

H = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)


def fisher_of(model, **values):
    return Fisher({n: x.float() for n, x in values.items()}, 1, 1, {}, weights_digest(model))


def held(strength=3.0, start=None, importance=H, **options):
    """A bowl anchored at `start` with the importance as it is given."""
    model = Bowl(torch.zeros(4) if start is None else start)
    guard = OnlineEWC(model, strength, normalise=False, **options)
    guard.consolidate(fisher_of(model, w=importance))
    return model, guard


def train(model, guard, target, h=H, steps=400, lr=0.4, optimizer=None):
    optimizer = optimizer or torch.optim.SGD([model.w], lr=lr)
    with guard.guarding(optimizer):
        task = {"h": h, "target": target}
        fit(model, [task] * steps, bowl, steps=steps, optimizer=optimizer, grad_clip=None)


def test_o4_penalty_and_its_gradient():
    """The factor 1/2 is in the penalty, and so none is in the gradient."""
    anchor = randn(4)
    model, guard = held(3.0, anchor)
    zero = guard.penalty()
    assert float(zero.detach()) == 0 and not torch.autograd.grad(zero, model.w)[0].any()
    step = randn(4, seed=2)
    with torch.no_grad():
        model.w.add_(step)
    penalty = guard.penalty()
    assert float(penalty.detach()) == pytest.approx(float(0.5 * 3 * (H * step * step).sum()))
    (gradient,) = torch.autograd.grad(penalty, model.w)
    torch.testing.assert_close(gradient, 3 * H * step, rtol=1e-6, atol=1e-9)
    assert not any(x.requires_grad for x in guard.state().values())
    assert guard.importance["w"].dtype == torch.float32


def test_o4_the_penalty_of_a_real_fisher_is_not_0():
    """A library shipped one that was, whatever was trained."""
    model = tiny_hybrid(window=4).float()
    guard = OnlineEWC(model, 5.0)
    rows = small_ids(6, 7, vocab=VOCAB)
    guard.consolidate(guard.measure(rows.tolist(), batch=3))
    assert guard.report()["penalty"] == 0 and guard.report()["measured_mean"] > 0
    free, start = copy.deepcopy(model), copy.deepcopy(model)
    batches = [{"input_ids": rows, "labels": rows.flip(1)}] * 3
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with guard.guarding(sgd):
        fit(model, batches, steps=3, optimizer=sgd)
    fit(free, batches, steps=3, optimizer=torch.optim.SGD(free.parameters(), lr=0.1))
    by_hand = 0.0
    parameters, anchors = dict(model.named_parameters()), dict(start.named_parameters())
    for name, value in guard.importance.items():
        by_hand += float((value * (parameters[name] - anchors[name]).detach().square()).sum())
    report = guard.report()
    assert report["penalty"] == pytest.approx(2.5 * by_hand, rel=1e-5) and by_hand > 0
    assert report["held"] == sum(x.numel() for x in guard.importance.values())
    assert report["left_out"]["gate"] == 2 and report["tasks"] == 1

    def moved(trained):
        other = dict(trained.named_parameters())
        return sum(
            float((value * (other[n] - anchors[n]).detach().square()).sum())
            for n, value in guard.importance.items()
        )

    assert moved(model) < 0.9 * moved(free)


def targets_of_three():
    targets = [randn(4, seed=seed) for seed in (3, 4, 5)]
    return targets, [0.5 + randn(4, seed=seed).tanh().square() for seed in (6, 7, 8)]


def test_o5_online_ewc_ends_at_the_joint_optimum():
    """Three tasks of quadratic loss: `sum h_i target_i / sum h_i`; separate penalties miss it."""
    targets, hs = targets_of_three()
    joint = sum(h * t for h, t in zip(hs, targets, strict=True)) / sum(hs)
    model = Bowl(torch.zeros(4))
    guard = OnlineEWC(model, 1.0, decay=1.0, normalise=False)
    ends = []
    for h, target in zip(hs, targets, strict=True):
        train(model, guard, target, h, steps=60, lr=0.9 / float(h.max()))
        guard.consolidate(fisher_of(model, w=h))
        ends.append(model.w.detach().clone())
    torch.testing.assert_close(ends[-1], joint, rtol=1e-5, atol=1e-5)
    (a, b, c), (_, _, target) = hs, targets
    separate = (a * ends[0] + b * ends[1] + c * target) / (a + b + c)
    assert (separate - joint).abs().max() > 0.05


def test_o5_with_mean_losses_the_strength_is_the_ratio_of_sizes():
    # One feature a row, so that the design is diagonal.
    y = randn(40, seed=2)
    x = torch.eye(3).double()[torch.arange(40) % 3] * (0.8 + 0.4 * randn(40, 1, seed=1).tanh())
    sizes = {"first": slice(0, 30), "last": slice(30, 40)}
    h = {name: x[part].square().mean(0) for name, part in sizes.items()}
    best = {name: (x[part] * y[part, None]).mean(0) / h[name] for name, part in sizes.items()}
    joint = (x * y[:, None]).mean(0) / x.square().mean(0)
    model = Bowl(best["first"])
    guard = OnlineEWC(model, 30 / 10, normalise=False)
    guard.consolidate(fisher_of(model, w=h["first"]))
    train(model, guard, best["last"], h["last"], steps=80, lr=0.9 / float(h["last"].max()))
    torch.testing.assert_close(model.w.detach(), joint, rtol=1e-5, atol=1e-5)


def test_o6_the_proximal_step_minimises_what_it_says():
    anchor, moved = randn(4), randn(4, seed=1)
    model, guard = held(3.0, anchor)
    with torch.no_grad():
        model.w.copy_(moved)
    guard.after_step([{"params": [model.w], "lr": 0.2}])
    c = 0.2 * 3 * H
    torch.testing.assert_close(model.w.detach(), (moved + c * anchor) / (1 + c), rtol=1e-6, atol=0)
    theta = model.w.detach().requires_grad_()
    total = 0.5 * (theta - moved).square().sum() + 0.5 * (c * (theta - anchor).square()).sum()
    assert torch.autograd.grad(total, theta)[0].abs().max() < 1e-6


@pytest.mark.parametrize("strength", [1e3, 1e30, 1e308])
def test_o6_no_strength_diverges(strength):
    """At the strongest the weights come back to their anchor, bit for bit in fp32."""
    model, guard = held(strength, randn(4))
    anchor = model.w.detach().clone()
    train(model, guard, randn(4, seed=1), steps=30, lr=1.0)
    reach = 2.0 if strength < 1e4 else 1e-6
    assert (model.w.detach() - anchor).abs().max() < reach
    assert torch.isfinite(model.w).all()


def test_o6_where_gradient_descent_on_the_penalty_does():
    """It diverges from learning rate * strength * F = 2 on; the proximal step does not care."""
    for product, shrinks in ((1.9, True), (2.1, False)):
        model, guard = held(product, importance=torch.ones(4))
        with torch.no_grad():
            model.w.add_(1.0)
        sgd = torch.optim.SGD([model.w], lr=1.0)
        for _ in range(60):
            sgd.zero_grad()
            guard.penalty().backward()
            sgd.step()
        assert bool(model.w.abs().max() < 1) == shrinks
    model, guard = held(2.1, importance=torch.ones(4))
    with torch.no_grad():
        model.w.add_(1.0)
    for _ in range(60):
        guard.after_step([{"params": [model.w], "lr": 1.0}])
    assert model.w.abs().max() < 1e-12


def test_the_pull_does_not_depend_on_adam_or_on_clipping():
    """Adam would rescale a penalty in the loss to its own step size, clipping shrink the task's."""
    results = []
    for clip in (None, 1e-3):
        model, guard = held(1e4, importance=torch.ones(4), start=torch.zeros(4))
        with torch.no_grad():
            model.w.add_(1.0)
        adam = torch.optim.AdamW([model.w], lr=1e-3, weight_decay=0.0)
        task = {"h": torch.ones(4).double(), "target": torch.full((4,), 9.0).double()}
        with guard.guarding(adam):
            fit(model, [task], bowl, steps=1, optimizer=adam, grad_clip=clip)
        results.append(model.w.detach().clone())
    # c = 10, and Adam's first step is one learning rate, whatever the gradient.
    torch.testing.assert_close(results[0], torch.full((4,), 1.001 / 11).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=0)


def test_under_adam_a_weight_rests_within_1_over_the_strength():
    model, guard = held(100.0, importance=torch.ones(4))
    adam = torch.optim.AdamW([model.w], lr=1e-3, weight_decay=0.0)
    train(model, guard, torch.full((4,), 9.0).double(), steps=80, optimizer=adam)
    torch.testing.assert_close(model.w.detach(), torch.full((4,), 0.01).double(),
                               rtol=0.02, atol=0)  # fmt: skip


def test_o7_it_is_saved_and_loaded(tmp_path):
    path = tmp_path / "guard.safetensors"
    model = tiny_llama()
    rows = small_ids(4, 6, vocab=VOCAB).tolist()
    for kind, options in (
        (OnlineEWC, {"decay": 0.5, "normalise": False}),
        (SynapticIntelligence, {"damping": 0.7}),
        (L2, {}),
    ):
        guard = kind(model, 2.0, **options)
        if kind is SynapticIntelligence:
            steps(guard, model, rows, 2)
            guard.consolidate()
            steps(guard, model, rows, 1)
            assert guard.path
        else:
            guard.consolidate(guard.measure(rows))
        guard.save(path)
        loaded = kind.load(path, model)
        assert loaded.report() == guard.report()
        state, again = guard.state(), loaded.state()
        assert state.keys() == again.keys()
        assert all(torch.equal(state[n], again[n]) for n in state)
        wrong = L2 if kind is not L2 else OnlineEWC
        with pytest.raises(ValueError, match=f"it is of '{kind.__name__}', not of"):
            wrong.load(path, model)
        with pytest.raises(ValueError, match="must have the weights that .* was saved with"):
            kind.load(path, tiny_llama(hidden_size=8))
    # The file is whole or not there: the old one outlives a writer that is killed.
    before = path.read_bytes()

    def killed(point):
        if point.startswith("within"):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(durable, "reached", killed)
        guard.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    path.write_bytes(before[:-1])
    with pytest.raises(ValueError, match="guard.safetensors is damaged"):
        L2.load(path, model)


def steps(guard, model, rows, count, **options):
    ids = torch.tensor(rows)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    with guard.guarding(sgd):
        batches = [{"input_ids": ids, "labels": ids}] * count
        fit(model, batches, steps=count, optimizer=sgd, **options)


def softmax_tasks():
    """Two tasks over the same features that want opposite labels for half of them."""
    features = randn(6, 4, seed=9)
    return Softmax(features, 3, seed=2), [0, 1, 2, 0, 1, 2], [0, 1, 2, 1, 2, 0]


def task_loss(labels):
    return lambda m, b: nn.functional.cross_entropy(
        m(input_ids=torch.arange(6)).logits, torch.tensor(labels)
    )


def learn(model, loss, count, guard=None):
    adam = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    if guard is None:
        fit(model, [{}] * count, loss, steps=count, optimizer=adam)
    else:
        with guard.guarding(adam):
            fit(model, [{}] * count, loss, steps=count, optimizer=adam)


@pytest.mark.parametrize("kind", [OnlineEWC, SynapticIntelligence, L2])
def test_o8_forgetting_and_plasticity_fall_as_the_strength_rises(kind):
    model, first, second = softmax_tasks()
    path = SynapticIntelligence(model, 0.0)
    learn(model, task_loss(first), 60, path)
    rows = [[i, 0] for i in range(6)] * 20
    forgetting, new = [], []
    for strength in (0.0, 1.0, 3.0, 300.0):
        trained = copy.deepcopy(model)
        guard = kind(trained, strength)
        if kind is SynapticIntelligence:
            guard.path = {name: x.clone() for name, x in path.path.items()}
            guard.anchors = {name: x.clone() for name, x in path.anchors.items()}
        guard.consolidate(guard.measure(rows, batch=5))
        before = float(task_loss(first)(trained, {}).detach())
        learn(trained, task_loss(second), 40, guard)
        forgetting.append(float(task_loss(first)(trained, {}).detach()) - before)
        new.append(float(task_loss(second)(trained, {}).detach()))
    assert forgetting == sorted(forgetting, reverse=True) and new == sorted(new)
    assert forgetting[0] > 10 * forgetting[-1] and new[-1] > 2 * new[0]


@pytest.mark.parametrize("kind", [OnlineEWC, SynapticIntelligence, L2])
def test_o8_strength_0_is_plain_training_bit_for_bit(kind):
    model = tiny_hybrid(window=4).float()
    rows = small_ids(4, 6, vocab=VOCAB)
    plain = copy.deepcopy(model)
    guard = kind(model, 0.0)
    if kind is SynapticIntelligence:
        guard.path = {n: torch.ones_like(x) for n, x in guard.anchors.items()}
    guard.consolidate(guard.measure(rows.tolist()))
    batches = [{"input_ids": rows, "labels": rows}] * 2
    for one, held_by in ((plain, None), (model, guard)):
        optimizer = optimizer_for(one)
        if held_by is None:
            fit(one, batches, steps=2, optimizer=optimizer)
        else:
            with held_by.guarding(optimizer):
                fit(one, batches, steps=2, optimizer=optimizer)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_what_is_new_is_not_held():
    """Entries without importance keep every bit, the sign of a zero too; so do new parameters."""
    model, guard = held(1e6, torch.ones(4), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    model.expert = nn.Parameter(torch.full((2,), -0.0))
    with torch.no_grad():
        model.w.copy_(torch.tensor([2.0, -0.0, 5.0, 2.0]))
    before = model.expert.detach().clone()
    guard.after_step([{"params": [model.w, model.expert], "lr": 1.0}])
    assert model.w.tolist() == [pytest.approx(1, rel=1e-5), 0, 5, pytest.approx(1, rel=1e-5)]
    assert math.copysign(1, float(model.w[1].detach())) == -1
    assert torch.equal(model.expert.view(torch.int32), before.view(torch.int32))
    guard.consolidate(fisher_of(model, w=torch.ones(4), expert=torch.ones(2)))
    assert guard.importance["expert"].tolist() == [1, 1]
    torch.testing.assert_close(guard.importance["w"], torch.tensor([1.95, 1.0, 1.0, 1.95]))


def test_new_rows_are_not_held():
    model = tiny_llama()
    guard = OnlineEWC(model, 1.0, left_out=lambda m: {})
    guard.consolidate(guard.measure(small_ids(4, 6, vocab=VOCAB).tolist()))
    before = guard.importance["lm_head.weight"].clone()
    model.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(ValueError, match=r"anchored, got one of .*; anchor\(\) takes"):
        guard.penalty()
    guard.anchor()
    grown = guard.importance["lm_head.weight"]
    assert torch.equal(grown[:VOCAB], before)
    assert not grown[VOCAB:].any() and len(grown) == VOCAB + 3
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] += 1
    assert float(guard.penalty().detach()) == 0
    model.resize_token_embeddings(VOCAB - 1)
    with pytest.raises(ValueError, match="must have .* of at least shape"):
        guard.anchor()
    assert len(guard.importance["lm_head.weight"]) == VOCAB + 3


def test_tied_weights_are_held_once():
    model = tiny_hybrid(tie_word_embeddings=True)
    guard = OnlineEWC(model, 2.0, left_out=lambda m: {})
    guard.consolidate(guard.measure(small_ids(3, 6, vocab=VOCAB).tolist()))
    with torch.no_grad():
        model.lm_head.weight += 0.5
    wanted = float(guard.importance["model.embed_tokens.weight"].sum()) * 0.25
    assert float(guard.penalty().detach()) == pytest.approx(wanted, rel=1e-5)


def test_an_edit_a_commit_and_a_rollback_make_the_anchor_stale():
    model, guard = held(3.0)
    was = snapshot(model)
    with torch.no_grad():
        model.w.add_(1.0)
    for change in (lambda: bump_version(model), lambda: rollback(model, was)):
        change()
        for use in (guard.penalty, guard.before_step, lambda: guard.after_step([])):
            with pytest.raises(ValueError, match="anchor must be of the present version"):
                use()
        guard.anchor()
        assert torch.equal(guard.anchors["w"], model.w.detach())
        assert float(guard.penalty().detach()) == 0
    assert torch.equal(guard.importance["w"], H.float())
    # Training itself is no edit.
    train(model, guard, randn(4), steps=3)


def test_a_fisher_of_other_weights_is_refused():
    model, guard = held()
    fisher = fisher_of(model, w=torch.ones(4))
    with torch.no_grad():
        model.w.add_(1e-6)
    with pytest.raises(ValueError, match="must have the weights that the Fisher information is of"):
        guard.consolidate(fisher)
    with pytest.raises(ValueError, match="fisher must be of the weights as they are now, got None"):
        guard.consolidate()
    assert guard.tasks == 1 and torch.equal(guard.importance["w"], H.float())


def test_every_task_is_protected_alike_and_decays():
    """`F <- decay F + F_task` with F_task of mean 1: the scale of a loss has no effect."""
    model = Bowl(torch.zeros(4))
    guard = OnlineEWC(model, 1.0, decay=0.5)
    for scale in (1.0, 1e4):
        guard.consolidate(fisher_of(model, w=scale * torch.tensor([1.0, 1.0, 2.0, 0.0])))
    torch.testing.assert_close(guard.importance["w"], 1.5 * torch.tensor([1.0, 1.0, 2.0, 0.0]))
    assert guard.report()["measured_mean"] == pytest.approx(1e4)
    with pytest.raises(ValueError, match="must not all be 0"):
        guard.consolidate(fisher_of(model, w=torch.zeros(4)))
    assert guard.tasks == 2


def test_each_group_has_its_own_learning_rate():
    model, guard = held(1.0, importance=torch.ones(4))
    model.v = nn.Parameter(torch.zeros(2).double())
    guard.consolidate(fisher_of(model, w=torch.ones(4), v=torch.ones(2)))
    guard.importance = {"w": torch.ones(4), "v": torch.ones(2)}
    with torch.no_grad():
        model.w.add_(1.0)
        model.v.add_(1.0)
    guard.after_step([{"params": [model.w], "lr": 1.0}, {"params": [model.v], "lr": 3.0}])
    assert model.w.tolist() == pytest.approx([0.5] * 4)
    assert model.v.tolist() == pytest.approx([0.25] * 2)


def test_hooks_go_when_the_block_ends():
    model, guard = held(1e9, importance=torch.ones(4))
    sgd = torch.optim.SGD([model.w], lr=1.0)
    with pytest.raises(ValueError, match="end"), guard.guarding(sgd):
        raise ValueError("end")
    # Neither pulls nor asks whether the anchor is fresh.
    bump_version(model)
    fit(model, [{"h": H, "target": torch.ones(4).double()}], bowl, steps=1, optimizer=sgd,
        grad_clip=None)  # fmt: skip
    torch.testing.assert_close(model.w.detach(), H)


def test_bfloat16_weights_are_pulled_in_fp32():
    model = Bowl(torch.zeros(4)).bfloat16()
    guard = OnlineEWC(model, 1.0, normalise=False)
    guard.consolidate(fisher_of(model, w=torch.full((4,), 0.5)))
    with torch.no_grad():
        model.w.fill_(3.0)
    assert guard.penalty().dtype == torch.float32
    guard.after_step([{"params": [model.w], "lr": 1.0}])
    assert model.w.dtype == torch.bfloat16 and model.w.tolist() == [2.0] * 4


def test_the_trainer_takes_the_same_steps(tmp_path):
    """transformers' Trainer with the callback, against `fit` with the hooks, warm-up included."""
    model = tiny_llama().float()
    rows = small_ids(4, 6, vocab=VOCAB)
    guard = OnlineEWC(model, 50.0)
    guard.consolidate(guard.measure(rows.tolist()))
    other = copy.deepcopy(model)
    other_guard = OnlineEWC(other, 50.0)
    other_guard.consolidate(estimate_fisher(other, rows.tolist()))
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.01,
        lr_scheduler_type="constant_with_warmup", warmup_steps=2, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, weight_decay=0.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    Trainer(model, args, train_dataset=data, callbacks=[GuardCallback(guard)]).train()
    adam = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.0)
    with other_guard.guarding(adam):
        batches = [{"input_ids": rows, "labels": rows}] * 3
        fit(other, batches, steps=3, optimizer=adam, warmup=2, schedule="constant")
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    penalty = guard.report()["penalty"]
    assert penalty > 0 and penalty == pytest.approx(other_guard.report()["penalty"], rel=1e-3)


def test_groups_of_zero_are_those_of_the_model():
    class Zero:
        def __init__(self, held, inner):
            self.bit16_groups, self.optimizer = held, inner
            self.param_groups = inner.param_groups

    class Wrapper:
        def __init__(self, inner):
            self.optimizer = inner

    w, flat = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    zero = Zero([[w]], torch.optim.SGD([flat], lr=0.3))
    (group,) = trained_groups(Wrapper(zero))
    assert group["params"][0] is w and group["lr"] == 0.3
    (group,) = trained_groups(Wrapper(torch.optim.SGD([w], lr=0.1)))
    assert group["params"][0] is w and group["lr"] == 0.1


def test_arguments_that_do_not_fit_are_refused():
    model = Bowl(torch.zeros(4))
    with pytest.raises(ValueError, match="strength must be a finite number of at least 0, got -1"):
        OnlineEWC(model, -1)
    with pytest.raises(ValueError, match="decay must be a number of at least 0 and at most 1"):
        OnlineEWC(model, 1, decay=1.5)
    with pytest.raises(ValueError, match="normalise must be True or False"):
        OnlineEWC(model, 1, normalise=1)
    with pytest.raises(ValueError, match="damping must be a finite number above 0, got 0"):
        SynapticIntelligence(model, 1, damping=0)
    model.w.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 has partitioned 'w'"):
        OnlineEWC(model, 1)
