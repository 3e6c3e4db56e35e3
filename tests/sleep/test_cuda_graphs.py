"""The CUDA side of capturing, as far as a machine without a GPU can follow: order and clean-up."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

from hybrid_sleep.sleep import cuda_graphs


class FakeStream:
    def __init__(self, name):
        self.cuda_stream = name
        self.waited = []

    def wait_stream(self, other):
        LOG.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


LOG: list[str] = []


class FakeGraph:
    def replay(self):
        LOG.append("replay")


@pytest.fixture
def cuda(monkeypatch):
    """Names of torch.cuda replaced by ones that note what happens on which stream."""
    LOG.clear()
    state = {"stream": FakeStream("main"), "mode": 0, "end fails": False}

    @contextlib.contextmanager
    def stream(wanted):
        before, state["stream"] = state["stream"], wanted
        yield
        state["stream"] = before

    class Capturing:
        def __init__(self, graph, pool, stream, capture_error_mode):
            assert isinstance(graph, FakeGraph) and capture_error_mode == "thread_local"
            self.stream, self.pool = stream, pool

        def __enter__(self):
            LOG.append(f"capture into {self.pool}")
            self.before, state["stream"] = state["stream"], self.stream

        def __exit__(self, *_):
            if state["end fails"]:
                raise RuntimeError("operation not permitted when stream is capturing")
            state["stream"] = self.before

    fakes = {
        "device": contextlib.nullcontext,
        "current_stream": lambda *_: state["stream"],
        "set_stream": lambda wanted: state.update(stream=wanted),
        "stream": stream,
        "Stream": lambda device: FakeStream("side"),
        "CUDAGraph": FakeGraph,
        "graph": Capturing,
        "graph_pool_handle": lambda: "the pool",
        "get_sync_debug_mode": lambda: state["mode"],
        "set_sync_debug_mode": lambda mode: state.update(mode=mode),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    cuda_graphs._side_stream.cache_clear()
    yield state
    cuda_graphs._side_stream.cache_clear()


def test_warm_up_and_capture_run_on_the_side_stream(cuda):
    recorder = cuda_graphs.CudaGraphs(torch.device("cuda", 0))
    replay = recorder(
        lambda: LOG.append(f"work on {cuda['stream'].cuda_stream}, mode {cuda['mode']}")
    )
    replay()
    assert LOG == [
        "side waits for main",
        "work on side, mode 0",
        "work on side, mode warn",
        "main waits for side",
        "capture into the pool",
        "work on side, mode 0",
        "replay",
    ]
    assert cuda["stream"].cuda_stream == "main"


def test_a_wait_is_found_before_the_capture_and_everything_put_back(cuda):
    before = warnings.showwarning

    def work():
        if cuda["mode"] == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)

    recorder = cuda_graphs.CudaGraphs(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="waits for the device"):
        recorder(work)
    assert not any("capture" in line for line in LOG)
    assert LOG[-1] == "main waits for side"
    assert cuda["mode"] == 0 and warnings.showwarning is before


def test_other_warnings_are_no_wait_and_still_heard(cuda):
    recorder = cuda_graphs.CudaGraphs(torch.device("cuda", 0))
    with pytest.warns(UserWarning, match="something else"):
        recorder(lambda: warnings.warn("something else", stacklevel=1))
    assert "capture into the pool" in LOG


def test_the_stream_is_put_back_where_ending_the_capture_raises(cuda):
    cuda["end fails"] = True
    recorder = cuda_graphs.CudaGraphs(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder(lambda: None)
    assert cuda["stream"].cuda_stream == "main"
