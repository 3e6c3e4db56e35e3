"""Train one run: `python -m hybrid_sleep.training CONFIG [key=value ...] [--resume]`.

Launchers start it in many processes: `torchrun --nproc-per-node 8 -m hybrid_sleep.training CONFIG`,
`deepspeed --num_gpus 8 --module hybrid_sleep.training CONFIG`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from hybrid_sleep.support.terminal import never_fail_on_characters

GRACE = 5.0  # seconds


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if trained, 2 for bad input, 130 if interrupted (with a checkpoint)."""
    parser = argparse.ArgumentParser(prog="python -m hybrid_sleep.training", description=__doc__)
    parser.add_argument("config", help="the YAML file of a run, such as configs/runs/*.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=100")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    never_fail_on_characters()
    given = parser.parse_intermixed_args(arguments)
    # The config is checked before torch and transformers take their seconds to load.
    from hybrid_sleep.training import zero
    from hybrid_sleep.training.config import load_run_config

    try:
        run = load_run_config(given.config, given.overrides)
        zero.choose_accelerator()
        from hybrid_sleep.training.run import train

        result = train(
            run, resume=given.resume, overwrite=given.overwrite, progress=not given.quiet
        )
    except KeyboardInterrupt as interrupt:
        _say(f"interrupted: {interrupt or 'nothing more was written'}", sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        _refuse(f"error: {error}")
        return 2
    finally:
        _leave()
    _say(result.report())
    return 0


def _refuse(text: str) -> None:
    """Say why this process ends; at least one does before the launcher ends them all.

    The first process says it at once. Another one leaves it the time to, and says it itself if it
    still runs then: the first has no such error, or is slow.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(GRACE)
        text = f"rank {rank}: {text}"
    print(text, file=sys.stderr, flush=True)


def _say(text: str, to: Any = None) -> None:
    """Print in the first process alone: the others would say the same."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=to or sys.stdout)


def _leave() -> None:
    """Part from the other processes: one that just ends can abort while its peers still talk."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available():
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads that gloo and DeepSpeed leave behind abort an interpreter that winds down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
