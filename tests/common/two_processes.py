"""A worker script in two processes of one machine, as torchrun starts them, and beside the test."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

COMMON = Path(__file__).resolve().parent
ROOT = COMMON.parents[1]


def run_in_two(script: Path, folder: Path) -> None:
    """Run `script` with `folder` and the path of tests/common; all it says if it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, f"--master-port={port}", str(script), str(folder), str(COMMON)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def imported(script: Path) -> ModuleType:
    """The module of `script`, whose folder is on no path."""
    sys.path.insert(0, str(script.parent))
    try:
        return importlib.import_module(script.stem)
    finally:
        sys.path.remove(str(script.parent))
