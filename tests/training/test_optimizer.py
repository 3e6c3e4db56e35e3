"""One optimizer that steps like torch's Muon and torch's AdamW; which parameters each gets."""

import copy

import pytest
import torch
from torch import nn

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM
from hybrid_sleep.training import optimizer as module
from hybrid_sleep.training.optimizer import MuonAdamW, bfloat16_is_native, parameter_groups

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (24, 8), (1, 8), (5, 7)]


def matrices(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def muon(parameters, **options):
    return MuonAdamW([{"params": parameters, "algorithm": "muon"}], **options)


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_matrices_are_torch_muon_bitwise(rule):
    ours, theirs = matrices(), matrices()
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    optimizers = (
        muon(ours, adjust_lr=rule, precision="bfloat16", **options),
        torch.optim.Muon(theirs, adjust_lr_fn=rule, **options),
    )
    for step in range(4):
        give_gradients(ours, seed=step)
        give_gradients(theirs, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(ours, matrices(), strict=True))


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_float32_steps_are_torch_muon_without_its_rounding(rule, nesterov, monkeypatch):
    """torch's own step, in which what it makes bfloat16 is float64, gives the same to rounding."""
    ours = matrices()
    theirs = [nn.Parameter(p.detach().double()) for p in ours]
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    one = muon(ours, adjust_lr=rule, precision="float32", **options)
    one.param_groups[0]["nesterov"] = nesterov
    two = torch.optim.Muon(theirs, adjust_lr_fn=rule, nesterov=nesterov, **options)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for step in range(4):
        give_gradients(ours, seed=step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.double()
        one.step()
        two.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= 1e-5 * q.abs().max()


def test_the_precision_is_what_the_device_is_faster_at_and_outlives_it(monkeypatch):
    native = "bfloat16" if bfloat16_is_native(torch.device("cpu")) else "float32"
    for shapes, wanted in (
        ([(128, 64), (4, 4)], "float32"),
        ([(4, 4), (64, 129)], native),
    ):
        given = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        assert muon(given).param_groups[0]["precision"] == wanted
    monkeypatch.setattr(module, "SMALL", 0)
    for here, there in ((True, False), (False, True)):
        monkeypatch.setattr(module, "bfloat16_is_native", lambda device, here=here: here)
        saved = muon(matrices()).state_dict()
        monkeypatch.setattr(module, "bfloat16_is_native", lambda device, there=there: there)
        resumed = muon(matrices())
        resumed.load_state_dict(saved)
        wanted = "bfloat16" if here else "float32"
        assert resumed.param_groups[0]["precision"] == wanted
    # A state from before there was a choice came of torch's own steps.
    del saved["param_groups"][0]["precision"]
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["precision"] == "bfloat16"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_muon_step_orthogonalises_its_momentum(precision):
    """Golden: the update of a matrix has singular values near 1, whatever those of the gradient."""
    weight = nn.Parameter(torch.zeros(6, 6))
    optimizer = muon([weight], lr=1.0, momentum=0.0, precision=precision)
    weight.grad = torch.diag(torch.tensor([9.0, 7.0, 5.0, 3.0, 2.0, 1.0]))
    optimizer.step()
    singular = torch.linalg.svdvals(weight.detach())
    assert 0.6 < singular.min() and singular.max() < 1.3
    assert (weight.diagonal() < 0).all()


def test_everything_else_is_torch_adamw_bitwise():
    ours = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 4))]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.3}
    optimizers = (MuonAdamW(ours, **options), torch.optim.AdamW(theirs, fused=True, **options))
    for step in range(4):
        give_gradients(ours, seed=step)
        give_gradients(theirs, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def tiny_model(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=7, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, linear_num_key_heads=2, linear_num_value_heads=2)
    dims = dict(linear_key_head_dim=8, linear_value_head_dim=8, window=4)
    return HybridSleepForCausalLM(HybridSleepConfig(**{**sizes, **heads, **dims, **changes}))


def names_by_group(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("state_space", ["gated_deltanet", "mamba2"])
def test_muon_gets_the_projections_inside_blocks_and_adamw_the_rest(tied, state_space):
    model = tiny_model(tie_word_embeddings=tied, state_space=state_space)
    groups = parameter_groups(model, 0.02, 0.003, weight_decay=0.1)
    hidden, decayed, rest = names_by_group(model, groups)
    expected = {
        name
        for name, p in model.named_parameters()
        if ".layers." in name and name.endswith("_proj.weight")
    }
    assert hidden == expected
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    convolutions = {name for name, _ in model.named_parameters() if name.endswith("_conv")}
    assert decayed == ends | convolutions
    assert {name.split(".")[-1] for name in rest} >= {"A_log", "dt_bias", "weight"}
    assert hidden | decayed | rest == {name for name, _ in model.named_parameters()}
    settings = [(g.get("algorithm", "adamw"), g["lr"], g["weight_decay"]) for g in groups]
    assert settings == [("muon", 0.02, 0.1), ("adamw", 0.003, 0.1), ("adamw", 0.003, 0.0)]


def test_frozen_parameters_are_left_alone():
    model = tiny_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad"):
        parameter_groups(model, 0.02, 0.003)
    model.model.norm.requires_grad_(True)
    (group,) = parameter_groups(model, 0.02, 0.003)
    assert group["params"] == [model.model.norm.weight]


def test_a_saved_state_continues_bit_for_bit(tmp_path):
    def run(parameters, optimizer, steps):
        for step in steps:
            give_gradients(parameters, seed=step)
            optimizer.step()

    def make():
        torch.manual_seed(0)
        parameters = [*matrices(), nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2, 3))]
        groups = [
            {"params": parameters[:-2], "algorithm": "muon", "lr": 0.1},
            {"params": parameters[-2:-1], "lr": 0.01, "weight_decay": 0.3},
            {"params": parameters[-1:], "lr": 0.02},
        ]
        optimizer = MuonAdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return parameters, optimizer, schedule

    through, optimizer, schedule = make()
    run(through, optimizer, range(3))
    schedule.step()
    saved = {"optimizer": optimizer.state_dict(), "weights": [p.data.clone() for p in through]}
    torch.save(saved, tmp_path / "state.pt")
    run(through, optimizer, range(3, 6))

    resumed, optimizer, _ = make()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    for p, weight in zip(resumed, saved["weights"], strict=True):
        p.data.copy_(weight)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.005, 0.01]
    run(resumed, optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(through, resumed, strict=True))


