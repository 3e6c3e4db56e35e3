"""Experts beside the matrices of a model: their sums, and their training against a loop by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from editable import tiny_gpt2, tiny_hybrid, tiny_llama
from memories import bits, same
from nights import STUDY, Folder, close, guard_of, lessons, press_at
from torch import nn
from torch.func import functional_call

from hybrid_sleep.parametric.experience.experts import Expert, grown
from hybrid_sleep.parametric.experience.train import train
from hybrid_sleep.parametric.fisher import covered
from hybrid_sleep.parametric.lessons import lesson_loss
from hybrid_sleep.training.loop import seed_step

MODELS = {"llama": tiny_llama, "hybrid": tiny_hybrid, "gpt2": tiny_gpt2}
SEEDING = replace(STUDY, experts=2)
IDS = torch.tensor([[1, 5, 9, 6, 14, 20]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def matrices(model):
    return {name: p for name, p in covered(model)[0].items() if p.ndim == 2}


def filled(experts, seed=0):
    """Experts as if they were trained: every B random."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for expert in experts.beside.values():
            expert.B.copy_(0.1 * torch.randn(expert.B.shape, generator=g))
    return experts


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(attention_dropout=0.1)


@pytest.fixture(scope="module")
def course(llama):
    return lessons(llama)


@pytest.fixture
def folder(tmp_path):
    with Folder(tmp_path / "memory") as opened:
        yield opened


def trained(model, course, unfinished, options=SEEDING, strength=30.0, **given):
    guard = guard_of(model, strength)
    return train(model, course, options, list(covered(model)[0]), guard, unfinished, **given)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_student_is_the_teacher_at_first_and_the_model_has_its_own_back(make):
    model = make()
    parts = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    kinds, before, wanted = [type(x) for x in model.modules()], bits(model), logits(model)
    names = matrices(model).keys()
    with grown(model, list(covered(model)[0]), 4, seed=1) as experts:
        assert experts.beside.keys() == names
        assert torch.equal(logits(model), wanted)
        assert all(expert.A.abs().min() > 0 for expert in experts.beside.values())
        filled(experts)
        assert not torch.equal(logits(model), wanted)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == parts
    assert [type(x) for x in model.modules()] == kinds and same(before, bits(model))
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_merged_experts_are_branches_beside_the_layers(make):
    model = make()
    with grown(model, list(covered(model)[0]), 3) as experts:
        filled(experts)
        beside = logits(model)
        factors = {name: p.detach().clone() for name, p in experts.factors.items()}
        experts.merge()
        assert all(not expert.B.any() for expert in experts.beside.values())
        assert torch.allclose(logits(model), beside, rtol=0, atol=1e-12)
    assert torch.allclose(logits(model), beside, rtol=0, atol=1e-12)
    # The same by branches that read what a layer reads.
    plain = make()
    count = 0
    for name, module in plain.named_modules():
        if f"{name}.weight/A" in factors:
            a, b = (factors[f"{name}.weight/{x}"] for x in "AB")
            left, right = (b, a) if isinstance(module, nn.Linear) else (a.T, b.T)
            module.register_forward_hook(
                lambda m, given, out, left=left, right=right: out + given[0] @ right.T @ left.T
            )
            count += 1
    assert count == len(factors) // 2 > 5
    assert torch.allclose(logits(plain), beside, rtol=0, atol=1e-10)


def test_a_sum_in_half_precision_is_made_in_fp32_and_rounded_once():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=g).bfloat16()
    expert = Expert(weight, 9, seed=0)
    assert expert.A.shape == (4, 6) and expert.B.shape == (4, 4)
    assert expert.A.dtype == expert.B.dtype == torch.float32
    weight = torch.randn(64, 96, generator=g).bfloat16()
    expert = Expert(weight, 4, seed=0)
    assert torch.equal(expert(weight), weight)
    with torch.no_grad():
        expert.B.copy_(0.1 * torch.randn(64, 4, generator=g))
        want = (weight.float() + expert.B @ expert.A).bfloat16()
        assert torch.equal(expert(weight), want) and not torch.equal(want, weight)
    # A entries of variance 1 / rank.
    many = Expert(torch.zeros(300, 400), 100, seed=1)
    assert float(many.A.detach().std()) == pytest.approx(0.1, rel=0.02)
    assert not torch.equal(many.A, Expert(torch.zeros(300, 400), 100, seed=2).A)
    assert torch.equal(many.A, Expert(torch.zeros(300, 400), 100, seed=1).A)


