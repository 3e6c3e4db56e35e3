"""Decays and time steps stay in fp32 whichever way a model gets its dtype."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from small import small_config, small_model
from transformers import AutoModel, AutoModelForCausalLM

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM

BF16 = torch.bfloat16


def by_default(config: HybridSleepConfig) -> HybridSleepForCausalLM:
    torch.set_default_dtype(BF16)
    try:
        return HybridSleepForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


MADE = {
    "from_config": lambda c: AutoModelForCausalLM.from_config(c, dtype=BF16),
    "from_config of the backbone": lambda c: AutoModel.from_config(c, dtype=BF16),
    "set_default_dtype": by_default,
    "to": lambda c: HybridSleepForCausalLM(c).to(BF16),
    "to a dtype and a device": lambda c: HybridSleepForCausalLM(c).to("cpu", BF16),
    "bfloat16": lambda c: HybridSleepForCausalLM(c).bfloat16(),
    "half": lambda c: HybridSleepForCausalLM(c).half(),
    "half and back": lambda c: HybridSleepForCausalLM(c).half().float(),
}


def gates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: p for k, p in model.named_parameters() if k.endswith(("A_log", "dt_bias"))}


@pytest.mark.parametrize("state_space", ["gated_deltanet", "mamba2"])
@pytest.mark.parametrize("way", MADE)
def test_gates_are_fp32_in_a_narrow_model(way: str, state_space: str):
    model = MADE[way](small_config(state_space=state_space))
    assert len(gates(model)) == 4
    assert {p.dtype for p in gates(model).values()} == {torch.float32}
    rest = {p.dtype for name, p in model.named_parameters() if name not in gates(model)}
    assert rest == {{"half": torch.float16, "half and back": torch.float32}.get(way, BF16)}


def test_conversion_changes_no_bit_of_the_gates_and_takes_gradients_along():
    model = small_model(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in gates(model).items()}
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    model.to(BF16)
    for name, parameter in gates(model).items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad.dtype == torch.float32
    assert model.model.layers[1].mixer.q_conv.grad.dtype == BF16
    assert {p.dtype for p in gates(model.double()).values()} == {torch.float64}


def test_gates_are_fp32_however_a_checkpoint_is_loaded(tmp_path):
    model = small_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = [HybridSleepForCausalLM.from_pretrained(tmp_path, dtype=BF16)]
    with init_empty_weights():
        empty = HybridSleepForCausalLM(small_config()).to(BF16)
    loaded.append(load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"}))
    for other in loaded:
        assert other.dtype == BF16
        for name, parameter in gates(other).items():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, gates(model)[name])
    assert loaded[0](torch.tensor([[1, 2, 3]])).logits.dtype == BF16
