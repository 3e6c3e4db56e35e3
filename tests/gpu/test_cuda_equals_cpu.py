"""On a CUDA device: ops against the fp64 reference, model, sleep and generation against the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM, SleepCache
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.short_conv import short_conv
from hybrid_sleep.kernels.ssd import ssd

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def inputs(op: str, tokens: int) -> dict[str, torch.Tensor]:
    """fp64 inputs on the CPU, some of the tokens pads."""
    B, H, K, V = 2, 2, 32, 48
    unit = torch.nn.functional.normalize
    mask = torch.rand(B, tokens) > 0.2
    if op == "short_conv":
        return {
            "x": torch.randn(B, tokens, 64, dtype=torch.float64),
            "weight": torch.randn(64, 4, dtype=torch.float64),
            "initial_state": torch.randn(B, 3, 64, dtype=torch.float64),
            "mask": mask,
        }
    q, k = (unit(torch.randn(B, tokens, H, K, dtype=torch.float64), dim=-1) for _ in range(2))
    given = {
        "q": q,
        "k": k,
        "v": torch.randn(B, tokens, H, V, dtype=torch.float64),
        "g": -torch.rand(B, tokens, H, dtype=torch.float64),
        "initial_state": torch.randn(B, H, K, V, dtype=torch.float64),
        "mask": mask,
    }
    if op == "gated_delta_rule":
        given["beta"] = torch.rand(B, tokens, H, dtype=torch.float64)
    return given


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.detach().double().cpu(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp(min=1e-12))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 130])
@pytest.mark.parametrize("op", [gated_delta_rule, ssd, short_conv], ids=lambda op: op.__name__)
def test_ops_forward_and_backward_match_the_fp64_reference(op, tokens, dtype):
    exact = inputs(op.__name__, tokens)
    # What the device is given after rounding is the question put to the reference too.
    narrow = {"q", "k", "v", "x"}
    exact = {n: x.to(dtype).double() if n in narrow else x for n, x in exact.items()}
    kinds = {n: dtype if n in narrow else torch.float32 for n in exact} | {"mask": torch.bool}
    on_gpu = {n: x.cuda().to(kinds[n]) for n, x in exact.items()}
    results = []
    for given, impl in ((exact, "reference"), (on_gpu, "auto")):
        leaves = {n: x.detach().clone() for n, x in given.items()}
        for x in leaves.values():
            x.requires_grad_(x.is_floating_point())
        out, state = op(**leaves, impl=impl)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        loss = (out.double() * weight.to(out.device)).sum() + state.double().square().sum()
        loss.backward()
        results.append((out, state, {n: x.grad for n, x in leaves.items() if x.grad is not None}))
    (out, state, grads), (out_gpu, state_gpu, grads_gpu) = results
    assert relative(out_gpu, out) < TOLERANCE[dtype]
    assert relative(state_gpu, state) < TOLERANCE[dtype]
    for name, grad in grads.items():
        assert relative(grads_gpu[name], grad) < TOLERANCE[dtype], name


@pytest.fixture(params=["gated_deltanet", "mamba2"])
def pair(request):
    config = HybridSleepConfig(
        vocab_size=31,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        window=24,
        state_space=request.param,
    )
    on_cpu = HybridSleepForCausalLM(config).eval()
    return on_cpu, copy.deepcopy(on_cpu).cuda()


@torch.no_grad()
def test_forward_and_sleep_match_the_cpu(pair):
    on_cpu, on_gpu = pair
    ids, mask = torch.randint(31, (3, 80)), torch.ones(3, 80, dtype=torch.long)
    mask[1, :30], mask[2, -9:] = 0, 0
    outputs = [
        m(ids.to(m.device), attention_mask=mask.to(m.device), sleep_passes=3) for m in pair
    ]
    assert relative(outputs[1].logits, outputs[0].logits) < 1e-4
    for model, out in zip(pair, outputs, strict=True):
        report = model.sleep(out.cache, 4)
        assert report.passes == 4
    weights, weights_gpu = (out.cache.fast_weights for out in outputs)
    for layer, S in weights.items():
        assert relative(weights_gpu[layer], S) < 1e-4


def test_generation_matches_the_cpu_and_is_repeatable(pair):
    ids = torch.randint(31, (2, 40))
    runs = [
        model.generate(
            ids.to(model.device), max_new_tokens=40, do_sample=False, sleep_passes=3
        ).cpu()
        for model in (*pair, pair[1])
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[1], runs[2])


@torch.no_grad()
def test_saved_on_the_gpu_continues_bit_for_bit(pair, tmp_path):
    _, model = pair
    ids = torch.randint(31, (2, 60), device="cuda")
    cache = model(ids, sleep_passes=2).cache
    cache.save_pretrained(tmp_path)
    loaded = SleepCache.from_pretrained(tmp_path, model=model)
    more = torch.randint(31, (2, 30), device="cuda")
    continued = [model(more, cache=c, sleep_passes=2).logits for c in (cache, loaded)]
    assert torch.equal(*continued)
