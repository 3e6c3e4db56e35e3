"""A model from a folder, and lm-eval itself, each with an error that says what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybrid_sleep.eval.measure.checkpoints import read_run
from hybrid_sleep.support.provenance import check_device
from hybrid_sleep.training import weights
from hybrid_sleep.validation import check_choice

if TYPE_CHECKING:
    from hybrid_sleep import HybridSleepForCausalLM
    from hybrid_sleep.training import RunConfig

SLEEP_OPTIONS = ("window", "loop", "eviction", "sleep_attention", "sleep_carry")
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
    """`options` if all are sleep options; ValueError naming the first that is not."""
    for name, value in options.items():
        if name not in SLEEP_OPTIONS:
            raise ValueError(
                f"sleep options must be among {', '.join(SLEEP_OPTIONS)}, got {name}={value!r}"
            )
    return dict(options)


def find_run(folder: Path) -> RunConfig | None:
    """The run that a checkpoint came from, if training left it beside the weights."""
    try:
        return read_run(folder)
    except FileNotFoundError:
        return None


def load_model(
    folder: Path, *, device: str, dtype: str, sleep_options: Mapping[str, Any]
) -> HybridSleepForCausalLM:
    """The model saved in `folder`, some of its sleep options replaced."""
    check_sleep_options(sleep_options)
    check_choice("dtype", dtype, DTYPES)
    check_device(device)
    config = weights.read_config(folder, f"checkpoint {str(folder)!r}", **sleep_options)
    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    return weights.load_model(folder, device, config=config, dtype=kind)
