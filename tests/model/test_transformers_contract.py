"""What transformers' own tests demand of a causal language model, and what this one refuses.

Where a check stands elsewhere it is not repeated: activation checkpointing
(test_transformers_checkpointing), dtypes (test_dtypes), offloading (test_offloading), compiling
(test_torch_compile), names in lists (test_registration), beams, caches, loading in a new process.

What of transformers' `test_modeling_common` does not fit: it asks for attention weights (see
`REFUSED`), for layers of the class GradientCheckpointingLayer (recomputation is our own), and for
gradients at hidden states (which are put together from windows).
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from marks import slow
from safetensors.torch import load_file, save_file
from small import VOCAB, gap, small_config, small_ids, small_model
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM, HybridSleepModel

KINDS = {
    "no sleep": {"window": 64},
    "hard": {"window": 4, "sleep_passes": 2},
    "sliding": {"window": 4, "sleep_passes": 2, "eviction": "sliding"},
    "mamba2": {"window": 4, "sleep_passes": 2, "state_space": "mamba2"},
    "loop, shared, tied": {
        "window": 4,
        "sleep_passes": 3,
        "loop": (1, 3),
        "distinct_layers": 2,
        "tie_word_embeddings": True,
    },
}
IDS = small_ids(2, 10)


# Every part of "hard" is one of another kind too.
@pytest.fixture(scope="module", params=[slow(k) if k == "hard" else k for k in KINDS])
def model(request) -> HybridSleepForCausalLM:
    """Shared; a test that changes it takes a copy."""
    return small_model(**KINDS[request.param]).requires_grad_(False)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="4KB")
    return folder


def logits(model: torch.nn.Module, **given) -> torch.Tensor:
    with torch.no_grad():
        return model(**({"input_ids": IDS} | given)).logits


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_sharded_checkpoints_come_back(model, saved):
    assert len(list(saved.glob("*.safetensors"))) > 1
    again, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same_state(again, model)
    before, after = model.config.to_dict(), again.config.to_dict()
    assert after | {"_name_or_path": ""} == before | {"_name_or_path": ""}
    assert all(p.is_contiguous() for p in again.parameters())
    assert gap(logits(again), logits(model)) < 1e-12


def test_backbone_and_head_read_each_others_checkpoints(model, saved, tmp_path):
    backbone = AutoModel.from_pretrained(saved)
    assert isinstance(backbone, HybridSleepModel) and same_state(backbone, model.model)
    backbone.save_pretrained(tmp_path)
    whole, info = HybridSleepForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert same_state(whole.model, model.model)
    tied = model.config.tie_word_embeddings
    assert info["missing_keys"] == (set() if tied else {"lm_head.weight"})
    assert torch.isfinite(whole.lm_head.weight).all()


@pytest.fixture
def unfilled_memory_is_nan():
    """What an initialisation forgets shows as nan, not as whatever the memory held before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def load_without(lost, model, saved, folder):
    state = {k: v for path in saved.glob("*.safetensors") for k, v in load_file(path).items()}
    missing = {n for n in state if lost(n)}
    save_file({n: v for n, v in state.items() if n not in missing}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    again, info = HybridSleepForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert missing <= info["missing_keys"] | {"lm_head.weight"} and not info["unexpected_keys"]
    for name, parameter in again.named_parameters():
        assert torch.isfinite(parameter).all() and not parameter.is_meta, name
        if name not in missing:
            assert torch.equal(parameter, state[name]), name
    return again


def test_missing_weights_are_named_and_initialised_and_the_rest_is_kept(
    model, saved, tmp_path, unfilled_memory_is_nan
):
    again = load_without(
        lambda n: ".1." in n or n == "model.embed_tokens.weight", model, saved, tmp_path
    )
    mixer = again.model.layers[1].mixer
    assert ((mixer.A_log.exp() >= 1) & (mixer.A_log.exp() <= 16)).all()
    assert (mixer.o_norm.weight == 1).all()


@pytest.mark.parametrize("kind", ["no sleep", "mamba2"])
def test_one_missing_weight_of_a_mixer_leaves_the_others(kind, tmp_path, unfilled_memory_is_nan):
    model = small_model(**KINDS[kind])
    model.save_pretrained(tmp_path / "saved")
    names = [n for n, _ in model.named_parameters() if ".1.mixer." in n]
    for lost in names:
        folder = tmp_path / lost
        folder.mkdir()
        load_without(lambda n, lost=lost: n == lost, model, tmp_path / "saved", folder)


def test_weights_of_another_shape_are_refused_or_made_anew(model, saved):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        HybridSleepForCausalLM.from_pretrained(saved, vocab_size=VOCAB + 1)
    other = HybridSleepForCausalLM.from_pretrained(
        saved, vocab_size=VOCAB + 1, ignore_mismatched_sizes=True
    )
    assert len(other.lm_head.weight) == VOCAB + 1
    assert same_state(other.model.layers, model.model.layers)


def test_a_model_made_on_meta_and_filled_later_is_the_same(model):
    with torch.device("meta"):
        empty = HybridSleepForCausalLM(copy.deepcopy(model.config))
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert torch.equal(logits(empty.eval()), logits(model))


def test_all_tensors_are_parameters_and_tied_ones_are_one(model):
    # Frequencies are worked out from the config on first use.
    held = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and name != "_frequencies":
                assert id(value) in held, name
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head


@pytest.mark.parametrize("size", [VOCAB + 5, VOCAB - 3])
def test_resized_embeddings_keep_what_they_had(model, size):
    other = copy.deepcopy(model)
    other.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, VOCAB)
    assert other.config.vocab_size == size == other.get_input_embeddings().num_embeddings
    assert len(other.lm_head.weight) == size
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == (
        model.config.tie_word_embeddings
    )
    ids = IDS.clamp(max=kept - 1)
    got, want = logits(other, input_ids=ids), logits(model, input_ids=ids)
    assert gap(got[..., :kept], want[..., :kept]) < 1e-12
    assert other.generate(ids, max_new_tokens=2).shape == (2, 12)


