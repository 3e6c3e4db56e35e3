"""Where edits go, by the kind of model, and what is seen and added there."""

from __future__ import annotations

import pytest
import torch
import transformers
from editable import tiny_hybrid, tiny_llama
from small import small_ids, small_model
from torch import nn

from hybrid_sleep.parametric.factors import Factors
from hybrid_sleep.parametric.sites import (
    Site,
    added,
    blocks,
    capture,
    ending,
    find_sites,
    frozen,
    side_branch,
    site_at,
)

QWEN3_NEXT = {
    "vocab_size": 11, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 4,
    "linear_value_head_dim": 4, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 6,
    "num_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager",
}  # fmt: skip


def made(name: str, **config):
    config = getattr(transformers, f"{name}Config")(**config)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    # Grouped matrix products of experts have no fp64.
    return getattr(transformers, kind)(config).eval()


def gpt2():
    return made("GPT2", vocab_size=11, n_embd=12, n_inner=20, n_layer=2, n_head=2, n_positions=32)


# The model, the module of block 1 (or of the only one that has a site), o and d.
FOUND = {
    "ours": (lambda: small_model(), "model.layers.1.mlp.down_proj", 12, 10),
    "ours without MLP": (
        lambda: small_model(intermediate_size=0), "model.layers.1.mixer.o_proj", 12, 6,
    ),
    "llama": (lambda: tiny_llama(), "model.layers.1.mlp.down_proj", 16, 20),
    "gpt2": (gpt2, "transformer.h.1.mlp.c_proj", 12, 20),
    "gpt_neox": (
        lambda: made(
            "GPTNeoX", vocab_size=11, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
            num_attention_heads=2,
        ), "gpt_neox.layers.1.mlp.dense_4h_to_h", 12, 20,
    ),
    "opt": (
        lambda: made(
            "OPT", vocab_size=11, hidden_size=12, ffn_dim=20, num_hidden_layers=2,
            num_attention_heads=2, word_embed_proj_dim=12,
        ), "model.decoder.layers.1.fc2", 12, 20,
    ),
    "mamba": (
        lambda: made("Mamba", vocab_size=11, hidden_size=12, num_hidden_layers=2, state_size=4),
        "backbone.layers.1.mixer.out_proj", 12, 24,
    ),
    "mamba2": (
        lambda: made(
            "Mamba2", vocab_size=11, hidden_size=12, num_hidden_layers=2, state_size=4,
            num_heads=3, head_dim=8, n_groups=1,
        ), "backbone.layers.1.mixer.out_proj", 12, 24,
    ),
    "qwen3_next with one dense block": (
        lambda: made("Qwen3Next", **QWEN3_NEXT, mlp_only_layers=[1]),
        "model.layers.1.mlp.down_proj", 12, 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_a_site_is_the_last_linear_layer_of_a_block(kind):
    make, name, outputs, inputs = FOUND[kind]
    model = make()
    sites = find_sites(model)
    layers = [1] if "one dense" in kind else list(range(len(blocks(model)[1])))
    assert [site.layer for site in sites] == layers
    site = site_at(model, 1)
    assert (site.name, site.outputs, site.inputs) == (name, outputs, inputs)
    assert site.transposed == (kind == "gpt2") and site.dense
    assert dict(model.named_parameters())[site.parameter].numel() == outputs * inputs
    # It is what the model applies, and it writes into the residual stream.
    ids = small_ids(2, 5)
    with torch.no_grad(), capture(model, [site]) as seen:
        before = model(input_ids=ids, use_cache=False).logits
        # OPT flattens rows in front of its MLP.
        shape = (10, inputs) if kind == "opt" else (2, 5, inputs)
        assert [tuple(keys.shape) for keys in seen[site]] == [shape]
        part = Factors(torch.randn(outputs, 1), torch.randn(1, inputs), torch.empty(0), None)
        with added(model, {site: part}):
            assert (model(input_ids=ids, use_cache=False).logits - before).abs().max() > 1e-6


def test_models_without_a_site_are_refused():
    with pytest.raises(ValueError, match="Qwen3NextForCausalLM"):
        find_sites(made("Qwen3Next", **QWEN3_NEXT))
    with pytest.raises(ValueError, match="blocks in a ModuleList, got Linear"):
        find_sites(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\[0, 1, 2\], got 3"):
        site_at(tiny_llama(), 3)


def test_an_adapter_around_a_layer_is_no_dense_weight_and_neither_is_one_of_8_bits():
    model = tiny_llama()
    site = site_at(model, 1)
    inner = model.get_submodule(site.name)

    class Wrapped(nn.Module):
        in_features, out_features = inner.in_features, inner.out_features

        def __init__(self):
            super().__init__()
            self.base_layer = inner

        weight = property(lambda self: self.base_layer.weight)

    model.model.layers[1].mlp.down_proj = Wrapped()
    assert not site_at(model, 1).dense and site_at(model, 0).dense
    small = nn.Linear(inner.in_features, inner.out_features, bias=False)
    small.weight = nn.Parameter(small.weight.to(torch.float8_e4m3fn), requires_grad=False)
    model.model.layers[1].mlp.down_proj = small
    assert not site_at(model, 1).dense


def test_every_application_of_a_shared_block_is_seen():
    model = small_model(distinct_layers=2)
    assert [site.layer for site in find_sites(model)] == [0, 1]
    site, ids = site_at(model, 1), small_ids(2, 4)
    wanted = []
    hook = model.get_submodule(site.name).register_forward_pre_hook(
        lambda module, given: wanted.append(given[0])
    )
    with torch.no_grad(), capture(model, [site]) as seen:
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    assert len(states) == 5 and len(seen[site]) == len(wanted) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen[site], wanted, strict=True))
    assert not torch.allclose(*seen[site])


def test_blocks_are_those_that_predict_where_later_passes_have_more():
    model = small_model(distinct_passes=4)
    name, stack = blocks(model)
    assert name == "model.layers" and stack is model.model.layers
    assert {site.name.split(".")[1] for site in find_sites(model)} == {"layers"}


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_every_pass_of_a_sleep_is_seen(passes):
    model = small_model()
    site = site_at(model, 1)
    with torch.no_grad(), capture(model, [site]) as seen:
        # Three windows, of which two sleep.
        model(input_ids=small_ids(1, 12), use_cache=False, sleep_passes=passes)
    # A last pass applies no MLP behind the last writer, which is in block 3.
    assert [keys.shape[1] for keys in seen[site]] == [5] * passes + [5] * passes + [2]


ENDING = {
    "llama": (tiny_llama, 1),
    "gpt2": (lambda: gpt2(), 1),
    "ours": (tiny_hybrid, 1),
    "ours, shared": (lambda: small_model(distinct_layers=2), 0),
    # Windows of 5, here and in the one above, of which all but the last sleep.
    "ours, asleep": (lambda: small_model(sleep_passes=3), 1),
}


@pytest.mark.parametrize("kind", ENDING)
def test_a_run_that_ends_early_has_seen_every_key(kind):
    make, layer = ENDING[kind]
    model = make()
    site = site_at(model, layer)
    rows = [small_ids(2, length, seed=length) for length in (12, 12, 7, 3)]
    wanted = []
    for ids in rows:
        with torch.no_grad(), capture(model, [site]) as seen:
            model(input_ids=ids, use_cache=False)
        wanted.append(list(seen[site]))
    heads = []
    hook = model.lm_head.register_forward_hook(lambda *args: heads.append(1))
    with torch.no_grad(), capture(model, [site]) as seen, ending(model, layer) as run:
        for ids, keys in zip(rows, wanted, strict=True):
            run(input_ids=ids)
            assert len(seen[site]) == len(keys)
            assert all(torch.equal(a, b) for a, b in zip(seen[site], keys, strict=True))
            seen[site].clear()
    hook.remove()
    # Rows with fewer windows go to the end, as nobody knows where theirs is.
    assert len(heads) == (3 if model.config.to_dict().get("window") == 5 else 1)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("make", [tiny_hybrid, gpt2])
def test_added_is_the_dense_sum(make):
    model, ids = make(), small_ids(2, 6)
    sites = find_sites(model)[:2]
    generator = torch.Generator().manual_seed(0)
    parts = {
        site: Factors(
            torch.randn(site.outputs, 2, generator=generator),
            torch.randn(2, site.inputs, generator=generator),
            torch.empty(0), torch.empty(0),
        )
        for site in sites
    }  # fmt: skip
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        with added(model, parts):
            got = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        for site, part in parts.items():
            dense = part.left.double() @ part.right.double()
            weight = dict(model.named_parameters())[site.parameter]
            weight.add_(dense.T if site.transposed else dense)
        wanted = model(input_ids=ids, use_cache=False).logits
    assert (wanted - plain).abs().max() > 1e-2
    # The branch computes in the factors' fp32.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_stays_behind_an_exception():
    model = tiny_llama()
    sites = find_sites(model)
    part = Factors(torch.ones(16, 1), torch.ones(1, 20), torch.empty(0), torch.empty(0))
    for context in (capture(model, sites), added(model, {sites[0]: part}), frozen(model)):
        with pytest.raises(KeyError), context:
            raise KeyError
    missing = Site(9, "model.layers.9.mlp.down_proj", 20, 16)
    for context in (
        capture(model, [sites[0], missing]),
        added(model, {sites[0]: part, missing: part}),
    ):
        with pytest.raises(AttributeError), context:
            pass
    assert hooks_of(model) == 0
    branch = side_branch(model, sites[0], [part, part])
    assert branch.left.shape == (16, 2) and hooks_of(model) == 1
    branch.handle.remove()
    assert hooks_of(model) == 0


def test_frozen_gives_back_what_it_took():
    model = tiny_llama().train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    asking = [p.requires_grad for p in model.parameters()]
    with frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == asking
    assert True in modes and False in modes and True in asking and False in asking
