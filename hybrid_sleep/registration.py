"""Where other libraries decide by lists of names, our name is entered here."""

from __future__ import annotations

import sys

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from hybrid_sleep.configuration import HybridSleepConfig

# What peft's lists call by names of Qwen3's; all other names in them are ours, too.
_OUR_NAMES = {"post_attention_layernorm": "mlp_norm"}


def register_with_transformers(backbone: type, causal_lm: type) -> None:
    """Let Auto classes make our models, and whatever goes by model type or class name know them."""
    AutoConfig.register(HybridSleepConfig.model_type, HybridSleepConfig)
    AutoModel.register(HybridSleepConfig, backbone)
    AutoModelForCausalLM.register(HybridSleepConfig, causal_lm)
    # register() does not fill the lists of names. Trainer shifts labels itself, for label
    # smoothing, only for the causal ones (it would train on the current token), the text
    # generation pipeline calls others unsupported, model cards go without a task, and lm-eval
    # guesses what kind of model it has.
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    names[HybridSleepConfig.model_type] = causal_lm.__name__
    # What only computes hidden states.
    modeling_auto.MODEL_MAPPING_NAMES[HybridSleepConfig.model_type] = backbone.__name__


def register_with_peft() -> None:
    """Give peft, once it is imported, the layers that LoRA and others adapt by default.

    They are Qwen3's, whose projections are called as ours. Without an entry peft asks for
    `target_modules`. It is not imported for that, which would take seconds.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, layers in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "qwen3" in layers:
            ours = [_OUR_NAMES.get(layer, layer) for layer in layers["qwen3"]]
            layers.setdefault(HybridSleepConfig.model_type, ours)
