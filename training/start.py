"""Where a run's weights come from: random, or a checkpoint that may lack some layers."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from hybrid_sleep.training.weights import check_fits, read_config, read_weights

if TYPE_CHECKING:
    from hybrid_sleep import HybridSleepForCausalLM
    from hybrid_sleep.training.config import InitConfig, RunConfig

LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")
NEW_LAYER = "linear_attention"


def inherited() -> set[str]:
    """The keys of a model's config that a run takes over from a checkpoint.

    The weights' version is not one of them: it counts changes of the checkpoint's weights.
    """
    from hybrid_sleep import HybridSleepConfig

    return HybridSleepConfig.__annotations__.keys() - {"weights_version"}


def initial_model(init: InitConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What the config of `init.checkpoint` says about the model, new layers inserted.

    given: the keys that the run states itself. Raises FileNotFoundError if there is no checkpoint,
    ValueError if it is another kind of model or the new layers do not fit into it.
    """
    config = read_config(init.checkpoint, _named(init))
    # As it would come back from a file, where a tuple is a list.
    model = json.loads(json.dumps({key: getattr(config, key) for key in sorted(inherited())}))
    # Weights of other token_fields may have the same shape, and would mean other tokens.
    for key in ("tie_word_embeddings", "token_fields"):
        if given.get(key, model[key]) != model[key]:
            raise ValueError(
                f"model.{key} must be {model[key]}, as in init.checkpoint, got {given[key]!r}"
            )
    if not init.new_layers:
        return model
    old = model["layer_types"]
    count = len(old) + len(init.new_layers)
    if max(init.new_layers) >= count:
        raise ValueError(
            f"init.new_layers must be below {count}, the checkpoint's {len(old)} layers and "
            f"{len(init.new_layers)} new ones, got {init.new_layers}"
        )
    if model["loop"] is not None and "loop" not in given:
        raise ValueError(
            "model.loop must be given with init.new_layers, which shift the layers that the "
            f"checkpoint's loop={model['loop']} names, got none"
        )
    if model["distinct_layers"] is not None:
        raise ValueError(
            "init.checkpoint must have layers that share no weights to get init.new_layers, got "
            f"distinct_layers={model['distinct_layers']}"
        )
    if model["distinct_passes"] > 1:
        raise ValueError(
            "init.checkpoint must have passes that share their weights to get init.new_layers, got "
            f"distinct_passes={model['distinct_passes']}"
        )
    width = model["intermediate_size"]
    widths = iter(width if isinstance(width, list) else [width] * len(old))
    kinds = iter(old)
    new = set(init.new_layers)
    model["layer_types"] = [NEW_LAYER if i in new else next(kinds) for i in range(count)]
    model["intermediate_size"] = [0 if i in new else next(widths) for i in range(count)]
    model["num_hidden_layers"] = count
    return model


def build_model(run: RunConfig) -> HybridSleepForCausalLM:
    """The model of `run` with its first weights, and frozen what it does not train.

    Raises FileNotFoundError or ValueError if `init.checkpoint` cannot give them.
    """
    from hybrid_sleep import HybridSleepForCausalLM

    config = run.model_config()
    inserted = [] if run.init is None else run.init.new_layers
    new = set(inserted)
    for i in new:
        if i >= config.num_hidden_layers or config.layer_types[i] != NEW_LAYER:
            raise ValueError(
                f"init.new_layers must be indices of {NEW_LAYER!r} in model.layer_types="
                f"{config.layer_types}, got {inserted}"
            )
    model = HybridSleepForCausalLM(config)
    if run.init is not None:
        _take_over(model, run.init)
    if run.train.trainable == "new_layers":
        for name, parameter in model.named_parameters():
            match = LAYER.fullmatch(name)
            parameter.requires_grad_(match is not None and int(match[2]) in new)
    return model


def _take_over(model: HybridSleepForCausalLM, init: InitConfig) -> None:
    """Copy the weights of the checkpoint; new layers write zeros into the residual stream."""
    import torch

    new = set(init.new_layers)
    kept = [i for i in range(model.config.num_hidden_layers) if i not in new]
    weights = {}
    for name, value in read_weights(init.checkpoint, _named(init)).items():
        match = LAYER.fullmatch(name)
        if match is not None and int(match[2]) < len(kept):
            name = f"{match[1]}{kept[int(match[2])]}{match[3]}"
        weights[name] = value
    inserted = [
        name
        for name in model.state_dict()
        if (match := LAYER.fullmatch(name)) is not None and int(match[2]) in new
    ]
    found = {name: tuple(value.shape) for name, value in weights.items()}
    needed = "every weight of the model but those of init.new_layers, in its shape"
    check_fits(model, found, _named(init), new=inserted, needed=needed)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for i in new:
            block = model.model.layers[i]
            block.mixer.o_proj.weight.zero_()
            if block.mlp is not None:
                block.mlp.down_proj.weight.zero_()


def _named(init: InitConfig) -> str:
    return f"init.checkpoint={init.checkpoint!r}"
