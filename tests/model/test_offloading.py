"""accelerate's hooks: weights that are on the device only while their own module runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import send_to_device
from small import gap, small_ids, small_model

from hybrid_sleep import HybridSleepForCausalLM, SleepCache
from hybrid_sleep.layers.context import Context
from hybrid_sleep.sleep.masks import build_mask
from hybrid_sleep.sleep.weights import weights_digest

IDS = small_ids(2, 11)
KINDS = {
    "gated_deltanet": {},
    "mamba2": {"state_space": "mamba2"},
    "sliding": {"eviction": "sliding", "state_space": "mamba2"},
    "shared": {"distinct_layers": 2, "tie_word_embeddings": True, "loop": (1, 3)},
}


@torch.no_grad()
def use(model: HybridSleepForCausalLM, place: Path) -> list[torch.Tensor]:
    """What a model does without gradients, as tensors to compare."""
    out = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True)
    cache = out.cache
    model.sleep(cache)
    cache.save_pretrained(place)
    cache = SleepCache.from_pretrained(place, model=model)
    state = list(cache.fast_weights.values())
    return [out.sequences, *state, model(IDS[:, :1], cache=cache).logits]


@torch.no_grad()
def read_oddly(model: HybridSleepForCausalLM) -> list[torch.Tensor]:
    """Pads, labels, documents, and no document at all."""
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    documents = torch.arange(IDS.shape[1]).expand(2, -1) // 6
    return [
        model(IDS, attention_mask=mask, labels=IDS).loss,
        model(IDS, document_ids=documents).logits,
        model(IDS, document_ids=torch.full_like(IDS, -1)).logits,
    ]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_module_may_be_offloaded(kind, tmp_path):
    model = small_model(sleep_passes=3, **KINDS[kind])
    odd = kind == "gated_deltanet"
    want = use(model, tmp_path / "plain") + (read_oddly(model) if odd else [])
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert same(use(model, tmp_path / "offloaded") + (read_oddly(model) if odd else []), want)


def test_a_device_map_with_layers_on_disk_loads_runs_and_saves(tmp_path):
    small_model(sleep_passes=2).save_pretrained(tmp_path / "model")
    plain = HybridSleepForCausalLM.from_pretrained(tmp_path / "model")
    places = {
        **{"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"},
        **{"model.layers.2": "disk", "model.layers.3": "cpu", "model.norm": "cpu"},
        **{"model.rotary": "cpu", "lm_head": "disk"},
    }
    model = HybridSleepForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
    )
    assert model.model.layers[1].mixer.A_log.is_meta
    want, got = use(plain, tmp_path / "plain"), use(model, tmp_path / "mapped")
    # Weights that were loaded twice may be aligned differently, which changes the order of sums.
    assert all(gap(x, y) < 1e-12 for x, y in zip(got, want, strict=True))
    model.save_pretrained(tmp_path / "again")
    again = HybridSleepForCausalLM.from_pretrained(tmp_path / "again")
    assert weights_digest(again) == weights_digest(plain) == weights_digest(model)


def test_hooks_take_all_of_a_context_to_another_device():
    attention = build_mask(torch.tensor([1, 2]), torch.tensor([2, 1]), 2)
    ones, mask = torch.ones(2, 2, 6), attention.mask[:, 0, 0]
    context = Context(ones, ones, attention, mask, True)
    moved = send_to_device(context, "meta")
    assert isinstance(moved, Context) and moved.keep_tails is True
    for x in (moved.cos, moved.sin, moved.mask, moved.attention.gather, moved.attention.mask):
        assert x.is_meta
