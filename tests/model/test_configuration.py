"""A config refuses what no model can be made of, by name, and reads every config saved before."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small import VOCAB, small_config

from hybrid_sleep import HybridSleepConfig
from hybrid_sleep.layers.rotary import Rotary

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
SMALL = {name: getattr(small_config(), name) for name in HybridSleepConfig.__annotations__}
ROPES = [
    {"rope_theta": 50.0},
    {"rope_type": "linear", "factor": 2},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    LLAMA3,
    YARN,
    YARN | {"attention_factor": None, "beta_fast": 16, "beta_slow": 1, "truncate": False},
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rms_norm_eps", value) for value in (0, -1e-6, "1e-6", None, True, math.nan, math.inf)),
        ("embedding_initializer_range", -1.0),
        *(("time_step_min", value) for value in (0, -1e-3, "1e-3", None, math.nan)),
        *(("time_step_max", value) for value in (1e-4, "0.1", None, math.inf)),
        *(("initializer_range", value) for value in (-0.1, "1e-2", None, math.inf, 10**400)),
        *(("attention_dropout", value) for value in (-0.1, 1, 2.0, "0", None, math.nan)),
        *(("tie_word_embeddings", value) for value in ("no", 0, None)),
        *(("use_cache", value) for value in ("false", 1)),
        *(("hidden_size", value) for value in ("12", 12.0, None, [12], 2**63)),
        *(("num_attention_heads", value) for value in ("2", 0)),
        *(("intermediate_size", value) for value in ("10", -1, 2.5)),
        *(("layer_types", value) for value in ("full_attention", 4, {"a": 1}, [4] * 4)),
        *(("pad_token_id", value) for value in (-1, VOCAB, "0", True, [1])),
        *(("eos_token_id", value) for value in (-1, VOCAB, "0", [], [1, VOCAB], [1, None], ["a"])),
        *(("dtype", value) for value in ("nonsense", "nn")),
        *(("rope_parameters", value) for value in (1, "default", [1], True)),
        ("rope_parameters", {"rope_type": "foo"}),
        ("rope_parameters", {"rope_type": ["linear"], "factor": 2.0}),
        ("rope_parameters", {"rope_type": "longrope", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": 0.5}),
        ("rope_parameters", {"rope_type": "linear", "factor": "2"}),
        ("rope_parameters", {"rope_theta": 0}),
        ("rope_parameters", {"rope_theta": "1e4"}),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 2.0}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("rope_parameters", LLAMA3 | {"high_freq_factor": 1.0}),
        ("rope_parameters", YARN | {"truncate": "no"}),
        ("rope_parameters", YARN | {"original_max_position_embeddings": 6.4}),
    ],
)  # fmt: skip
def test_impossible_values_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}"):
        HybridSleepConfig(**{**SMALL, name: value})


@pytest.mark.parametrize(
    ("rope", "key"),
    [(rope, key) for rope in (LLAMA3, YARN) for key in rope if not key.startswith("rope")]
    + [({"rope_type": "linear", "factor": 2.0}, "factor")],
)
def test_a_rope_type_lacks_none_of_its_keys(rope, key):
    lacking = {name: value for name, value in rope.items() if name != key}
    for given in (lacking, lacking | {key: None}):
        with pytest.raises(ValueError, match=f"must have '{key}'"):
            small_config(rope_parameters=given)


@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_gives_a_frequency_to_each_pair_of_channels(rope):
    given = copy.deepcopy(rope)
    config = small_config(rope_parameters=given)
    assert given == rope  # the caller's own
    assert Rotary(config).frequencies(torch.device("cpu")).shape == (3,)
    assert HybridSleepConfig(**config.to_dict()).rope_parameters == config.rope_parameters


def test_configs_saved_before_are_read(tmp_path):
    """With what transformers adds, under its older names, and with keys of no meaning here."""
    saved = small_config(eos_token_id=[1, 2], pad_token_id=0).to_dict() | {
        "architectures": ["HybridSleepForCausalLM"],
        "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 50.0,
        "rope_parameters": None,
        "something_new": {"a": 1},
    }
    config = HybridSleepConfig.from_dict(saved)
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 50.0)
    assert str(config.dtype) == "torch.bfloat16" and config.eos_token_id == [1, 2]
    config.save_pretrained(tmp_path)
    again = HybridSleepConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
