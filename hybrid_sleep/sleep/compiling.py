"""Decode steps compiled by torch.compile, with products of few rows as a CPU should have them.

The compiler takes as many decode steps as one would like to have fused: from embedding to the last
layer nothing but the products with weights and attention remains a call of its own. The products
are then what a step costs: of one row, the time to read each weight once. Libraries made for
matrices do not get there, see `few_rows`.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of more rows the libraries' products of matrices are faster.
FEW_ROWS = 8
# Of so many new tokens a compiled step saves more seconds than compiling takes.
COMPILED_FROM = 2000
COMPILERS = ("g++", "clang++", "c++")
# Without Python between kernels; and a product and a sum as one instruction.
INDUCTOR = {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"}
Step = Callable[..., Any]


def few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x weight^T` of few rows x as sums over products, which a compiler makes into one loop.

    With one row a product of matrices is a reading of the weight, for which libraries can take
    three times as long as the memory does (measured with MKL on EPYC). Sums of several rows share
    the loop, so that the weight is read once for all of them.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > 1:
        # A tensor of its own: else what it is computed from, such as a norm, would be computed
        # again in the loop over every column of the result.
        rows = rows.contiguous()
        rows = rows.as_strided(rows.shape, rows.stride())
    sums = [(weight * row).sum(-1) for row in rows]
    return torch.stack(sums).reshape(*x.shape[:-1], len(weight))


class StepCompiler:
    """Compiles what one model does for a token, once for each number of rows that it meets.

    compilations: how often that was; seconds: how long it took in all. path: how the last step was
    run, and why. Where compiling fails, steps run as they are, and the reason is kept. A copied or
    unpickled compiler starts anew.
    """

    def __init__(self) -> None:
        self.compilations, self.seconds = 0, 0.0
        self.path = "nothing compiled yet"
        self._compiled: dict[Step, Step] = {}
        self._failure: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return StepCompiler, ()

    def __call__(self, step: Step, *arguments: Any) -> Any:
        """`step(*arguments)`, compiled."""
        if self._failure is None:
            try:
                if step in self._compiled:
                    out = self._compiled[step](*arguments)
                else:
                    out = self._first(step)(*arguments)
                self.path = f"compiled, in {self.seconds:.0f} s"
                return out
            except Exception as error:
                self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
                logger.warning(f"decode steps run uncompiled: {self._failure}")
        self.path = f"not compiled: {self._failure}"
        return step(*arguments)

    def _first(self, step: Step) -> Step:
        # A function of its own: torch.compile counts how often each is compiled, for whichever
        # model, and refuses the ninth time.
        own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
        compiled = torch.compile(own, fullgraph=True, backend=self._compile)
        self._compiled[step] = compiled

        def quietly(*arguments: Any) -> Any:
            with warnings.catch_warnings():
                # What a config caches depends on its arguments alone.
                warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru")
                return compiled(*arguments)

        return quietly

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Step:
        """The backend: inductor, behind `few_rows` on a CPU."""
        from torch._dynamo import lookup_backend

        began, on_cpu = time.perf_counter(), True
        for node in graph.graph.nodes:
            if node.target is not nn.functional.linear:
                continue
            x, weight, *bias = node.args
            given = x.meta["example_value"]
            on_cpu = given.device.type == "cpu"
            rows = given.numel() // given.shape[-1]
            if on_cpu and rows <= FEW_ROWS and not any(bias) and not node.kwargs:
                node.target, node.args = few_rows, (x, weight)
        graph.recompile()
        patches = INDUCTOR if on_cpu else {}
        compiled = lookup_backend("inductor")(graph, inputs, config_patches=patches)
        self.compilations += 1
        self.seconds += time.perf_counter() - began
        return compiled


def varies(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x`, whose size in `dim` will differ from call to call: compiled once for all of them."""
    torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def outlook(device: str) -> tuple[str, str]:
    """How tokens that come one by one are taken in on `device`, for `hybrid-sleep doctor`."""
    if torch.device(device).type != "cpu":
        return "in place", "compiled where generate(compile_config=CompileConfig()) asks for it"
    if not any(map(shutil.which, COMPILERS)):
        return "in place", f"to compile it a C++ compiler is needed ({', '.join(COMPILERS)})"
    return "in place", (
        f"compiled where {COMPILED_FROM} new tokens may come, or compile_config is given"
    )
