"""A model from a folder, and lm-eval itself, each with an error that says what is lacking."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybrid_sleep.eval import depth
from hybrid_sleep.provenance import check_device

if TYPE_CHECKING:
    from hybrid_sleep import HybridSleepForCausalLM
    from hybrid_sleep.training import RunConfig

SLEEP_OPTIONS = ("window", "loop", "eviction", "sleep_attention")
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


def check_installed() -> None:
    """ValueError unless lm_eval can be imported."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"lm-evaluation-harness is missing or broken ({error}): "
            "pip install 'hybrid-sleep[eval]'"
        ) from error


def check_sleep_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` if they are names of sleep options; ValueError naming the first that is none."""
    for name, value in options.items():
        if name not in SLEEP_OPTIONS:
            raise ValueError(f"{name}={value!r}; allowed: {', '.join(SLEEP_OPTIONS)}")
    return dict(options)


def find_run(folder: Path) -> RunConfig | None:
    """The run that a checkpoint came from, if training left it beside the weights."""
    try:
        return depth.read_run(folder)
    except FileNotFoundError:
        return None


def load_model(
    folder: Path, *, device: str, dtype: str, sleep_options: Mapping[str, Any]
) -> HybridSleepForCausalLM:
    """The model saved in `folder`, some of its sleep options replaced."""
    from hybrid_sleep import HybridSleepConfig

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"checkpoint {str(folder)!r} is no folder with a config.json; allowed: a trained model"
        )
    check_sleep_options(sleep_options)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    check_device(device)
    content, _ = HybridSleepConfig.get_config_dict(folder)
    if content.get("model_type") != HybridSleepConfig.model_type:
        raise ValueError(
            f"checkpoint {str(folder)!r} has model_type={content.get('model_type')!r}; allowed: "
            f"{HybridSleepConfig.model_type!r} (lm-eval itself evaluates others: --model hf)"
        )
    config = HybridSleepConfig.from_dict({**content, **sleep_options})
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    return depth.load_model(folder, device, config=config, dtype=kind)