def test_initial_values_follow_the_config_and_the_seed():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(HybridSleepForCausalLM(small_config(hidden_size=96, initializer_range=0.5)))
    assert same_state(*drawn)
    for name, parameter in drawn[0].named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif "proj" in name or "embed" in name or "lm_head" in name:
            spread = parameter.std().item()
            assert abs(spread - 0.5) < 4 * 0.5 / (2 * parameter.numel()) ** 0.5, name


def test_embeddings_may_start_wider_than_the_rest():
    torch.manual_seed(3)
    config = small_config(hidden_size=96, initializer_range=0.1, embedding_initializer_range=1.0)
    model = HybridSleepForCausalLM(config)
    for weight, spread in ((model.model.embed_tokens.weight, 1.0), (model.lm_head.weight, 0.1)):
        assert abs(weight.std().item() - spread) < 4 * spread / (2 * weight.numel()) ** 0.5


@pytest.mark.parametrize("state_space", ["gated_deltanet", "mamba2"])
def test_new_layers_forget_as_slowly_as_they_are_told(state_space):
    heads = {"linear_num_key_heads": 1, "linear_num_value_heads": 512, "num_hidden_layers": 1}
    steps = {"time_step_min": 1e-5, "time_step_max": 1e-2}
    torch.manual_seed(3)
    config = small_config(
        layer_types=["linear_attention"], state_space=state_space, **heads, **steps
    )
    mixer = HybridSleepForCausalLM(config).model.layers[0].mixer
    drawn = torch.nn.functional.softplus(mixer.dt_bias.double()).log10()
    assert -5 - 1e-4 < drawn.min() < -4.9 and -2.1 < drawn.max() < -2 + 1e-4
    # Log-uniform: as many below the middle as above it.
    assert abs((drawn < -3.5).double().mean() - 0.5) < 4 * 0.5 / 512**0.5
    assert mixer.A_log.exp().min() >= 1 and mixer.A_log.exp().max() <= 16


@pytest.mark.parametrize("padded", ["not", "left", "right"])
def test_eager_and_sdpa_attention_agree(model, padded):
    mask = torch.ones_like(IDS)
    if padded != "not":
        mask[0] = torch.arange(10) > 2 if padded == "left" else torch.arange(10) < 7
    other = copy.deepcopy(model)
    found = []
    for name in ("eager", "sdpa"):
        other.set_attn_implementation(name)
        found.append(logits(other, attention_mask=mask)[mask.bool()])
    assert gap(*found) < 1e-12


