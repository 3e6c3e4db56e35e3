"""Counters of energy: made-up ones whose joules are known."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from hybrid_sleep.eval.benchmarks import energy


def package(folder, name, used, top):
    folder.mkdir()
    for file, text in (("name", name), ("energy_uj", used), ("max_energy_range_uj", top)):
        (folder / file).write_text(f"{text}\n")


def test_packages_of_a_cpu(tmp_path):
    with pytest.raises(OSError, match="shows no package"):
        energy.Rapl(tmp_path)
    package(tmp_path / "intel-rapl:0", "package-0", 5_000_000, 9_999_999)
    package(tmp_path / "intel-rapl:1", "package-1", 9_000_000, 9_999_999)
    package(tmp_path / "intel-rapl:1:0", "core", 1, 2)
    package(tmp_path / "other:0", "package-9", 1, 2)
    meter = energy.Rapl(tmp_path)
    before = meter.read()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("7500000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500000")
    (tmp_path / "intel-rapl:1:0" / "energy_uj").write_text("2")
    # 2.5 J, and 1.5 J over the end of the range.
    assert meter.joules(before, meter.read()) == 4.0


class Library:
    """Stands in for NVML: a GPU that uses 250 mJ between any two readings."""

    def __init__(self, broken=None):
        self.used, self.broken, self.opened = 1000, broken, None

    def nvmlInit_v2(self):  # noqa: N802
        return 9 if self.broken == "nvmlInit_v2" else 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):  # noqa: N802
        self.opened, handle._obj.value = uuid, 77
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):  # noqa: N802
        assert handle.value == 77 and isinstance(value._obj, ctypes.c_ulonglong)
        self.used += 250
        value._obj.value = self.used
        return 3 if self.broken == "nvmlDeviceGetTotalEnergyConsumption" else 0


def test_the_counter_of_a_gpu():
    library = Library()
    meter = energy.Nvml("GPU-12", library)
    assert library.opened == b"GPU-12"
    assert meter.joules(meter.read(), meter.read()) == 0.25
    for broken in ("nvmlInit_v2", "nvmlDeviceGetTotalEnergyConsumption"):
        with pytest.raises(OSError, match=f"{broken} .* gave"):
            energy.Nvml("GPU-12", Library(broken))


def test_joules_of_one_call():
    calls = []
    meter = SimpleNamespace(read=lambda: [len(calls)], joules=lambda a, b: 2.0 * (b[0] - a[0]))
    assert energy.joules_of(meter, lambda: calls.append(1), lambda: None, 0.01) == 2.0
    assert calls
    assert energy.joules_of(None, lambda: pytest.fail("worked"), lambda: None) is None


def test_a_device_without_a_counter_has_no_meter(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.find_meter(torch.device("cpu")) is None
