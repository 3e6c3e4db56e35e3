"""A process of its own for what kills it or breaks it, without importing everything again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def in_a_fork(work: Callable[[], int | None], said: Path) -> int:
    """Run `work` in a fork of this process; what it says is written to `said`.

    Returns what `work` returns (0 for None), 1 after an exception, -n after signal n.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = said.open("w", buffering=1)
            # A forked process has one thread, whatever its parent had.
            torch.set_num_threads(1)
            code = work() or 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            # Nothing of pytest's may run twice.
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