def test_a_matrix_that_modules_share_has_one_expert_and_a_stack_one_for_each():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.weight = self.one.weight
            self.stack = nn.Parameter(torch.randn(2, 3, 4))

    model = Tied().double()
    with grown(model, ["one.weight", "one.bias", "stack"], 2) as experts:
        assert experts.factors.keys() == {"one.weight/A", "one.weight/B", "stack/A", "stack/B"}
        filled(experts)
        assert torch.equal(model.one.weight, model.two.weight)
        added = model.stack - experts.weights["stack"]
        for i in range(2):
            part = experts.beside["stack"]
            assert torch.allclose(added[i], part.B[i] @ part.A[i])
        tied = model.one.weight.detach().clone()
        experts.merge()
    assert model.two.weight is model.one.weight and torch.allclose(tied, model.one.weight)
    assert [name for name, _ in model.one.named_parameters()] == ["weight", "bias"]
    for names, rank, message in (
        (["one.bias"], 2, r"names must be of a matrix or more, got \['one.bias'\]"),
        (["stack"], 0, "rank must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message), grown(model, names, rank):
            pass
    assert not hasattr(model.one, "parametrizations")


def by_hand(model, course, strength, options=SEEDING):
    """The same in plain torch, the penalty by gradient steps too small to differ from any other."""
    weights = {name: p.detach().clone() for name, p in matrices(model).items()}
    with grown(model, list(weights), options.experts) as experts:
        factors = {name: p.detach().clone().requires_grad_() for name, p in experts.factors.items()}
    optimizer = torch.optim.AdamW(factors.values(), betas=(0.9, 0.95), weight_decay=0.0)
    steps = -(-len(course) // options.rows)

    def summed(name):
        return weights[name] + factors[f"{name}/B"] @ factors[f"{name}/A"]

    class Summed(nn.Module):
        def parameters(self):
            return model.parameters()

        def forward(self, **given):
            return functional_call(model, {name: summed(name) for name in weights}, (), given)

    model.train()
    with torch.random.fork_rng():
        for step in range(steps):
            rate = options.rate * (steps - step) / steps
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            seed_step(0, step, 0)
            batch = course[step * options.rows : (step + 1) * options.rows]
            lesson_loss(Summed(), batch).backward()
            nn.utils.clip_grad_norm_(factors.values(), 1.0)
            optimizer.step()
            # An importance of 1 everywhere: rows of B see A A^T, columns of A then B^T B.
            with torch.no_grad():
                for name in weights if strength else ():
                    a, b = factors[f"{name}/A"], factors[f"{name}/B"]
                    eye = torch.eye(len(a)).double()
                    b.copy_(b @ torch.linalg.inv(eye + rate * strength * a @ a.T))
                    a.copy_(torch.linalg.inv(eye + rate * strength * b.T @ b) @ a)
    return {name: summed(name).detach() for name in weights}


@pytest.mark.parametrize("strength", [0.0, 30.0])
def test_it_takes_the_steps_of_a_loop_by_hand(llama, course, folder, strength):
    model = copy.deepcopy(llama)
    done = trained(model, course, folder.night(options=SEEDING), strength=strength)
    assert (done.step, done.spent, done.experts) == (4, None, 2)
    sizes = sum(2 * sum(p.shape) for p in matrices(llama).values())
    assert done.parameters == sizes == done.to_dict()["parameters"]
    now, want = bits(model), by_hand(copy.deepcopy(llama), course, strength)
    close(want, now)
    for name, before in bits(llama).items():
        if name not in want:
            assert torch.equal(before, now[name])
            continue
        spectrum = torch.linalg.svdvals(now[name] - before)
        assert spectrum[0] > 1e-6 and spectrum[2:].max() < 1e-12


def test_an_interrupted_training_of_experts_goes_on_to_the_same_bits(llama, course, folder):
    model, again = copy.deepcopy(llama), copy.deepcopy(llama)
    trained(model, course, folder.night(options=SEEDING, seed=1))
    with pytest.raises(KeyboardInterrupt, match="step 2 of 4 is kept in"):
        trained(again, course, folder.night(options=SEEDING), progress=press_at(2))
    # What was trained is beside the weights, and kept.
    assert same(bits(llama), bits(again)) and not hasattr(again.lm_head, "parametrizations")
    tensors, told = folder.night(options=SEEDING).state()
    assert told["step"] == 2 and tensors["weight/lm_head.weight/B"].any()
    done = trained(again, course, folder.night(options=SEEDING))
    assert (done.step, done.resumed) == (4, 2) and same(bits(model), bits(again))
    # One that was through is merged all the same.
    last = copy.deepcopy(llama)
    with pytest.raises(KeyboardInterrupt, match="step 4 of 4"):
        trained(last, course, folder.night(options=SEEDING, seed=2), progress=press_at(4))
    assert same(bits(llama), bits(last))
    done = trained(last, course, folder.night(options=SEEDING, seed=2))
    assert done.resumed == 4 and same(bits(model), bits(last))


def test_nothing_is_trained_beside_weights_that_the_guard_does_not_know(llama, course, folder):
    model = copy.deepcopy(llama)
    guard = guard_of(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    before = bits(model)
    with pytest.raises(ValueError, match="guard must be anchored at the weights that experts"):
        train(model, course, SEEDING, list(covered(model)[0]), guard, folder.night())
    assert same(before, bits(model)) and not hasattr(model.lm_head, "parametrizations")
