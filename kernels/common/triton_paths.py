"""When the Triton kernels may run a call, decided without importing Triton."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import Any

import torch

from hybrid_sleep.kernels.common import dispatch

LARGEST_DIM = 256
# Products of float32 take more registers than those of bfloat16.
LARGEST_FP32_KEY = 128
CAPABILITY = (8, 0)


def register(op: str, module: str) -> None:
    """Register `module`'s function of the op's name; the module is imported at its first call.

    It ranks above the PyTorch paths, also for one token.
    """

    def run(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), op)(*arguments, **options)

    dispatch.register(op, "triton", run, rank=110, wants=wants, rejects=rejects)


def wants(call: dispatch.Call) -> str | None:
    """Why a call should take the Triton kernels by itself: it is on a CUDA device."""
    return "fused kernels for this device" if call.device == "cuda" else None


def rejects(call: dispatch.Call) -> str | None:
    """Why the Triton kernels cannot run a call, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install 'hybrid-sleep[triton]')"
    too_large = [dim for dim in call.dims if dim > LARGEST_DIM]
    if too_large:
        return f"a dimension of {too_large[0]} is above {LARGEST_DIM}, the largest a kernel holds"
    if len(call.dims) > 1 and call.dtype == torch.float16:
        return "float16 has too little range for a state; bfloat16 and float32 have enough"
    if len(call.dims) > 1 and call.dims[0] > LARGEST_FP32_KEY and call.dtype != torch.bfloat16:
        return f"K = {call.dims[0]} is above {LARGEST_FP32_KEY}, the largest in {call.dtype}"
    if call.device == "cuda":
        return _rejects_gpu(call)
    if call.device != "cpu":
        return f"Triton compiles for CUDA devices, not for {call.device}"
    if not interpreting():
        return "needs a CUDA device (or TRITON_INTERPRET=1, to interpret)"
    if call.dtype not in (torch.float32, torch.float64):
        return f"Triton's interpreter computes wrongly in {call.dtype}; it takes float32 or float64"
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return False
    return importlib.import_module("hybrid_sleep.kernels.common.triton_launch").INTERPRET


def _rejects_gpu(call: dispatch.Call) -> str | None:
    if torch.version.hip:
        return "the kernels are written and checked for NVIDIA GPUs"
    if call.dtype == torch.float64:
        return "the kernels compute in float32, and float64 was given"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        found, needed = (".".join(map(str, x)) for x in (capability, CAPABILITY))
        return f"compute capability {found} is below {needed}"
    return None
