"""Joules, where a device counts them itself: NVML on an NVIDIA GPU, RAPL on a Linux CPU.

Both counters are of the whole device, idle draw and other work included.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


class Meter(Protocol):
    """A counter of energy; `name` says whose."""

    name: str

    def read(self) -> list[int]:
        """The counter's parts as they stand."""

    def joules(self, before: list[int], after: list[int]) -> float:
        """Joules between two readings."""


class Rapl:
    """Packages of a CPU, as Linux shows them in microjoules; OSError where it shows none."""

    name = "RAPL, whole packages"

    def __init__(self, folder: Path):
        named = [(path, (path / "name").read_text().strip()) for path in folder.glob("*-rapl:*")]
        self.packages = sorted(path for path, name in named if name.startswith("package"))
        if not self.packages:
            raise OSError(f"{folder} shows no package")
        self.ranges = [int((p / "max_energy_range_uj").read_text()) for p in self.packages]
        self.read()

    def read(self) -> list[int]:
        """Microjoules of each package; they start again from 0 after its range."""
        return [int((path / "energy_uj").read_text()) for path in self.packages]

    def joules(self, before: list[int], after: list[int]) -> float:
        """Joules between two readings less than one range apart."""
        parts = zip(before, after, self.ranges, strict=True)
        return sum((end - start) % (top + 1) for start, end, top in parts) / 1e6


class Nvml:
    """One GPU since its driver was loaded; OSError where there is no such counter."""

    name = "NVML, whole GPU"

    def __init__(self, uuid: str, library: Any = None):
        self._nvml = ctypes.CDLL(NVML) if library is None else library
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._handle))
        self.read()

    def read(self) -> list[int]:
        """Millijoules."""
        value = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(value))
        return [value.value]

    def joules(self, before: list[int], after: list[int]) -> float:
        """Joules between two readings."""
        return (after[0] - before[0]) / 1e3

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._nvml, function)(*arguments)
        if code:
            raise OSError(f"{function} of {NVML} gave {code}")


def find_meter(device: Any) -> Meter | None:
    """The counter of a torch device, None where it has none that may be read."""
    import torch

    try:
        if device.type == "cuda":
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            return Nvml(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return Rapl(POWERCAP)
    except (OSError, AttributeError):
        return None


def joules_of(
    meter: Meter | None,
    work: Callable[[], Any],
    finish: Callable[[], Any],
    least_seconds: float = 1.0,
) -> float | None:
    """Joules of one `work()`, from as many as fill `least_seconds`; None without a meter.

    Counters move some ten times a second, so that a single call may be too short to see.
    finish: waits until the device has done what it was given.
    """
    if meter is None:
        return None
    finish()
    before, calls = meter.read(), 0
    end = time.perf_counter() + least_seconds
    while time.perf_counter() < end:
        work()
        finish()
        calls += 1
    return meter.joules(before, meter.read()) / calls
