"""What torchrun does, with workers that are forks of one process: imports are paid for once.

`python forked_ranks.py PROCESSES PORT CONFIG [argument ...] [--first SCRIPT]`: train CONFIG, as
`python -m hybrid_sleep.training` does, behind what SCRIPT does in every worker.
"""

from __future__ import annotations

import importlib
import runpy
import sys

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hybrid_sleep.training import __main__ as program
from hybrid_sleep.training import zero
from hybrid_sleep.training.config import load_run_config

# What a worker would import, each for itself: nothing of it starts a thread.
SHARED = ["hybrid_sleep.modeling", "hybrid_sleep.training.run", "torch._dynamo"]
DEEPSPEED = ["deepspeed.runtime.zero.stage3", "transformers.integrations.deepspeed"]


def work(arguments: list[str], script: str | None) -> None:
    if script is not None:
        runpy.run_path(script)
    code = program.main(arguments)
    if code:
        sys.exit(code)


def launch(processes: str, port: str, *arguments: str) -> None:
    given, script = list(arguments), None
    if "--first" in given:
        place = given.index("--first")
        script = given[place + 1]
        del given[place : place + 2]
    zero.choose_accelerator()
    for name in SHARED + DEEPSPEED * (load_run_config(given[0]).train.deepspeed is not None):
        importlib.import_module(name)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(processes),
        run_id="none",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0},
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.1,
    )
    elastic_launch(config, work)(given, script)


if __name__ == "__main__":
    launch(*sys.argv[1:])
