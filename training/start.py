"""Where a run's weights come from: chance, or a checkpoint that may lack some layers."""

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

    The version is none: it counts changes of the checkpoint's weights.
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
    tied = model["tie_word_embeddings"]
    if given.get("tie_word_embeddings", tied) != tied:
        raise ValueError(
            f"model.tie_word_embeddings={given['tie_word_embeddings']!r}; allowed: {tied}, as in "
            "init.checkpoint"
        )
    if not init.new_layers:
        return model
    old = model["layer_types"]
    count = len(old) + len(init.new_layers)
    if max(init.new_layers) >= count:
        raise ValueError(
            f"init.new_layers={init.new_layers}; allowed: indices below {count}, the checkpoint's "
            f"{len(old)} layers and {len(init.new_layers)} new ones"
        )
    if model["loop"] is not None and "loop" not in given:
        raise ValueError(
            f"init.new_layers shift the layers that the checkpoint's loop={model['loop']} names; "
            "allowed: to give model.loop as well"
        )
    if model["distinct_layers"] is not None:
        raise ValueError(
            f"init.new_layers with the checkpoint's distinct_layers={model['distinct_layers']}; "
            "allowed: a checkpoint whose layers share no weights"
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
    new = set() if run.init is None else set(run.init.new_layers)
    for i in new:
        if i >= config.num_hidden_layers or config.layer_types[i] != NEW_LAYER:
            raise ValueError(
                f"init.new_layers={run.init.new_layers}; allowed: indices of {NEW_LAYER!r} in "
                f"model.layer_types={config.layer_types}"
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
    allowed = "every weight of the model but those of init.new_layers, in its shape"
    check_fits(model, found, _named(init), new=inserted, allowed=allowed)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for i in new:
            block = model.model.layers[i]
            block.mixer.o_proj.weight.zero_()
            if block.mlp is not None:
                block.mlp.down_proj.weight.zero_()


def _named(init: InitConfig) -> str:
    return f"init.checkpoint={init.checkpoint!r}"
