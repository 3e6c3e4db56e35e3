"""A run small enough to train in a second, and what it leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import TINY

from hybrid_sleep import HybridSleepForCausalLM
from hybrid_sleep.training.config import RunConfig, run_config

TRAIN = {"steps": 6, "batch_size": 8, "lr_muon": 0.02, "lr_adamw": 0.003, "warmup": 2}


class Tiny:
    def run(self, out: Path, task=None, model=None, text=None, **settings: Any) -> RunConfig:
        """Six steps on rings of four cells, at depths 1 to 3, unless told otherwise."""
        params = task or {"width": 4, "states": 2, "steps": 1}
        learned = {"task": {"name": "rule110", "params": params}}
        return run_config(
            {
                "model": {**TINY, **(model or {})},
                **(learned if text is None else {"text": text}),
                "train": {**TRAIN, "device": "cpu", "log_every": 2, **settings},
                "sleep_passes": {"uniform": [1, 3]},
                "output_dir": str(out),
            }
        )

    def steps(self, folder: Path) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are about a training step."""
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        return HybridSleepForCausalLM.from_pretrained(folder).state_dict()

    def assert_same(self, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
        """Bit for bit."""
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()
