"""Work of one shape, recorded on a GPU once and launched again as a whole: CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch


class CudaGraphs:
    """Records functions on one CUDA device as graphs that share one pool of memory.

    Nothing that must outlive a replay may be allocated by the function: the next graph of the pool
    may use the same memory. For the same reason all of them are replayed on one stream.
    """

    label = "cuda graph"

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def lacks(device: torch.device) -> str | None:
        """Why nothing can ever be captured on `device`, or None."""
        if not torch.cuda.is_available():
            return "no CUDA device"
        return None if device.type == "cuda" else f"{device} is no CUDA device"

    @classmethod
    def refuses(cls, device: torch.device) -> str | None:
        """Why nothing can be captured on `device` now, or None."""
        busy = "another capture is under way"
        return cls.lacks(device) or (busy if torch.cuda.is_current_stream_capturing() else None)

    @staticmethod
    def stream(device: torch.device) -> Hashable:
        """What two sleeps must have in common for their replays to come one after the other."""
        return torch.cuda.current_stream(device).cuda_stream

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` twice to warm up, record it, and return what replays the record.

        Raises what `work` raises, and RuntimeError if it waits for the device.
        """
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            side = _side_stream(self.device, current.cuda_stream)
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    work()
                    with _no_waiting():
                        work()
            finally:
                # Whoever gets the buffers' memory next must not meet what still runs here.
                current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on allocating meanwhile; only this one must not.
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=side, capture_error_mode="thread_local"
                ):
                    work()
            finally:
                # torch leaves the side stream current where ending the capture raises.
                torch.cuda.set_stream(current)
        return graph.replay


@functools.cache
def _side_stream(device: torch.device, beside: int) -> torch.cuda.Stream:
    """One capturing stream for each stream that replays: each has a cuBLAS workspace of its own."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise RuntimeError afterwards if this thread waited for the device.

    Found during a capture, it would break the capture off and leave torch's random generator
    behind as if capturing. The mode "error" would hit other threads as well, a warning does not.
    """
    waits, here = [], threading.get_ident()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if threading.get_ident() == here and "synchronizing CUDA operation" in str(message):
            waits.append(message)

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if waits:
        raise RuntimeError(f"a pass waits for the device {len(waits)} time(s)")


def outlook(device: str) -> tuple[str, str]:
    """What a sleep of a model on `device` would take, and why; for `hybrid-sleep doctor`."""
    reason = CudaGraphs.lacks(torch.device(device))
    if reason is not None:
        return "eager", reason
    return CudaGraphs.label, (
        "from the second sleep of a shape on; eager with gradients, autocast, forward hooks, or "
        "attention_dropout in training mode"
    )
