"""How the steps of a sleep are run: one after another, or replayed from CUDA graphs.

A step is a function `step(backbone, carry, **flags) -> carry`; a carry is a named tuple of trees of
tensors. What they mean is the affair of `algorithm.py`: here a step is run as it is (`Eager`), or
recorded over buffers at fixed addresses and launched again as a whole (`Replayed`). A sleep repeats
one pass over one window, so on a GPU most of an eager pass is Python and kernel launches.

Why not `torch.compile(mode="reduce-overhead")` or `make_graphed_callables`: the first compiles anew
for each length of window and guards on every attribute of the model, seconds for what runs once or
twice; the second fixes one set of shapes for good and keeps gradients' buffers that a sleep has no
use for. Neither can say why it fell back.

A step that is captured may not wait for the device, nor read a tensor that is neither in the carry
nor a parameter. Audited for that (and watched by tests), in what our model's `run_blocks` calls:

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
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.utils.parametrize import is_parametrized
from transformers.utils import logging

from hybrid_sleep.sleep.backbone import Backbone
from hybrid_sleep.sleep.cuda_graphs import CudaGraphs
from hybrid_sleep.sleep.trees import map_tensors
from hybrid_sleep.sleep.weights import adapter_state

logger = logging.get_logger(__name__)

# Of a batch of 32, rows that sleep at different times come in six shapes.
MOST_PLANS = 6
MOST_SHAPES = 64

Carry = TypeVar("Carry", bound=tuple)
Step = Callable[..., Any]
Replay = Callable[[], None]


class Eager(Generic[Carry]):
    """Steps run one by one, with gradients where they are on.

    carry: what the steps so far have left. path: says how they are run, and why.
    """

    def __init__(self, backbone: Backbone, carry: Carry, reason: str):
        self.backbone, self.carry, self.path = backbone, carry, f"eager: {reason}"

    def __call__(self, step: Step, **flags: Hashable) -> None:
        """Run a step on the carry."""
        self.carry = step(self.backbone, self.carry, **flags)

    def read(self, field: str) -> Any:
        """A field of the carry, in tensors that later steps do not write."""
        return getattr(self.carry, field)

    def write(self, field: str, tree: Any) -> None:
        """Replace a field of the carry by a tree of the same shapes."""
        self.carry = self.carry._replace(**{field: tree})  # type: ignore[attr-defined]  # named


class Plan(Generic[Carry]):
    """Buffers at fixed addresses for one shape of carry, and the steps recorded over them."""

    def __init__(self, carry: Carry, rows: int, record: Any):
        """`carry` gives the shapes; its R rows become `rows`."""
        given = _rows_of(carry)

        def like(x: torch.Tensor) -> torch.Tensor:
            count = rows if len(x) == given else len(x)
            return torch.zeros(count, *x.shape[1:], dtype=x.dtype, device=x.device)

        self.carry: Carry = map_tensors(like, carry)
        self.record = record
        self.replays: dict[Hashable, Replay] = {}

    def load(self, carry: Carry) -> None:
        """Copy in a carry of at most as many rows; the first one fills the rows behind them."""

        def fill(x: torch.Tensor, buffer: torch.Tensor) -> None:
            buffer[: len(x)].copy_(x)
            # Rows do not meet, so any would do; copies of one cannot bring a NaN of their own.
            if len(x) < len(buffer):
                buffer[len(x) :].copy_(x[:1].expand(len(buffer) - len(x), *x.shape[1:]))

        map_tensors(fill, carry, self.carry)

    def run(self, backbone: Backbone, step: Step, flags: Mapping[str, Hashable]) -> None:
        """Run a step and copy what it leaves into the buffers, making those that are missing."""

        def write(x: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
            if buffer is None:
                return x.clone()
            return buffer if x is buffer else buffer.copy_(x)

        self.carry = map_tensors(write, step(backbone, self.carry, **flags), self.carry)


class Replayed(Eager[Carry]):
    """As `Eager`, but steps are replayed over the buffers of a plan, while the engine is locked.

    A step is recorded when a sleep first takes it. Where that fails the sleep goes on eagerly.
    """

    def __init__(self, backbone: Backbone, engine: SleepEngine, key: Hashable, rows: int):
        self.backbone, self._engine, self._key, self._rows = backbone, engine, key, rows
        self._plan: Plan[Carry] | None = engine.plans[key]
        self.path = f"{engine.capture.label}: replayed"

    def __call__(self, step: Step, **flags: Hashable) -> None:
        """Replay a step; record it first if it is new."""
        if self._plan is not None:
            key = (step, tuple(sorted(flags.items())))
            if key in self._plan.replays or self._recorded(key, step, flags):
                self._plan.replays[key]()
                return
        super().__call__(step, **flags)

    def read(self, field: str) -> Any:
        """A copy of a field of the carry."""
        if self._plan is None:
            return super().read(field)
        return self._own(getattr(self._plan.carry, field))

    def write(self, field: str, tree: Any) -> None:
        """Copy a tree into a field of the carry."""
        if self._plan is None:
            return super().write(field, tree)

        def fill(x: torch.Tensor, buffer: torch.Tensor) -> None:
            buffer[: self._rows].copy_(x)

        map_tensors(fill, tree, getattr(self._plan.carry, field))

    def _own(self, tree: Any) -> Any:
        """The sleeping rows of buffers, in tensors of their own."""
        return map_tensors(lambda x: x[: self._rows].clone(), tree)

    def _recorded(self, key: Hashable, step: Step, flags: Mapping[str, Hashable]) -> bool:
        """Record a step; on failure leave the plan, with the carry as it is, and say why."""
        plan = self._plan
        assert plan is not None
        # Recording runs the step several times over buffers that the sleep is in the middle of.
        saved = map_tensors(torch.clone, plan.carry)
        work = functools.partial(plan.run, self.backbone, step, flags)
        try:
            # Tunes kernels, and shows what a step leaves, which needs buffers outside the pool.
            work()
            plan.load(saved)
            plan.replays[key] = plan.record(work)
        except Exception as error:
            self._plan = None
            self.carry = map_tensors(lambda x: x[: self._rows], saved)
            self.path = f"eager: {self._engine.give_up(self._key, error)}"
            return False
        plan.load(saved)
        self.path = f"{self._engine.capture.label}: captured"
        return True


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
            self.plans: OrderedDict[Any, Plan[Any]] = OrderedDict()
            # Per shape: None once it was seen, or why it cannot be captured.
            self._shapes: OrderedDict[Hashable, str | None] = OrderedDict()
            self._parameters: Hashable = None

    def find(
        self, backbone: Backbone, carry: Carry, parameters: Hashable
    ) -> Replayed[Carry] | str:
        """A sleep over a plan that `carry` is loaded into, or why there is none."""
        if parameters != self._parameters:
            self.forget()
            self._parameters = parameters
        rows, device = _rows_of(carry), _device_of(carry)
        # Rows sleep at different times, so their number varies; a capture for each would cost
        # seconds and memory. Powers of two bound that, for at most twice the arithmetic.
        padded = 1 << (rows - 1).bit_length()
        shape = _signature(carry, rows, padded)
        options = backbone.options
        how = (options.loop, options.eviction, *_switches())
        key = (device, self.capture.stream(device), shape, how)
        if key not in self._shapes:
            self._remember(key, None)
            return "first sleep of this shape, the next one is captured"
        reason = self._shapes[key]
        if reason is not None:
            return reason
        try:
            if key not in self.plans:
                while len(self.plans) >= MOST_PLANS:
                    self.plans.popitem(last=False)
                # Replays on one stream come one after the other: one pool of memory serves all.
                alongside = (plan.record for k, plan in self.plans.items() if k[:2] == key[:2])
                record = next(alongside, None) or self.capture(device)
                self.plans[key] = Plan(carry, padded, record)
            self.plans.move_to_end(key)
            self._shapes.move_to_end(key)
            self.plans[key].load(carry)
        except Exception as error:
            return self.give_up(key, error)
        return Replayed(backbone, self, key, rows)

    def give_up(self, key: Hashable, error: Exception) -> str:
        """Never try to capture this shape again; returns the reason, for reports."""
        self.plans.pop(key, None)
        reason = f"capture failed with {type(error).__name__}: {error}"
        self._remember(key, reason)
        logger.warning(f"sleeps of this shape run eagerly: {reason}")
        return reason

    def _remember(self, key: Hashable, reason: str | None) -> None:
        self._shapes[key] = reason
        while len(self._shapes) > MOST_SHAPES:
            self._shapes.popitem(last=False)


@contextlib.contextmanager
def start(backbone: Backbone, carry: Carry) -> Iterator[Eager[Carry]]:
    """A sleep that begins at `carry`, from graphs where `backbone.engine` can do that."""
    engine, parameters = backbone.engine, None
    reason = "turned off" if engine is None else _refusal(engine, _device_of(carry))
    if engine is not None and reason is None:
        reason, parameters = _inspect(backbone, _device_of(carry))
    if engine is not None and reason is None:
        # Buffers are written in place by every later sleep, in inference mode or not.
        with engine.lock, torch.inference_mode(False), torch.no_grad():
            found = engine.find(backbone, carry, parameters)
            if isinstance(found, Replayed):
                yield found
                return
        reason = found
    yield Eager(backbone, carry, str(reason))


def _refusal(engine: SleepEngine, device: torch.device) -> str | None:
    """Why no sleep can be captured now, whatever the model, or None.

    Gradients cover activation checkpointing too, which does nothing without them.
    """
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.compiler.is_compiling():
        return "inside torch.compile"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    return engine.capture.refuses(device)


def _inspect(backbone: Backbone, device: torch.device) -> tuple[str | None, Hashable]:
    """What a graph would miss of the blocks that sleep, or None; and where their weights lie."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "forward hooks on every module, which a graph would skip", None
    places: list[Hashable] = []
    # `modules()` names what it finds and takes several times as long, with the device idle.
    found: list[nn.Module] = list(backbone.blocks)[backbone.options.loop[0] :]
    for module in found:
        found.extend(child for child in module._modules.values() if child is not None)
        if module.training and (dropout := dropout_of(module)):
            return f"{dropout} in training mode", None
        if (config := vars(module).get("config")) is not None:
            # transformers' attention looks up its kernel in the config at every call.
            places.append(getattr(config, "_attn_implementation", None))
        if is_hooked(module):
            # Replays run no Python: who hooks in to record or to fetch weights would be skipped.
            return f"a {type(module).__name__} has forward hooks, which a graph would skip", None
        if is_parametrized(module):
            # It may be held for a while (`parametrize.cached`), and then be somewhere else.
            return f"a {type(module).__name__} has a weight that is computed", None
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


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its forward method says."""
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(own or _global_forward_hooks or _global_forward_pre_hooks)


def dropout_of(module: nn.Module) -> str | None:
    """The module's own dropout, by the names that torch and transformers have for it."""
    if isinstance(module, nn.Dropout):
        return f"dropout={module.p}" if module.p else None
    dropout = getattr(module, "attention_dropout", 0.0)
    return f"attention_dropout={dropout}" if dropout else None


def _switches() -> tuple[Hashable, ...]:
    """torch's switches that a step looks at while it runs, which a graph would not notice."""
    cuda = torch.backends.cuda
    return (
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
    return tree


def _rows_of(carry: tuple) -> int:
    """R: the first dim of the carry's first tensor. Tensors without it serve all rows alike."""
    return len(_first(carry))


def _device_of(carry: tuple) -> torch.device:
    return _first(carry).device


def _first(carry: tuple) -> torch.Tensor:
    return next(x for x in carry if isinstance(x, torch.Tensor))
