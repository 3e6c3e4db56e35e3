"""Compound tokens: ids of several digits, whose embedding is the sum of one vector for each."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from editable import VOCAB as WORDS
from editable import tiny_hybrid, word_tokenizer
from small import expect, gap, small_config, small_ids, small_model
from transformers import AutoModel, AutoModelForCausalLM

from hybrid_sleep import HybridSleepForCausalLM, SleepCache
from hybrid_sleep.layers.embedding import CompoundEmbedding
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.fisher import left_out
from hybrid_sleep.parametric.trace import Probe, Runs
from hybrid_sleep.training.optimizer import parameter_groups

FIELDS = [[2, 3, 4], [4, 6], [24, 1], [1, 8, 1, 3], [3, 2, 2, 2]]
every_fields = pytest.mark.parametrize("fields", FIELDS)
IDS = small_ids(2, 17, vocab=24)


def hot(fields: list[int]) -> torch.Tensor:
    """`[V, sum(fields)]`: which rows of the weight are in the embedding of each id, counted out."""
    rows = []
    for digits in product(*map(range, fields)):
        parts = (torch.eye(f, dtype=torch.float64)[d] for f, d in zip(fields, digits, strict=True))
        rows.append(torch.cat([*parts]))
    return torch.stack(rows)


def compound(fields: list[int], **changes) -> HybridSleepForCausalLM:
    return small_model(vocab_size=24, token_fields=fields, **changes)


def spelled_out(model: HybridSleepForCausalLM) -> HybridSleepForCausalLM:
    """The same model with a row for every token."""
    plain = small_model(**{**changes_of(model), "token_fields": None})
    state = model.state_dict()
    name = "model.embed_tokens.weight"
    plain.load_state_dict({**state, name: hot(model.config.token_fields) @ state[name]})
    return plain


def changes_of(model: HybridSleepForCausalLM) -> dict:
    names = ("vocab_size", "state_space", "eviction", "loop")
    return {name: getattr(model.config, name) for name in names}


@every_fields
def test_an_embedding_is_its_digits_one_hot_times_the_weight(fields):
    embed = compound(fields).get_input_embeddings()
    assert embed.weight.shape == (sum(fields), 12)
    table = hot(fields) @ embed.weight
    assert gap(embed.table(), table) <= 1e-14
    for ids in (IDS, IDS.int(), IDS[0], IDS[0, 0], IDS[:, :0]):
        assert embed(ids).shape == (*ids.shape, 12)
        assert torch.equal(embed(ids), embed.table()[ids.long()])


def test_the_last_digit_runs_fastest():
    embed = CompoundEmbedding([2, 3, 4], 1)
    with torch.no_grad():
        embed.weight.copy_(torch.tensor([0, 100, 0, 10, 20, 0, 1, 2, 3.0])[:, None])
    assert embed(torch.tensor([0, 3, 4, 11, 12, 23]))[:, 0].tolist() == [0, 3, 10, 23, 100, 123]


@pytest.mark.parametrize("wrong", [-1, -24, 24, 47, 48])
def test_an_id_out_of_range_is_refused_and_does_not_wrap_around(wrong):
    model = compound([2, 3, 4])
    with pytest.raises(IndexError):
        model.get_input_embeddings()(torch.tensor([[1, wrong]]))
    with pytest.raises(ValueError, match=rf"input_ids must be token ids in 0..23, got {wrong}"):
        model(torch.tensor([[1, wrong]]))


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ([2, 3, 4], {}),
        ([4, 6], {"state_space": "mamba2", "loop": (1, 3)}),
        ([1, 8, 1, 3], {"eviction": "sliding"}),
    ],
)
def test_it_reads_and_sleeps_as_the_model_with_a_row_for_every_token(fields, changes):
    model = compound(fields, **changes)
    got, want = (m(IDS, sleep_passes=3) for m in (model, spelled_out(model)))
    assert gap(got.logits, want.logits) <= 1e-10
    assert got.cache.fast_weights.keys() == want.cache.fast_weights.keys()
    for i, S in want.cache.fast_weights.items():
        assert gap(got.cache.fast_weights[i], S) <= 1e-10
    for b, row in enumerate(IDS):
        specified = expect(model, row, 3)
        assert gap(got.logits[b], torch.stack(specified.logits)) <= 1e-10
        for i, S in specified.S.items():
            assert gap(got.cache.fast_weights[i][b], S) <= 1e-10


@every_fields
def test_a_digit_gets_the_gradients_of_all_tokens_that_have_it(fields):
    model = compound(fields)
    plain = spelled_out(model)
    weigh = torch.randn(2, 17, 24, dtype=torch.float64)
    for each in (model, plain):
        (each(IDS, sleep_passes=2).logits * weigh).sum().backward()
    rows = plain.model.embed_tokens.weight.grad
    assert rows.abs().sum() > 0
    assert gap(model.model.embed_tokens.weight.grad, hot(fields).T @ rows) <= 1e-10
    others = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if "embed" not in name:
            assert gap(parameter.grad, others[name].grad) <= 1e-10, name


def test_generation_is_that_of_the_model_with_a_row_for_every_token():
    model = compound([2, 3, 4])
    how = {"max_new_tokens": 8, "do_sample": False, "sleep_passes": 2}
    assert torch.equal(model.generate(IDS, **how), spelled_out(model).generate(IDS, **how))


def test_a_saved_model_and_its_cache_come_back(tmp_path):
    model = compound([2, 3, 4])
    cache = model(IDS, sleep_passes=2).cache
    model.save_pretrained(tmp_path)
    cache.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.token_fields == [2, 3, 4]
    assert gap(again(IDS, sleep_passes=2).logits, model(IDS, sleep_passes=2).logits) <= 1e-12
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path).embed_tokens.weight, model.model.embed_tokens.weight
    )
    loaded = SleepCache.from_pretrained(tmp_path, model=again)
    assert all(torch.equal(loaded.fast_weights[i], S) for i, S in cache.fast_weights.items())
    # Of the same shape, and another token behind almost every id.
    again.config.token_fields = [4, 3, 2]
    with pytest.raises(ValueError, match=r"token_fields=\[2, 3, 4\] \(model: \[4, 3, 2\]\)"):
        SleepCache.from_pretrained(tmp_path, model=again)


@pytest.mark.parametrize("own", [None, 2.0])
def test_initial_values_follow_the_config(own):
    torch.manual_seed(3)
    config = small_config(
        vocab_size=1024, token_fields=[32, 32], hidden_size=96, initializer_range=0.5,
        embedding_initializer_range=own,
    )  # fmt: skip
    weight, spread = HybridSleepForCausalLM(config).model.embed_tokens.weight, own or 0.5
    assert abs(weight.std().item() - spread) < 4 * spread / (2 * weight.numel()) ** 0.5


@pytest.mark.parametrize("how", [{"new_num_tokens": 25}, {"pad_to_multiple_of": 8}])
def test_another_number_of_tokens_is_refused(how):
    model = compound([2, 3, 4])
    embed, state = model.get_input_embeddings(), model.state_dict()
    for each in (model, model.model):
        with pytest.raises(ValueError, match=r"new_num_tokens must be None or 24, .*\[2, 3, 4\]"):
            each.resize_token_embeddings(**how)
        for same in (None, 24):
            assert each.resize_token_embeddings(same) is embed
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert model.config.vocab_size == 24


@pytest.mark.parametrize("lr_muon", [0.1, None])
def test_the_optimizer_takes_it_for_embeddings(lr_muon):
    model = compound([2, 3, 4])
    weight = model.get_input_embeddings().weight
    (group,) = (
        group
        for group in parameter_groups(model, lr_muon, 0.01, weight_decay=0.1)
        if any(p is weight for p in group["params"])
    )
    assert "algorithm" not in group and (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    assert left_out(model)["model.embed_tokens.weight"] == "embedding"


def test_the_noise_of_a_trace_is_as_wide_as_for_a_row_for_every_token():
    fields = [3, WORDS // 3]
    model, plain = tiny_hybrid(token_fields=fields), tiny_hybrid()
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(hot(fields) @ weight)
        relation = Relation("lives in", ("{} lives in",), ("Where does {} live ?",))
        probe = Probe.of(word_tokenizer(), Fact("Ada Byron", "lives in", "Lisbon"), relation)
        noises = []
        for each in (model, plain):
            runs = Runs(each, [probe])
            runs.draw(3.0, [(0, 0)])
            noises.append(runs.noise)
    assert noises[0].abs().sum() > 0 and gap(*noises) <= 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([24], r"token_fields must be None or a list of at least two integers, got \[24\]"),
        ([], r"token_fields must be None or a list of at least two integers, got \[\]"),
        (24, "token_fields must be None or a list of at least two integers, got 24"),
        ("46", "token_fields must be None or a list of at least two integers, got '46'"),
        ([24, 0], r"token_fields\[1\] must be an integer of at least 1, got 0"),
        ([-4, -6], r"token_fields\[0\] must be an integer of at least 1, got -4"),
        ([4.0, 6], r"token_fields\[0\] must be an integer of at least 1, got 4.0"),
        ([24, True], r"token_fields\[1\] must be an integer of at least 1, got True"),
        ([4, 5], r"token_fields must have the product vocab_size=24, got \[4, 5\], .* is 20"),
    ],
)
def test_what_are_no_fields_is_refused(given, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        small_config(vocab_size=24, token_fields=given)


def test_tied_embeddings_are_refused():
    message = r"^token_fields must be None where tie_word_embeddings is True, got \[4, 6\]"
    with pytest.raises(ValueError, match=message):
        small_config(vocab_size=24, token_fields=[4, 6], tie_word_embeddings=True)


def test_a_tuple_is_the_list_that_a_file_has():
    assert small_config(vocab_size=24, token_fields=(4, 6)).token_fields == [4, 6]
    assert small_config().token_fields is None
