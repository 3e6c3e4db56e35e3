"""A saved model is loaded whole or refused: what its files hold, and what the model asks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_sleep.support.io import read_json, unreadable

if TYPE_CHECKING:
    import torch

    from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
SHOWN = 4  # names in an error


def load_model(
    folder: str | os.PathLike,
    device: Any = "cpu",
    *,
    config: HybridSleepConfig | None = None,
    **given: Any,
) -> HybridSleepForCausalLM:
    """The model saved in `folder`, every weight of it.

    config: in place of the saved one; given: what `from_pretrained` takes besides, such as `dtype`.
    transformers' own loading draws at random what a file lacks, and draws no bar here.

    Raises FileNotFoundError where there is no model, ValueError for a file that is damaged and for
    weights that are not those of the model, naming them.
    """
    from transformers.utils import logging

    from hybrid_sleep import HybridSleepForCausalLM

    config = check_model(folder, config=config)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = HybridSleepForCausalLM.from_pretrained(os.fspath(folder), config=config, **given)
        return model.to(device)
    finally:
        if shown:
            logging.enable_progress_bar()


def check_model(
    folder: str | os.PathLike, *, config: HybridSleepConfig | None = None
) -> HybridSleepConfig:
    """The config that `load_model` takes; raises what that would, without reading the weights."""
    import torch

    from hybrid_sleep import HybridSleepForCausalLM

    where = f"checkpoint {os.fspath(folder)!r}"
    config = read_config(folder, where) if config is None else config
    with torch.device("meta"):
        check_fits(HybridSleepForCausalLM(config), shapes(folder, where), where)
    return config


def read_config(folder: str | os.PathLike, where: str, **changes: Any) -> HybridSleepConfig:
    """The config of the model in `folder`, called `where` in errors; `changes` in place of its own.

    Raises FileNotFoundError if it holds no model, ValueError if not one of this package.
    """
    from hybrid_sleep import HybridSleepConfig

    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        found = f"one without {CONFIG_FILE}" if path.parent.is_dir() else "no folder"
        raise FileNotFoundError(f"{where} must be the folder of a trained model, got {found}")
    content = read_json(path)
    if content.get("model_type") != HybridSleepConfig.model_type:
        raise ValueError(
            f"{where} must have model_type={HybridSleepConfig.model_type!r}, got "
            f"{content.get('model_type')!r}"
        )
    # `changes` are checked apart, so that their errors are not said to be the file's.
    own = _config(content, str(path))
    return _config({**content, **changes}, where) if changes else own


def _config(content: Mapping[str, Any], where: str) -> HybridSleepConfig:
    from hybrid_sleep import HybridSleepConfig

    try:
        return HybridSleepConfig.from_dict(dict(content))
    except Exception as error:  # transformers and huggingface_hub raise their own
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error


def shapes(folder: str | os.PathLike, where: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model in `folder`, without reading them (see `_opened`)."""
    found: dict[str, tuple[int, ...]] = {}
    for path in _files(folder, where):
        with _opened(path) as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return found


def read_weights(folder: str | os.PathLike, where: str) -> dict[str, torch.Tensor]:
    """The weights of the model in `folder` by name, from one file or from several.

    Raises FileNotFoundError if there are none, ValueError if a file is damaged.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in _files(folder, where):
        with _opened(path) as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}
    return weights


def check_fits(
    model: torch.nn.Module,
    found: Mapping[str, tuple[int, ...]],
    where: str,
    *,
    new: Collection[str] = (),
    needed: str = "exactly the weights of the model that the config describes",
) -> None:
    """ValueError, naming tensors, unless `found` has all that `model` holds, and nothing else.

    found: shapes by name. new: parameters of the model that are not to be found there. Tied ones
    are one tensor, under any of their names. needed: what the error says there must be.
    """
    own = model.state_dict(keep_vars=True)
    names: dict[int, set[str]] = {}
    for name, value in own.items():
        names.setdefault(id(value), set()).add(name)
    missing = [
        name
        for name, value in own.items()
        if not (names[id(value)] & found.keys() or name in new) and name == min(names[id(value)])
    ]
    unknown = [name for name in found if name not in own or name in new]
    known = [name for name in found if name not in unknown]
    other = [name for name in known if tuple(own[name].shape) != tuple(found[name])]
    parts = [f"no {_listed(missing)}"] if missing else []
    if unknown:
        parts.append(f"{_listed([_shaped(n, found) for n in unknown])}, the model has none")
    if other:
        shown = [f"{_shaped(n, found)}, the model has shape {tuple(own[n].shape)}" for n in other]
        parts.append(_listed(shown))
    if parts:
        raise ValueError(f"{where} must have {needed}, got {'; '.join(parts)}")


def _shaped(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"{name} of shape {tuple(shapes[name])}"


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _files(folder: str | os.PathLike, where: str) -> list[Path]:
    """The files of a model's weights, in the order of transformers: one, or those of an index."""
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).exists() or not (folder / INDEX_FILE).exists():
        names = [WEIGHTS_FILE]
    else:
        parts = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(x, str) for x in parts.values()):
            raise unreadable(folder / INDEX_FILE, "it has no weight_map of file names")
        names = sorted(set(parts.values()))
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{where} must be the folder of a trained model, got one without {name}"
            )
    return [folder / name for name in names]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of safetensors; ValueError or OSError, naming it, if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
