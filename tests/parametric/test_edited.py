"""Edited weights: what they are in fp64, and that they come back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from editable import tiny_gpt2, tiny_hybrid, tiny_llama
from small import small_ids
from torch import nn

from hybrid_sleep.parametric.edited import EditedWeights
from hybrid_sleep.parametric.factors import Factors, merged
from hybrid_sleep.parametric.sites import find_sites, site_at
from hybrid_sleep.sleep.weights import weights_digest, weights_version


def factors_of(site, rank=2, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        scale * torch.randn(site.outputs, rank, generator=generator),
        torch.randn(rank, site.inputs, generator=generator),
        torch.randn(rank, site.inputs, generator=generator),
        torch.arange(rank),
    )


def bits(tensor):
    return tensor.detach().clone().contiguous().view(torch.uint8)


def all_bits(model):
    return {name: bits(p) for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weight_of(model, site):
    return dict(model.named_parameters())[site.parameter]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [tiny_hybrid, tiny_gpt2])
def test_the_sum_is_rounded_once_and_undone_bit_for_bit(make, dtype):
    model = make().to(dtype)
    sites = find_sites(model)[:2]
    before = all_bits(model)
    edited = EditedWeights(model)
    edited.keep(sites)
    commits = [
        {site.name: factors_of(site, seed=10 * i + site.layer) for site in sites} for i in range(3)
    ]
    pristine = {site: weight_of(model, site).detach().clone() for site in sites}
    states = []
    for count in (1, 2, 3):
        assert edited.materialise(commits[:count])
        states.append(all_bits(model))
        for site in sites:
            total = pristine[site].double()
            for commit in commits[:count]:
                part = commit[site.name]
                dense = part.left.double() @ part.right.double()
                total = total + (dense.T if site.transposed else dense)
            got = weight_of(model, site)
            assert got.dtype == dtype
            # Two fp64 sums in another order may fall on two sides of a rounding.
            near = (got.double() - total.to(dtype).double()).abs() > 1e-12
            assert near.float().mean() < 0.01
            torch.testing.assert_close(got.double(), total, rtol=torch.finfo(dtype).eps, atol=1e-12)
    # Undone in any order, and made again.
    for count, wanted in ((2, states[1]), (0, before), (3, states[2]), (1, states[0]), (0, before)):
        assert edited.materialise(commits[:count])
        assert same(all_bits(model), wanted)
    # Merged, as a store keeps them, they are the same.
    edited.materialise([merged(commits)])
    assert same(all_bits(model), states[2])
    assert edited.change().keys() == {site.name for site in sites}
    for site in sites:
        step = weight_of(model, site).detach().double() - pristine[site].double()
        wanted = float(step.norm() / pristine[site].double().norm())
        assert edited.change()[site.name] == pytest.approx(wanted, rel=1e-9)


def test_small_edits_are_not_lost_one_by_one():
    """Each is below what bf16 can hold; only their sum is not."""
    model = tiny_llama().bfloat16()
    site = site_at(model, 0)
    edited = EditedWeights(model)
    edited.keep([site])
    weight = weight_of(model, site)
    with torch.no_grad():
        weight.fill_(1.0)
    edited.pristine[site.parameter] = weight.detach().clone()
    part = Factors(
        torch.full((site.outputs, 1), 1e-3),
        torch.ones(1, site.inputs),
        torch.ones(1),
        torch.ones(1),
    )
    assert not edited.materialise([{site.name: part}])
    assert edited.materialise([{site.name: part}] * 8)
    assert torch.equal(weight, torch.full_like(weight, 1.0078125))


def test_signs_of_zeros_and_nans_count_as_bits():
    model = tiny_llama().float()
    site = site_at(model, 1)
    with torch.no_grad():
        weight = weight_of(model, site)
        weight[0, :4] = torch.tensor([-0.0, 0.0, float("nan"), float("inf")])
    edited = EditedWeights(model)
    edited.keep([site])
    before, part = bits(weight), factors_of(site)
    version = weights_version(model)
    nothing = Factors(part.left[:, :0], part.right[:0], part.keys[:0], part.facts[:0])
    assert not edited.materialise([]) and not edited.materialise([{site.name: nothing}])
    assert weights_version(model) == version and edited.digest() == edited.base
    minus = Factors(-part.left, part.right, part.keys, part.facts)
    assert edited.materialise([{site.name: part}])
    edited.materialise([{site.name: part}, {site.name: minus}])
    assert edited.materialise([])
    assert torch.equal(bits(weight), before) and edited.digest() == edited.base


def test_the_version_counts_changes_of_bits_alone():
    model = tiny_hybrid()
    site = site_at(model, 1)
    edited = EditedWeights(model)
    start = weights_version(model)
    edited.keep([site])
    assert not edited.materialise([]) and weights_version(model) == start
    part = {site.name: factors_of(site)}
    assert edited.materialise([part])
    first = weights_version(model)
    assert first > start and model.config.weights_version == 1
    assert not edited.materialise([part]) and weights_version(model) == first
    assert edited.materialise([]) and weights_version(model) > first
    # Never the same again, or a cache from between would pass.
    assert model.config.weights_version == 2


def test_the_digest_says_which_weights_there_are():
    model = tiny_llama().float()
    first, second = find_sites(model)[:2]
    edited = EditedWeights(model)
    edited.keep([first, second])
    assert edited.base == weights_digest(model) == edited.digest()
    one, two = {first.name: factors_of(first)}, {second.name: factors_of(second)}
    seen = [edited.base]
    for commits in ([one], [two], [one, two], [one, one]):
        edited.materialise(commits)
        seen.append(edited.digest())
        assert edited.base == seen[0] and weights_digest(model) != edited.base
    assert len(set(seen)) == 5
    edited.materialise([two, one])
    assert edited.digest() == seen[3]
    edited.materialise([])
    assert edited.digest() == edited.base == weights_digest(model)
    assert EditedWeights(tiny_llama(initializer_range=0.2).float()).base != edited.base


def test_edits_are_added_to_what_was_trained_and_both_go_back_bit_for_bit():
    model = tiny_llama().float()
    site = find_sites(model)[0]
    other = "model.layers.0.self_attn.q_proj.weight"
    edited = EditedWeights(model)
    before = all_bits(model)
    edited.keep([site])
    assert edited.keep_parameters([other, site.parameter]).keys() == {other}
    trained = {n: edited.pristine[n] + 0.25 for n in (other, site.parameter)}
    edit = {site.name: factors_of(site)}
    edited.learn(trained)
    assert edited.unedited() != edited.base == edited.digest()
    assert edited.materialise([edit])
    both, digest = all_bits(model), edited.digest()
    part = edit[site.name]
    want = trained[site.parameter].double() + part.left.double() @ part.right.double()
    assert torch.equal(weight_of(model, site), want.float())
    assert torch.equal(dict(model.named_parameters())[other], trained[other])
    assert edited.materialise([]) and edited.digest() == edited.unedited() != digest
    edited.learn({})
    assert edited.materialise([edit]) and edited.digest() != digest
    edited.learn(trained)
    assert edited.materialise([edit]) and same(all_bits(model), both)
    edited.learn({})
    assert edited.materialise([]) and same(all_bits(model), before)
    assert edited.unedited() == edited.base == edited.digest()
    for wrong in ({"lm_head.weight": torch.ones(1)}, {other: trained[other].double()}):
        with pytest.raises(ValueError, match="weights must be of parameters whose pristine"):
            edited.learn(wrong)
    assert edited.learned == {}


def test_a_saved_model_that_was_edited_knows_what_it_was(tmp_path):
    model = tiny_hybrid().float()
    site = site_at(model, 1)
    edited = EditedWeights(model)
    pristine = edited.keep([site])
    assert list(pristine) == [site.parameter] and edited.keep([site]) == {}
    commits = [{site.name: factors_of(site)}]
    edited.materialise(commits)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    reopened = EditedWeights(again, pristine)
    assert reopened.base == edited.base and reopened.digest() == edited.digest()
    assert not reopened.materialise(commits)
    assert reopened.materialise([]) and weights_digest(again) == edited.base
    # An ordinary model: nothing but its weights tells.
    assert EditedWeights(type(model).from_pretrained(tmp_path)).base != edited.base


def test_what_does_not_fit_is_refused_before_anything_changes():
    model = tiny_llama().float()
    first, second, _ = find_sites(model)
    edited = EditedWeights(model)
    edited.keep([first])
    edited.materialise([{first.name: factors_of(first)}])
    before, version = all_bits(model), weights_version(model)
    good = factors_of(first, seed=3)
    wide = Factors(good.left, good.right[:, :-1], good.keys, good.facts)
    for bad, message in [
        ({"model.layers.9.mlp.down_proj": good}, "must be of a site of the model"),
        ({second.name: factors_of(second)}, "whose pristine weights are kept"),
        ({first.name: wide}, "must make 16 x 20, got 16 x 19"),
    ]:
        with pytest.raises(ValueError, match=message):
            edited.materialise([{first.name: good}, bad])
        assert same(all_bits(model), before) and weights_version(model) == version
    kept = edited.pristine
    for wrong, message in [
        ({"x": kept[first.parameter]}, "'x' as torch.float32 of shape .16, 20., got none"),
        ({first.parameter: kept[first.parameter].half()}, "float16 of shape .*, got torch.float32"),
        ({first.parameter: kept[first.parameter][1:]}, "of shape .15, 20., got .* shape .16, 20."),
    ]:
        with pytest.raises(ValueError, match=message):
            EditedWeights(model, wrong)
    assert same(all_bits(model), before)


class Quantised(nn.Module):
    """A linear layer of 8 bits, as such libraries have them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        whole = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_beside_a_quantised_layer_edits_stay_as_factors(tmp_path):
    model, ids = tiny_llama(), small_ids(2, 6)
    for block in model.model.layers:
        block.mlp.down_proj = Quantised(block.mlp.down_proj)
    dense = copy.deepcopy(model)
    site = site_at(model, 1)
    assert not site.dense
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        edited = EditedWeights(model)
        assert edited.keep([site]) == {} and edited.base == weights_digest(model)
        before, version = all_bits(model), weights_version(model)
        commits = [{site.name: factors_of(site, seed=i)} for i in range(2)]
        assert edited.materialise(commits) and weights_version(model) > version
        got = model(input_ids=ids).logits
        module = dense.get_submodule(site.name)
        whole = nn.Linear(site.inputs, site.outputs, bias=False).double()
        whole.weight.copy_(module.weight.double() * module.scale)
        for commit in commits:
            whole.weight += commit[site.name].left.double() @ commit[site.name].right.double()
        dense.model.layers[1].mlp.down_proj = whole
        wanted = dense(input_ids=ids).logits
        assert (wanted - plain).abs().max() > 1e-2
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        digest, version = edited.digest(), weights_version(model)
        assert digest != edited.base and same(all_bits(model), before)
        assert not edited.materialise(commits) and weights_version(model) == version
        torch.testing.assert_close(model(input_ids=ids).logits, got, rtol=0, atol=0)
        # Replaced, not put on top of each other.
        assert edited.materialise(commits[:1]) and edited.digest() not in (digest, edited.base)
        assert len(model.get_submodule(site.name)._forward_hooks) == 1
        assert edited.materialise([]) and edited.digest() == edited.base
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert not model.get_submodule(site.name)._forward_hooks
