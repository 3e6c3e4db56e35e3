"""Bad input gets an error that names the argument, and leaves everything as it was."""

from __future__ import annotations

import pytest
import torch
from small import VOCAB, assert_same, small_config, small_ids, small_model, snapshot
from transformers import DynamicCache

from hybrid_sleep import SleepCache

DEPTHS = (0, -1, 1.5, 2.0, True, "deep", (2, 3, 4), [2])


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def cache(model):
    """Two rows, in the middle of their second windows."""
    with torch.no_grad():
        return model(small_ids(2, 8), sleep_passes=2).cache


def refused(held: SleepCache, match: str, call, /, *arguments, **options) -> None:
    """`call` raises a ValueError that matches, and the cache is bit for bit what it was."""
    before = snapshot(held)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=match):
            call(*arguments, **options)
        assert_same(before, snapshot(held))


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth(model, cache, depth):
    ids = small_ids(2, 4)
    refused(cache, "passes", model.sleep, cache, passes=depth)
    refused(cache, "sleep_passes", model, ids, cache=cache, sleep_passes=depth)
    refused(
        cache, "sleep_passes", model.generate, ids, cache=cache, sleep_passes=depth,
        max_new_tokens=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="sleep_passes"):
        small_config(sleep_passes=depth)


@pytest.mark.parametrize("tol", [0, 0.0, -1, float("nan"), "small", None])
def test_tolerance(model, cache, tol):
    refused(cache, "tol", model.sleep, cache, "auto", tol=tol)


@pytest.mark.parametrize("most", [0, -3, 2.5, "auto", True])
def test_max_passes(model, cache, most):
    refused(cache, "max_passes", model.sleep, cache, "auto", max_passes=most)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("window", value) for value in (0, -5, 2.5, "5", True, None)),
        ("layer_types", ["mamba"] * 4),
        ("num_hidden_layers", 3),
        *(("loop", value) for value in ((0, 5), (2, 2), (-1, 2), (3, 1), (0,), (0, 2.0), 3, "ab")),
        ("state_space", "s4"),
        ("linear_allow_neg_eigval", 1),
        ("eviction", "soft"),
        ("sleep_schedule", "never"),
        ("sleep_attention", "both"),
        ("sleep_carry", "nothing"),
        *(("distinct_passes", value) for value in (0, 1.5, None)),
        ("vocab_size", 0),
        ("head_dim", 3),
        ("num_key_value_heads", 3),
        ("linear_num_key_heads", 3),
        ("linear_conv_kernel_dim", 1),
        ("pad_token_id", VOCAB),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 10.0, "factor": 2.0}),
    ],
)
def test_config(name, value):
    with pytest.raises(ValueError, match=name):
        small_config(**{name: value})


def test_mamba2_has_no_eigenvalue_to_make_negative():
    with pytest.raises(ValueError, match=r"linear_allow_neg_eigval must be False .* 'mamba2'"):
        small_config(state_space="mamba2", linear_allow_neg_eigval=True)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("a token beyond the vocabulary", torch.tensor([[1, VOCAB], [2, 3]])),
        ("a negative token", torch.tensor([[1, 2], [-1, 3]])),
        ("no tokens", torch.zeros(2, 0, dtype=torch.long)),
        ("no rows", torch.zeros(0, 3, dtype=torch.long)),
        ("one dimension", torch.tensor([1, 2])),
        ("fractions", torch.tensor([[1.0, 2.0], [1.0, 2.0]])),
    ],
)
def test_input_ids(model, cache, name, ids):
    refused(cache, "input_ids", model, ids, cache=cache)
    refused(cache, "input_ids", model.generate, ids, cache=cache, max_new_tokens=2)


def test_no_input_or_two(model, cache):
    embeds = torch.zeros(2, 4, 12, dtype=torch.float64)
    refused(cache, "input_ids", model, cache=cache)
    refused(
        cache, "inputs_embeds", model, small_ids(2, 4), inputs_embeds=embeds, cache=cache
    )
    refused(cache, "inputs_embeds", model, inputs_embeds=embeds[..., :5], cache=cache)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(1, 4, dtype=torch.long),
        torch.ones(2, 1, 4, 4, dtype=torch.long),
        torch.ones(4, dtype=torch.long),
    ],
    ids=["short", "a row too few", "four dimensions", "one dimension"],
)
def test_attention_mask(model, cache, mask):
    ids = small_ids(2, 4)
    refused(cache, "attention_mask", model, ids, attention_mask=mask, cache=cache)
    refused(
        cache, "attention_mask", model.generate, ids, attention_mask=mask, cache=cache,
        max_new_tokens=2,
    )  # fmt: skip


