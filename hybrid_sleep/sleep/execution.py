"""How the steps of a sleep are run: one after another, or replayed from CUDA graphs.

A sleep repeats one pass over one window, so on a GPU most of an eager pass is Python and kernel
launches. `SleepEngine` keeps, for each shape of sleep, buffers at fixed addresses and graphs that
read and write only them; a sleep then copies its window in, replays, and clones out what survives.

What a step computes is the affair of `sleep.py`: a function from a `Night` to the fields that
change. One that is captured may not wait for the device, nor read a tensor that is neither in the
Night nor a parameter. Audited for that (and watched by tests), in what `run_blocks` calls:

- `Block`, `SwiGLU`, `nn.RMSNorm`, `nn.Linear`, `rotate`, the gates: elementwise kernels and
  cuBLAS, whose handle and workspace the warm-up on the capturing stream makes;
- `Attention`: `cat`, `gather`; `sdpa_attention_forward` of transformers (shapes and flags on the
  host; with dropout 0 no random numbers), `eager_attention` (`torch.ones` on the device);
- the mixers of `kernels` and the ops they are made of: checks of shapes, `dispatch.select`
  (metadata alone), `arange`, `zeros`, `eye` on the device, `cumsum`, integer indices (no boolean
  ones), `repeat_interleave` by a number, `solve_triangular` (batched cuBLAS at these sizes,
  pointers made on the device). Triton kernels tune and compile in the run before the warm-up;
- `change_of`: sums of squares, read by the host only between replays.

Not audited is flash attention of other packages; the warm-up watches for waits all the same.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.utils import logging

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.sleep.cuda_graphs import CudaGraphs
from hybrid_sleep.sleep.state import Context, Memory
from hybrid_sleep.sleep.trees import map_tensors
from hybrid_sleep.sleep.weights import adapter_state

logger = logging.get_logger(__name__)

# Of a batch of 32, rows that sleep at different times come in six shapes.
MOST_PLANS = 6
MOST_SHAPES = 64


@dataclass(frozen=True)
class Night:
    """What the steps of one sleep of R rows read, and what they leave.

    h: `[R, L, D]`, hidden states that the next pass reads.
    S: fast weights of the looped layers.
    entering: per layer, all else that a pass, or the coda, starts from.
    context: positions and visibility.
    awake: bool `[R]`, rows that take what the next pass gives, the others stay; None for all.
    left: per layer, what steps left beside `S`.
    change: `[layers of S, 2, R]`, squared norms of the last pass; None if none was measured.
    """

    h: torch.Tensor
    S: dict[int, torch.Tensor]
    entering: dict[int, Memory]
    context: Context
    awake: torch.Tensor | None = None
    left: dict[int, Memory] = field(default_factory=dict)
    change: torch.Tensor | None = None

    def pick(self, new: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        """`new` in rows that are awake, `old` (None: as `new`) in the others."""
        if old is None:
            return new
        return torch.where(self.awake.view(-1, *[1] * (new.ndim - 1)), new, old)


Step = Callable[[Night], dict[str, Any]]
Steps = Mapping[str, Step]


class Backbone(Protocol):
    """What the engine needs of a model."""

    config: HybridSleepConfig
    blocks: Sequence[nn.Module]
    engine: SleepEngine | None


class Eager:
    """Steps run one by one, with gradients where they are on.

    path: says so, and why. layers: those of `S`, in the order of `change`.
    """

    def __init__(self, night: Night, steps: Steps, reason: str):
        self._night, self._steps = night, steps
        self.path, self.layers = f"eager: {reason}", tuple(night.S)

    def take(self, name: str) -> None:
        """Run a step and take what it gives."""
        new = {k: v for k, v in self._steps[name](self._night).items() if v is not None}
        new["left"] = self._night.left | new["left"]
        self._night = replace(self._night, **new)

    def only(self, awake: torch.Tensor) -> None:
        """From now on, let passes change the rows in `awake: [R]` alone."""
        self._night = replace(self._night, awake=awake.to(self._night.h.device))

    def change(self) -> torch.Tensor | None:
        """`Night.change` of the last pass."""
        return self._night.change

    def end(self) -> tuple[dict[int, torch.Tensor], dict[int, Memory]]:
        """`S` and `left` after the steps taken."""
        return self._night.S, self._night.left


class Plan:
    """Buffers at fixed addresses for one shape of sleep, and the steps recorded over them."""

    def __init__(self, night: Night, rows: int, record: Any):
        """`night` gives the shapes; its R rows become `rows`."""
        given = len(night.h)

        def like(x: torch.Tensor) -> torch.Tensor:
            count = rows if len(x) == given else len(x)
            return torch.zeros(count, *x.shape[1:], dtype=x.dtype, device=x.device)

        awake = torch.zeros(rows, dtype=torch.bool, device=night.h.device)
        self.night = replace(map_tensors(like, night), awake=awake)
        self.record = record
        self._replays: dict[str, Callable[[], None]] = {}

    def prepare(self, night: Night, steps: Steps) -> bool:
        """Record those of `steps` that are not yet; whether there was one. Spoils the buffers."""
        missing = [name for name in steps if name not in self._replays]
        for name in missing:
            self.load(night)
            # Tunes kernels, and shows what a step leaves, which needs buffers outside the pool.
            self._take(steps[name])
            self._replays[name] = self.record(functools.partial(self._take, steps[name]))
        return bool(missing)

    def load(self, night: Night) -> None:
        """Copy a night of at most as many rows in; the rows behind them read nothing."""
        rows = len(night.h)

        def fill(buffer: torch.Tensor, x: torch.Tensor) -> None:
            buffer[: len(x)].copy_(x)
            buffer[len(x) :].zero_()

        def repeat(buffer: torch.Tensor, x: torch.Tensor) -> None:
            buffer[: len(x)].copy_(x)
            if len(x) < len(buffer):
                # A row that sees nothing at all would be NaN.
                buffer[len(x) :].copy_(x[:1])

        fixed = self.night
        for name in ("h", "S", "entering"):
            map_tensors(fill, getattr(fixed, name), getattr(night, name))
        map_tensors(repeat, fixed.context, night.context)
        fixed.awake[:rows], fixed.awake[rows:] = True, False

    def replay(self, name: str) -> None:
        """Run a recorded step again over what the buffers hold."""
        self._replays[name]()

    def _take(self, step: Step) -> None:
        """Run a step and copy what it gives into the buffers, making those that are missing."""

        def write(x: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
            return torch.zeros_like(x) if buffer is None else buffer.copy_(x)

        for name, value in step(self.night).items():
            if value is not None:
                buffers = getattr(self.night, name)
                kept = map_tensors(write, value, buffers)
                kept = buffers | kept if name == "left" else kept
                self.night = replace(self.night, **{name: kept})


class Replayed:
    """As `Eager`, but steps are replayed over the buffers of a plan, while the engine is locked."""

    def __init__(self, plan: Plan, rows: int, path: str):
        self._plan, self._rows = plan, rows
        self.path, self.layers = path, tuple(plan.night.S)

    def take(self, name: str) -> None:
        """Replay a step."""
        self._plan.replay(name)

    def only(self, awake: torch.Tensor) -> None:
        """From now on, let passes change the rows in `awake: [R]` alone."""
        self._plan.night.awake[: self._rows].copy_(awake)

    def change(self) -> torch.Tensor | None:
        """A copy of `Night.change`."""
        change = self._plan.night.change
        return None if change is None else change[..., : self._rows].clone()

    def end(self) -> tuple[dict[int, torch.Tensor], dict[int, Memory]]:
        """`S` and `left` after the steps taken, in tensors of their own."""
        return tuple(
            map_tensors(lambda x: x[: self._rows].clone(), tree)
            for tree in (self._plan.night.S, self._plan.night.left)
        )


class SleepEngine:
    """Plans for the shapes in which one backbone sleeps.

    A shape is captured the second time it is seen: partial windows come in all lengths, and for a
    sleep that is never repeated a capture costs more than it saves. It is captured again when
    parameters have moved (`.to()`), and sees weights that were edited in place without that.

    capture: makes a recorder for a device, see `CudaGraphs`. At most `MOST_PLANS` plans are held,
    the one unused for longest goes first. A copied or unpickled engine starts empty.
    """

    def __init__(self, capture: type[CudaGraphs] | Any = CudaGraphs):
        self.capture = capture
        # Two threads may let the same model sleep; buffers serve one at a time.
        self.lock = threading.RLock()
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return SleepEngine, (self.capture,)

    def forget(self) -> None:
        """Drop all plans and the memory they hold."""
        with self.lock:
            self.plans: OrderedDict[Hashable, Plan] = OrderedDict()
            # Per shape: None once it was seen, or why it cannot be captured.
            self._shapes: OrderedDict[Hashable, str | None] = OrderedDict()
            self._parameters: Hashable = None

    def find(
        self, backbone: Backbone, night: Night, steps: Steps, parameters: Hashable
    ) -> Replayed | str:
        """A plan with `night` loaded and `steps` recorded, or why there is none."""
        if parameters != self._parameters:
            self.forget()
            self._parameters = parameters
        rows = len(night.h)
        # Rows sleep at different times, so their number varies; a capture for each would cost
        # seconds and memory. Powers of two bound that, for at most twice the arithmetic.
        padded = 1 << (rows - 1).bit_length()
        device = night.h.device
        shape = _signature(night, rows, padded)
        key = (device, self.capture.stream(device), shape, _modes(backbone))
        if key not in self._shapes:
            self._remember(key, None)
            return "first sleep of this shape, the next one is captured"
        if self._shapes[key] is not None:
            return self._shapes[key]
        try:
            if key not in self.plans:
                while len(self.plans) >= MOST_PLANS:
                    self.plans.popitem(last=False)
                # Replays on one stream come one after the other: one pool of memory serves all.
                beside = (plan.record for k, plan in self.plans.items() if k[:2] == key[:2])
                record = next(beside, None) or self.capture(device)
                self.plans[key] = Plan(night, padded, record)
            plan = self.plans[key]
            self.plans.move_to_end(key)
            self._shapes.move_to_end(key)
            how = "captured" if plan.prepare(night, steps) else "replayed"
            plan.load(night)
        except Exception as error:
            self.plans.pop(key, None)
            reason = f"capture failed with {type(error).__name__}: {error}"
            self._remember(key, reason)
            logger.warning(f"sleeps of this shape run eagerly: {reason}")
            return reason
        return Replayed(plan, rows, f"{self.capture.label}: {how}")

    def _remember(self, key: Hashable, reason: str | None) -> None:
        self._shapes[key] = reason
        while len(self._shapes) > MOST_SHAPES:
            self._shapes.popitem(last=False)


@contextlib.contextmanager
def begin(backbone: Backbone, night: Night, steps: Steps) -> Iterator[Eager | Replayed]:
    """A sleep that will take `steps`, from graphs where `backbone.engine` can do that."""
    engine, parameters = backbone.engine, None
    reason = "turned off" if engine is None else _refusal(engine, night.h)
    if reason is None:
        reason, parameters = _inspect(backbone, night.h.device)
    if reason is None:
        # Buffers are written in place by every later sleep, in inference mode or not.
        with engine.lock, torch.inference_mode(False), torch.no_grad():
            found = engine.find(backbone, night, steps, parameters)
            if isinstance(found, Replayed):
                yield found
                return
        reason = found
    yield Eager(night, steps, reason)


def _refusal(engine: SleepEngine, h: torch.Tensor) -> str | None:
    """Why no sleep can be captured now, whatever the model, or None.

    Gradients cover activation checkpointing too, which does nothing without them.
    """
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.compiler.is_compiling():
        return "inside torch.compile"
    if torch.is_autocast_enabled(h.device.type):
        return "autocast is on"
    return engine.capture.refuses(h.device)


def _inspect(backbone: Backbone, device: torch.device) -> tuple[str | None, Hashable]:
    """What a graph would miss of the blocks that sleep, or None; and where their weights lie."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "forward hooks on every module, which a graph would skip", None
    dropout, places = backbone.config.attention_dropout, []
    # `modules()` names what it finds and takes several times as long, with the device idle.
    found = list(backbone.blocks)[backbone.config.loop_range[0] :]
    for module in found:
        found.extend(child for child in module._modules.values() if child is not None)
        if dropout and module.training:
            return f"attention_dropout={dropout} in training mode", None
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            # Replays run no Python: who hooks in to record or to fetch weights would be skipped.
            return f"a {type(module).__name__} has forward hooks, which a graph would skip", None
        if (adapters := adapter_state(module)) is not None:
            # A graph goes on with those that were at work when it was captured.
            places.append(adapters)
        weights = (*module._parameters.values(), *module._buffers.values())
        for x in (x for x in weights if x is not None):
            if type(x) not in (torch.Tensor, nn.Parameter):
                return f"weights are of type {type(x).__name__}, not plain tensors", None
            if x.device != device:
                return f"weights lie on {x.device}, the window on {device}", None
            places.append((x.data_ptr(), x.dtype, x.shape, x.stride()))
    return None, tuple(places)


def _modes(backbone: Backbone) -> Hashable:
    """Switches that a step looks at while it runs, which a graph would go on not noticing."""
    cuda = torch.backends.cuda
    return (
        backbone.config.loop_range,
        backbone.config.eviction,
        backbone.config._attn_implementation,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def _signature(tree: Any, rows: int, padded: int) -> Hashable:
    """What two trees must share to use the same buffers: shapes, dtypes, devices, other values."""
    if isinstance(tree, torch.Tensor):
        count = padded if len(tree) == rows else len(tree)
        return count, tree.shape[1:], tree.dtype, tree.device
    if isinstance(tree, Mapping):
        return tuple((key, _signature(part, rows, padded)) for key, part in tree.items())
    if isinstance(tree, tuple):
        return type(tree).__name__, *(_signature(part, rows, padded) for part in tree)
    if is_dataclass(tree):
        return tuple(_signature(getattr(tree, f.name), rows, padded) for f in fields(tree))
    return tree
