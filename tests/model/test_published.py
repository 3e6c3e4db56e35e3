"""The life of a published checkpoint, in processes that have not imported this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM

FILE = "modeling_hybrid_sleep.py"
AUTO_MAP = {
    "AutoConfig": "modeling_hybrid_sleep.HybridSleepConfig",
    "AutoModel": "modeling_hybrid_sleep.HybridSleepModel",
    "AutoModelForCausalLM": "modeling_hybrid_sleep.HybridSleepForCausalLM",
}

LIFE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
assert "hybrid_sleep" not in sys.modules
source, target, backbone = sys.argv[1:]
how = {"trust_remote_code": True}
assert AutoConfig.from_pretrained(source, **how).window == 5
tokenizer = AutoTokenizer.from_pretrained(source, **how)
model = AutoModelForCausalLM.from_pretrained(source, **how)
batch = tokenizer("a b c d e f g h a b c", return_tensors="pt")
ids, mask = batch["input_ids"], batch["attention_mask"]
out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
print("tokens", out[0].tolist())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model.train()(ids, labels=ids, sleep_passes=2).loss.backward()
optimizer.step()
model.eval().save_pretrained(target)
tokenizer.save_pretrained(target)
AutoModel.from_pretrained(source, **how).save_pretrained(backbone)
out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
print("tokens", out[0].tolist())
"""


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["auto_map"]


def publish(folder: Path) -> None:
    small_model(dtype=torch.float32, sleep_passes=2).save_pretrained(folder)
    words = {word: i for i, word in enumerate("a b c d e f g h".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="h").save_pretrained(folder)


def test_a_model_loaded_by_its_remote_code_saves_what_it_was_loaded_from(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    model = small_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "a")
    for auto, reference in AUTO_MAP.items():
        # What the Auto classes do where the package was not imported before.
        get_class_from_dynamic_module(reference, str(tmp_path / "a")).register_for_auto_class(auto)
    assert HybridSleepConfig._auto_class is None
    again = HybridSleepForCausalLM.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    again.model.save_pretrained(tmp_path / "backbone")
    for name in ("b", "backbone"):
        assert files(tmp_path / name) - {"generation_config.json"} == {
            "config.json",
            "model.safetensors",
            FILE,
        }
        assert auto_map(tmp_path / name) == AUTO_MAP


@pytest.mark.slow
def test_load_tune_save_load_generate(tmp_path):
    publish(tmp_path / "0")
    said = []
    for i in range(2):
        places = [str(tmp_path / name) for name in (f"{i}", f"{i + 1}", f"backbone{i}")]
        done = subprocess.run(
            [sys.executable, "-c", LIFE, *places],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        )
        assert done.returncode == 0, done.stderr
        said += [line for line in done.stdout.splitlines() if line.startswith("tokens")]
        assert files(tmp_path / f"{i + 1}") == files(tmp_path / "0")
        assert auto_map(tmp_path / f"{i + 1}") == auto_map(tmp_path / f"backbone{i}") == AUTO_MAP
    before, tuned, loaded, _ = said
    assert loaded == tuned != before