def test_a_prompt_of_pads(model, cache):
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    refused(
        cache, "input_ids|attention_mask", model.generate, small_ids(2, 3), attention_mask=mask,
        cache=cache, max_new_tokens=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="input_ids|attention_mask"):
        model.generate(torch.zeros(2, 3, dtype=torch.long), pad_token_id=0, max_new_tokens=2)


@pytest.mark.parametrize(
    "labels",
    [
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(1, 4, dtype=torch.long),
        torch.ones(2, 4, 1, dtype=torch.long),
        torch.full((2, 4), VOCAB),
        torch.full((2, 4), -1),
        torch.ones(2, 4),
    ],
    ids=["short", "a row too few", "three dimensions", "beyond", "negative", "fractions"],
)
def test_labels(model, cache, labels):
    refused(cache, "labels", model, small_ids(2, 4), labels=labels, cache=cache)


def test_cache_of_another(model, cache):
    ids = small_ids(2, 4)
    for other in (small_model(seed=1), small_model(window=6), small_model(state_space="mamba2")):
        refused(cache, "cache", other, ids, cache=cache)
        refused(cache, "cache", other.sleep, cache, passes=2)
        refused(
            cache, "cache", other.generate, ids, cache=cache, max_new_tokens=2
        )
    for rows in (1, 3):
        ids = small_ids(rows, 4)
        refused(cache, "cache", model, ids, cache=cache)
        refused(
            cache, "cache", model.generate, ids, cache=cache, max_new_tokens=2
        )


def test_cache_of_another_kind(model, cache):
    ids = small_ids(2, 4)
    refused(cache, "cache", model, ids, cache=DynamicCache())
    refused(cache, "cache", model.sleep, DynamicCache())
    refused(cache, "cache", model.sleep, None)
    with pytest.raises(ValueError, match="config"):
        SleepCache({"window": 5})


def poison(cache: SleepCache, layer: int, value: float) -> None:
    S = cache.states[layer].S.clone()
    S[1, 0, 2, 1] = value
    cache.states[layer] = cache.states[layer]._replace(S=S)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [1, 3])
def test_fast_weights_that_are_no_numbers(model, cache, layer, value, tmp_path):
    poison(cache, layer, value)
    before = snapshot(cache)
    ids = small_ids(2, 7)
    with pytest.raises(ValueError, match=f"cache.*layer {layer}"):
        model.sleep(cache, passes=3)
    with pytest.raises(ValueError, match=f"cache.*layer {layer}"):
        with torch.no_grad():
            model(ids, cache=cache, sleep_passes=2)
    with pytest.raises(ValueError, match=f"cache.*layer {layer}"):
        model.generate(ids, cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"layer {layer}"):
        cache.save_pretrained(tmp_path)
    assert_same(before, snapshot(cache))
    assert list(tmp_path.iterdir()) == []


def test_a_sleep_that_would_overflow_leaves_the_cache_alone():
    model = small_model(dtype=torch.float32)
    cache = model(small_ids(2, 4)).cache
    cache.hidden = cache.hidden.clone()
    cache.hidden[0, 1, 2] = float("inf")
    before = snapshot(cache)
    for passes in (3, "auto"):
        with pytest.raises(ValueError, match="cache"):
            model.sleep(cache, passes=passes)
        assert_same(before, snapshot(cache))


def test_forward_takes_no_argument_that_it_would_ignore(model, cache):
    ids = small_ids(2, 4)
    for name, value in {
        "output_attentions": True,
        "cache_position": torch.arange(4),
        "cu_seq_lens_q": torch.zeros(1, dtype=torch.long),
        "misspelt": 0,
    }.items():
        for part in (model, model.model):
            refused(cache, f"does not take {name}", part, ids, cache=cache, **{name: value})
    refused(cache, "logits_to_keep", model, ids, logits_to_keep=1.5, cache=cache)