def test_schedulers_and_zero_grad_reach_every_parameter():
    parameters = [*matrices(), nn.Parameter(torch.randn(6))]
    optimizer = MuonAdamW(
        [{"params": parameters[:-1], "algorithm": "muon", "lr": 0.5}, {"params": parameters[-1:]}]
    )
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    give_gradients(parameters, seed=1)
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_parameters_without_gradient_do_not_move():
    parameters = matrices()
    optimizer = muon(parameters, lr=0.1, weight_decay=0.5)
    give_gradients(parameters[:2], seed=1)
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(parameters, before, strict=True)]
    assert moved == [True, True] + [False] * (len(SHAPES) - 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be a finite number of at least 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        ({"momentum": 1.0}, "momentum must be a finite number of at least 0 and below 1, got 1.0"),
        ({"ns_steps": 0}, "ns_steps must be an integer of at least 1, got 0"),
        (
            {"adjust_lr": "none"},
            "adjust_lr must be one of 'original', 'match_rms_adamw', got 'none'",
        ),
        ({"precision": "half"}, "precision must be one of 'float32', 'bfloat16', got 'half'"),
        ({"betas": (0.9, 1.0)}, "betas must be a finite number of at least 0 and below 1, got 1.0"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        muon(matrices(), **options)


def test_muon_takes_matrices_only():
    vector, cube = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2, 2))
    for wrong in (vector, cube):
        with pytest.raises(ValueError, match="params of Muon must be real matrices"):
            muon([wrong])
    optimizer = MuonAdamW([vector])
    with pytest.raises(ValueError, match="algorithm must be one of 'muon', 'adamw', got 'sgd'"):
        optimizer.add_param_group({"params": [cube], "algorithm": "sgd"})
    assert len(optimizer.param_groups) == 1


def test_a_state_of_other_groups_is_refused_and_changes_nothing():
    parameters = [nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))]
    one = MuonAdamW([{"params": parameters[:1], "algorithm": "muon"}, {"params": parameters[1:]}])
    other = MuonAdamW([{"params": parameters[:1]}, {"params": parameters[1:], "algorithm": "muon"}])
    give_gradients(parameters, seed=0)
    other.step()
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match=r"\['adamw', 'muon'\]"):
        one.load_state_dict(other.state_dict())
    assert one.state_dict() == before
