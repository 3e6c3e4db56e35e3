"""How Triton kernels are configured, tuned, launched and recorded.

A `Kernel` is a Triton function with the configurations that may run it. The first call for a key
times them and pins the fastest: in this process, and on disk for the next ones, so that a backward
pass recomputes with the configuration of its forward. The interpreter takes the first one. No
kernel here writes what it reads, so timing one several times changes no result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Read when the kernels are decorated, as Triton itself does.
INTERPRET: bool = triton.knobs.runtime.interpret

Grid = Callable[[dict[str, Any]], tuple[int, ...]]
Fits = Callable[[dict[str, int], dict[str, Any]], bool]


class Launch(NamedTuple):
    """One launch that was recorded instead of run."""

    kernel: Kernel
    arguments: dict[str, Any]


class Precision(NamedTuple):
    """How one call computes.

    DOT: dtype of the operands of matrix products, and of what is stored between kernels.
    ACC: dtype of accumulators, states, decays and write strengths.
    MODE, FINE: what tensor cores make of float32 operands, in products of the inputs and in those
        whose errors would pile up (inverses, products of transitions).
    """

    DOT: tl.dtype
    ACC: tl.dtype
    MODE: str
    FINE: str

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: fewer of float32 and float64, so that a tile stays in registers."""
        return 64 if self.DOT == tl.bfloat16 else 16

    @property
    def between(self) -> torch.dtype:
        """torch's name for DOT."""
        return {tl.bfloat16: torch.bfloat16, tl.float64: torch.float64}.get(self.DOT, torch.float32)

    @property
    def state(self) -> torch.dtype:
        """torch's name for ACC."""
        return torch.float64 if self.ACC == tl.float64 else torch.float32


def precision(dtype: torch.dtype, state_dtype: torch.dtype) -> Precision:
    """bf16 products for bf16 inputs, three TF32 products for one of any other dtype.

    One TF32 product has the 10 bits of its operands: too few for inverses and for states that go
    through many chunks. Three, of high and low parts, give nearly float32.
    """
    if state_dtype == torch.float64:
        return Precision(tl.float64, tl.float64, "ieee", "ieee")
    if dtype == torch.bfloat16:
        return Precision(tl.bfloat16, tl.float32, "tf32", "tf32")
    return Precision(tl.float32, tl.float32, "tf32x3", "tf32x3")


class Kernel:
    """A Triton function with the configurations that may run it.

    configs: for products of bf16. fp32: for those of float32 and float64, whose operands take so
        many more registers that other blocks are needed; None where the same will do.
    key: arguments whose values choose the configuration (besides the dtypes).
    blocks: block size -> dimension that it cuts; a block of twice the dimension is not tried.
    fits: whether a configuration's blocks stay in registers for a launch's arguments.
    """

    def __init__(
        self,
        function: Any,
        configs: Sequence[triton.Config],
        key: Sequence[str],
        blocks: dict[str, str],
        fp32: Sequence[triton.Config] | None = None,
        fits: Fits | None = None,
    ) -> None:
        self.function = function
        self.fits = fits
        self.configs = tuple(configs)
        self.fp32 = self.configs if fp32 is None else tuple(fp32)
        self.blocks = blocks
        self.__doc__ = function.__doc__
        self._tuned = triton.autotune(
            [self.configs[0]] if INTERPRET else list(dict.fromkeys(self.configs + self.fp32)),
            key=list(key),
            prune_configs_by={"early_config_prune": self._prune},
            cache_results=True,
        )(function)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    def allowed(self, arguments: dict[str, Any]) -> list[triton.Config]:
        """The configurations that may run a launch with these arguments."""
        configs = self.configs if arguments.get("DOT") == tl.bfloat16 else self.fp32
        fitting = [
            config
            for config in configs
            if all(
                config.kwargs[block] < 2 * max(16, arguments[dim])
                for block, dim in self.blocks.items()
            )
            and (self.fits is None or self.fits(config.kwargs, arguments))
        ]
        return fitting or [min(configs, key=lambda config: sum(config.kwargs.values()))]

    def wants_wgmma(self, arguments: dict[str, Any]) -> bool:
        """Whether compute capability 9.0 should run its products on whole warp groups: with 64
        rows, which are tokens in some products and channels of the keys in others."""
        large_enough = arguments.get("C") == 64 and arguments.get("BK", 0) >= 64
        return arguments.get("DOT") == tl.bfloat16 and large_enough

    def _prune(self, configs: list, named: dict[str, Any], **more: Any) -> list:
        if INTERPRET:
            return configs
        allowed = self.allowed({**named, **more})
        return [config for config in configs if config in allowed]

    def launch(self, grid: Grid | tuple[int, ...], **arguments: Any) -> None:
        """Run on the current stream of the device of the first tensor."""
        if _recorded is not None:
            _recorded.append(Launch(self, arguments))
            return
        first = next(x for x in arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            self._tuned[grid](**arguments)


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of the block instead of running them (their results are not written)."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def kernel(
    configs: Sequence[triton.Config],
    key: Sequence[str],
    blocks: dict[str, str] | None = None,
    fp32: Sequence[triton.Config] | None = None,
    fits: Fits | None = None,
) -> Callable[[Any], Kernel]:
    """Decorator above `triton.jit`; see `Kernel`."""
    return lambda function: Kernel(function, configs, key, blocks or {}, fp32, fits)


def config(warps: int, stages: int = 1, **blocks: int) -> triton.Config:
    """A configuration: block sizes, warps and stages of the software pipeline."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor that a kernel is going to fill."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def next_power(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, triton.next_power_of_2(n))
