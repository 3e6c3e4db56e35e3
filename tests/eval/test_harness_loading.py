"""What the model of lm-eval is made from: folders, options, and errors that say what is allowed."""

from __future__ import annotations

import sys

import pytest
import torch
from small import small_model
from transformers import ByT5Tokenizer

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.eval.harness.loading import check_installed

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from hybrid_sleep.eval.harness import HybridSleepLM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 'auto' or .* at least 1, got 0"),
        ({"batch_size": "auto:4"}, "batch_size must be 'auto' or .*, got 'auto:4'"),
        ({"max_batch_size": 0}, "max_batch_size must be an integer of at least 1, got 0"),
        ({"sleep_passes": "deep"}, "sleep_passes must be an integer of at least 1 or 'auto'"),
        ({"windows": 3}, "among window, loop, eviction, sleep_attention, sleep_carry, got w"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"eviction": "soft"}, "eviction must be one of 'hard', 'sliding'"),
        ({"dtype": "int8"}, "dtype must be one of 'auto', 'float32', .*got 'int8'"),
        ({"device": "cuda:99"}, "device='cuda:99'; allowed here: cpu"),
    ],
)
def test_wrong_arguments_are_refused(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        HybridSleepLM(saved, **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model and a tokenizer, and nothing else."""
    folder = tmp_path_factory.mktemp("saved")
    small_model(vocab_size=259, dtype=torch.float32).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


def test_a_folder_is_loaded_with_other_sleep_options(saved):
    options = {"window": 3, "eviction": "sliding", "loop": [1, 4], "sleep_attention": "causal"}
    lm = HybridSleepLM(str(saved), 3, dtype="float64", **options)
    assert (lm.model.config.window, lm.model.config.loop) == (3, (1, 4))
    assert lm.model.lm_head.weight.dtype == torch.float64
    model = HybridSleepForCausalLM.from_pretrained(saved, dtype=torch.float64)
    for name, value in options.items():
        setattr(model.config, name, tuple(value) if isinstance(value, list) else value)
    ((score, _),) = lm.loglikelihood([Instance("", {}, ("a sleeping", " one"), 0)])
    ids = torch.tensor([[b + 3 for b in b"a sleeping one"]])
    with torch.no_grad():
        behind = model(ids, sleep_passes=3).logits[0].log_softmax(-1)
        as_saved = HybridSleepForCausalLM.from_pretrained(saved).double()(ids, sleep_passes=3)
    places, targets = range(9, 13), ids[0, 10:].tolist()
    assert score == pytest.approx(behind[places, targets].sum().item(), abs=1e-10)
    other = as_saved.logits[0].log_softmax(-1)[places, targets].sum().item()
    assert score != pytest.approx(other, abs=1e-3)


def test_lm_eval_makes_the_model_by_its_name(saved):
    lm = get_model("hybrid_sleep").create_from_arg_string(
        f"pretrained={saved},sleep_passes=3,window=4", {"batch_size": "2", "device": "cpu"}
    )
    assert (lm.sleep_passes, lm.model.config.window, lm.batch_size) == (3, 4, 2)


def test_a_folder_of_another_model_or_of_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="of a trained model, got no folder"):
        HybridSleepLM(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="must have model_type='hybrid_sleep', got 'gpt2'"):
        HybridSleepLM(tmp_path)
    model = small_model()
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"must have a tokenizer or a run.yaml .* got neither"):
        HybridSleepLM(tmp_path / "bare")
    with pytest.raises(ValueError, match="must be given with a tokenizer, and is taken as it is"):
        HybridSleepLM(model)


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'hybrid-sleep\[eval\]'"):
        check_installed()
