"""Where a run's weights come from: chance, or a checkpoint that may lack some layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from hybrid_sleep import HybridSleepForCausalLM
    from hybrid_sleep.training.config import InitConfig, RunConfig

LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")
NEW_LAYER = "linear_attention"
WEIGHTS_FILE = "model.safetensors"


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
    from hybrid_sleep import HybridSleepConfig

    path = Path(init.checkpoint) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"init.checkpoint={init.checkpoint!r} holds no config.json; allowed: the folder of a "
            "trained model"
        )
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved.get("model_type") != HybridSleepConfig.model_type:
        raise ValueError(
            f"init.checkpoint={init.checkpoint!r} has model_type={saved.get('model_type')!r}; "
            f"allowed: {HybridSleepConfig.model_type!r}"
        )
    known = inherited()
    model = {key: value for key, value in saved.items() if key in known}
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
    own, weights = model.state_dict(), {}
    for name, value in read_weights(init.checkpoint).items():
        match = LAYER.fullmatch(name)
        if match is not None and int(match[2]) < len(kept):
            name = f"{match[1]}{kept[int(match[2])]}{match[3]}"
        if name not in own or own[name].shape != value.shape:
            found = f"shape {tuple(own[name].shape)}" if name in own else "none"
            raise ValueError(
                f"init.checkpoint has {name} of shape {tuple(value.shape)}, the model has {found}; "
                "allowed: model keys that leave the checkpoint's weights their places and shapes"
            )
        weights[name] = value
    # A tied head is one parameter and saved once.
    for name in dict(model.named_parameters()).keys() - weights.keys():
        match = LAYER.fullmatch(name)
        if match is None or int(match[2]) not in new:
            raise ValueError(
                f"init.checkpoint={init.checkpoint!r} lacks {name}; allowed: a checkpoint with "
                "every weight of the model but those of init.new_layers"
            )
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for i in new:
            block = model.model.layers[i]
            block.mixer.o_proj.weight.zero_()
            if block.mlp is not None:
                block.mlp.down_proj.weight.zero_()


def read_weights(checkpoint: str) -> dict[str, torch.Tensor]:
    """The weights in the folder `checkpoint` by name, from one file or from several.

    Raises FileNotFoundError if there are none. `from_pretrained` would fill gaps with chance, and
    under ZeRO-3 give every process a share.
    """
    from safetensors.torch import load_file

    folder = Path(checkpoint)
    index = folder / f"{WEIGHTS_FILE}.index.json"
    names = [WEIGHTS_FILE]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"init.checkpoint={checkpoint!r} holds no {name}; allowed: the folder of a "
                "trained model"
            )
        weights |= load_file(folder / name)
    return weights
