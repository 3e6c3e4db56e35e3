"""Optional packages on a CUDA device: what their adapters compute, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from hybrid_sleep.kernels import peers
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.short_conv import short_conv
from hybrid_sleep.kernels.ssd import ssd

pytestmark = pytest.mark.gpu

# Of bf16 inputs, relative to the norm.
TOLERANCE = 2e-2


def run(op, given, dtype, device, grad, **options):
    """Results and gradients of `op`, as fp64 on the CPU; narrow inputs in `dtype`."""
    leaves = {}
    for name, x in given.items():
        kind = dtype if name in ("q", "k", "v", "x") or dtype == torch.float64 else torch.float32
        leaves[name] = x.detach().to(device, kind, copy=True).requires_grad_(grad)
    found = dict(zip(("out", "state"), op(**leaves, **options), strict=True))
    if grad:
        drawn = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=drawn).to(x)).sum() for x in found.values())
        loss.backward()
        found |= {f"d{name}": x.grad for name, x in leaves.items()}
    return {name: x.detach().double().cpu() for name, x in found.items()}


def matches_the_reference(op, given, grad=True, **options):
    peer = peers.PEERS[op.__name__]
    pytest.importorskip(peer.module)
    narrow = {"q", "k", "v", "x"}
    given = {n: x.bfloat16().float() if n in narrow else x for n, x in given.items()}
    found = run(op, given, torch.bfloat16, "cuda", grad, impl=peer.name, **options)
    options = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    wanted = run(op, given, torch.float64, "cpu", grad, impl="reference", **options)
    for name, x in wanted.items():
        assert (found[name] - x).norm() < TOLERANCE * x.norm(), name


def state_space(T, groups=2):
    B, H, K, V = 2, 2, 64, 64
    q, k = (normalize(torch.randn(B, T, groups, K), dim=-1) for _ in range(2))
    g = -torch.rand(B, T, H) / 4
    g[:, ::5] = 0
    state = torch.randn(B, H, K, V)
    return {"q": q, "k": k, "v": torch.randn(B, T, H, V), "g": g, "initial_state": state}


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("T", [63, 200])
def test_flash_linear_attention(T, pads):
    given = {**state_space(T), "beta": torch.rand(2, T, 2)}
    mask = (torch.rand(2, T) > 0.2).cuda() if pads else None
    matches_the_reference(gated_delta_rule, given, mask=mask)


def test_flash_linear_attention_by_the_token():
    given = {**state_space(1), "beta": torch.rand(2, 1, 2)}
    matches_the_reference(gated_delta_rule, given, grad=False)


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("T", [1, 63, 300])
def test_mamba_ssm(T, pads):
    mask = (torch.rand(2, T) > 0.2).cuda() if pads and T > 1 else None
    matches_the_reference(ssd, state_space(T, groups=1), grad=False, mask=mask)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("T", [4, 63, 300])
def test_causal_conv1d(T, width):
    given = {
        "x": torch.randn(2, T, 64),
        "weight": torch.randn(64, width),
        "bias": torch.randn(64),
        "initial_state": torch.randn(2, width - 1, 64).bfloat16().float(),
    }
    matches_the_reference(short_conv, given)