def test_rows_get_in_a_batch_what_they_get_alone(model):
    both = logits(model)
    for row in range(2):
        assert gap(both[row : row + 1], logits(model, input_ids=IDS[row : row + 1])) < 1e-12
    assert torch.equal(both, logits(model))
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), IDS), 1)
    got = logits(model, input_ids=padded, attention_mask=mask)
    assert gap(got[:, 3:], both) < 1e-12
    alone = model.generate(IDS, max_new_tokens=3, do_sample=False)
    left = model.generate(padded, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(left[:, 3:], alone)


def test_embeddings_stand_for_ids(model):
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(logits(model, input_ids=None, inputs_embeds=embeds), logits(model))
    new = model.generate(inputs_embeds=embeds, max_new_tokens=3, do_sample=False)
    assert torch.equal(new, model.generate(IDS, max_new_tokens=3, do_sample=False)[:, 10:])


def test_generation_goes_on_from_a_cache_and_needs_none(model):
    how = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(IDS, max_new_tokens=6, **how).sequences
    first = model.generate(IDS, max_new_tokens=3, **how)
    text = first.sequences
    for prompt in (text, text[:, -1:]):
        rest = model.generate(prompt, cache=first.cache.copy(), max_new_tokens=3, **how).sequences
        assert torch.equal(rest[:, -3:], whole[:, -3:])
    bare = model.generate(IDS, max_new_tokens=6, use_cache=False, **how).sequences
    assert torch.equal(bare, whole)


def test_outputs_have_the_names_and_the_order_of_transformers(model):
    out = model(IDS, output_hidden_states=True)
    layers = model.config.num_hidden_layers
    assert isinstance(out, CausalLMOutputWithPast) and len(out.hidden_states) == layers + 1
    assert all(h.shape == (2, 10, 12) for h in out.hidden_states)
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(IDS))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    as_tuple = model(IDS, labels=IDS, return_dict=False)
    named = model(IDS, labels=IDS)
    assert torch.equal(as_tuple[0], named.loss) and torch.equal(as_tuple[1], named.logits)
    assert model(IDS, use_cache=False).cache is None


def test_gradients_reach_every_parameter_and_come_from_hidden_states(model):
    other = copy.deepcopy(model).requires_grad_(True).train()
    out = other(IDS, labels=IDS, output_hidden_states=True, use_cache=False)
    out.loss.backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in other.parameters())
    # Hidden states are put together from windows, so that none of them lies between the loss and
    # the parameters and keeps a gradient; but a loss on them reaches what they were made of.
    other.zero_grad()
    out.hidden_states[1].sum().backward()
    assert other.model.layers[0].mixer.o_proj.weight.grad.abs().sum() > 0
    assert other.model.norm.weight.grad is None


def test_training_learns_one_row_by_heart(model):
    other = HybridSleepForCausalLM(copy.deepcopy(model.config)).train()
    optimizer = torch.optim.Adam(other.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        loss = other(IDS[:1, :6], labels=IDS[:1, :6]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def forward(**given):
    return lambda model: model(IDS, **given)


def generate(**given):
    return lambda model: model.generate(IDS, max_new_tokens=1, **given)


REFUSED = {
    "attention weights": (forward(output_attentions=True), "differ by window and pass"),
    "another cache": (forward(cache=DynamicCache()), "cache must be a SleepCache"),
    "positions of one's own": (forward(position_ids=torch.arange(3, 13)[None]), "position_ids"),
    "positions of a cache": (forward(cache_position=torch.arange(10)), "counts what it has read"),
    "shifted labels": (forward(shift_labels=IDS), "labels are shifted inside"),
    "labels and some logits": (
        forward(labels=IDS, logits_to_keep=1),
        "logits_to_keep must be 0 where labels need every logit",
    ),
    "an empty prompt": (lambda model: model(IDS[:, :0]), "at least one token"),
    "assisted decoding": (
        lambda model: model.generate(IDS, assistant_model=model, max_new_tokens=1),
        "fast weights cannot be rolled back",
    ),
    "prompt lookup": (generate(prompt_lookup_num_tokens=2), "cannot be rolled back"),
    "contrastive search": (generate(penalty_alpha=0.6, top_k=4), "cannot be rolled back"),
    "static caches": (generate(cache_implementation="static"), "cannot hold fast weights"),
    "prefill in chunks": (generate(prefill_chunk_size=2), "read window by window"),
    "selective recomputation": (
        lambda model: model.gradient_checkpointing_enable({"context_fn": print}),
        "the model recomputes its own way",
    ),
    "positions that depend on the length": (
        lambda model: HybridSleepConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "must not depend on the length so far",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(what):
    call, reason = REFUSED[what]
    model = small_model(dtype=torch.float32)
    with pytest.raises(ValueError, match=re.escape(reason)):
        call(model)
