"""Inputs of the two state-space ops, so that what must hold for both is tested on both."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import normalize

from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.kernels.gated_delta_rule import gated_delta_rule
from hybrid_sleep.kernels.ssd import ssd


def _hasten_the_interpreter() -> None:
    """Halve the time of Triton's interpreter.

    At each call of a device function it looks through all of triton.language for what to replace,
    although the kernel that makes the call has done so. Where a release of Triton is built
    differently, nothing is changed.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    if not {"_patch_lang", "_LangPatchScope"} <= vars(interpreter).keys():
        return
    replace = interpreter._patch_lang

    @functools.cache
    def languages(function) -> tuple:
        found = filter(inspect.ismodule, function.__globals__.values())
        return tuple(module for module in found if module in (language, language.core))

    def replace_once(function):
        if any(language.core.is_builtin(module.load) for module in languages(function)):
            return replace(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once


if find_spec("triton") is not None and not torch.cuda.is_available():
    _hasten_the_interpreter()


# Session scope: hypothesis runs many examples in one test, and neither fixture has state.
@pytest.fixture(params=[gated_delta_rule, ssd], ids=lambda op: op.__name__, scope="session")
def op(request) -> Callable:
    return request.param


class Guards:
    """Tensors that lie between margins of NaN, and what a kernel allocates, full of NaN.

    Called with a tensor, returns a copy of it between margins, in its strides' order. `check`
    raises AssertionError where a margin was written to or a new tensor has an unwritten element.
    """

    MARGIN = 4096

    def __init__(self):
        self._margins: list[torch.Tensor] = []
        self._allocated: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bool:
            around = torch.ones(x.numel() + 2 * self.MARGIN, dtype=torch.bool)
        else:
            around = torch.full((x.numel() + 2 * self.MARGIN,), float("nan"), dtype=x.dtype)
            self._margins += [around[: self.MARGIN], around[-self.MARGIN :]]
        inner = around[self.MARGIN : -self.MARGIN].view(x.shape)
        return inner.copy_(x.detach()).requires_grad_(x.requires_grad)

    def allocate(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype):
        """Stands in for `triton_launch.empty`."""
        made = self(torch.full(shape, float("nan"), dtype=dtype))
        self._allocated.append(made)
        return made

    def check(self) -> None:
        """Raise AssertionError if anything was written outside, or left unwritten inside."""
        assert all(bool(margin.isnan().all()) for margin in self._margins), "a margin was written"
        unwritten = [tuple(x.shape) for x in self._allocated if bool(x.detach().isnan().any())]
        assert not unwritten, f"elements of tensors of these shapes were not written: {unwritten}"
        assert self._allocated, "no kernel allocated anything"


@pytest.fixture
def guarded(monkeypatch) -> Guards:
    """Guards in the place of every allocation that Triton paths make."""
    pytest.importorskip("triton")
    # What is imported only within a test would keep the guards of that test for ever.
    for op in dispatch.OPS:
        importlib.import_module(f"hybrid_sleep.kernels.{op}.triton")
    guards = Guards()
    launch = importlib.import_module("hybrid_sleep.kernels.common.triton_launch")
    original = launch.empty
    for name, module in list(sys.modules.items()):
        if name.startswith("hybrid_sleep.") and vars(module).get("empty") is original:
            monkeypatch.setattr(module, "empty", guards.allocate)
    return guards


@pytest.fixture(scope="session")
def make() -> Callable:
    return make_inputs


def make_inputs(
    op: Callable,
    B: int = 2,
    T: int = 7,
    H: int = 2,
    K: int = 3,
    V: int = 4,
    G: int = 1,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """Keyword arguments of `op`, `initial_state` included; ssd has G key groups."""
    groups = H if op is gated_delta_rule else G
    inputs = {
        "q": normalize(torch.randn(B, T, groups, K, dtype=dtype), dim=-1),
        "k": normalize(torch.randn(B, T, groups, K, dtype=dtype), dim=-1),
        "v": torch.randn(B, T, H, V, dtype=dtype),
        "g": -torch.rand(B, T, H, dtype=dtype),
    }
    if op is gated_delta_rule:
        inputs["beta"] = torch.rand(B, T, H, dtype=dtype)
    inputs["initial_state"] = torch.randn(B, H, K, V, dtype=dtype)
    return inputs
