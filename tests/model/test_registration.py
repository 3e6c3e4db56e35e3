"""What other libraries decide by lists of names they decide rightly for us."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers.pipelines.base as pipelines
from small import VOCAB, small_ids, small_model
from transformers import AutoModelForCausalLM, TextGenerationPipeline
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto import modeling_auto


def test_the_model_is_known_as_causal_by_class_and_by_type():
    model = small_model()
    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hybrid_sleep"]
    assert name == type(model).__name__ == TASK_MAPPING["text-generation"]["hybrid_sleep"]
    assert modeling_auto.MODEL_MAPPING_NAMES["hybrid_sleep"] == type(model.model).__name__
    assert model.loss_type == "ForCausalLM"
    # The lists are also read by what makes models; ours must still be found.
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)


def test_the_text_generation_pipeline_takes_the_model_without_complaint(monkeypatch):
    complaints: list[str] = []
    monkeypatch.setattr(pipelines.logger, "error", complaints.append)
    checked = TextGenerationPipeline.__new__(TextGenerationPipeline)
    checked.model, checked.task = small_model(), "text-generation"
    checked.check_model_type(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not complaints


def test_peft_knows_which_layers_to_adapt():
    peft = pytest.importorskip("peft")
    model = small_model(dtype=torch.float32)
    for kind in (peft.LoraConfig, peft.IA3Config, peft.LNTuningConfig):
        adapted = peft.get_peft_model(small_model(dtype=torch.float32), kind())
        learning = [n for n, p in adapted.named_parameters() if p.requires_grad]
        assert all(f".layers.{i}." in " ".join(learning) for i in range(4)), kind
        adapted(small_ids(1, 7, vocab=VOCAB), labels=small_ids(1, 7)).loss.backward()
    lists = vars(sys.modules["peft.utils.constants"])
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name, layers in lists.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "hybrid_sleep" in layers:
            assert set(layers["hybrid_sleep"]) <= modules, name
