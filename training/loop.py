"""Training in memory: batches and a loss go in, a record comes out; no config, no folder."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from hybrid_sleep.training.data import derive_seed, labelled_columns, mark_supervised
from hybrid_sleep.training.depth import Drawn, parse_depth
from hybrid_sleep.training.optimizer import optimizer_for
from hybrid_sleep.training.schedules import learning_rates
from hybrid_sleep.validation import check_count, check_number

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, dict[str, Any]], Tensor]


@dataclass
class StepRecord:
    """One training step: its index (0 for the first), sleep depth, tokens read and mean loss.

    depth: None where none was drawn; of each group of rows where they differ. `parts`: the
    micro-batches that have been added.
    """

    step: int
    depth: Drawn | None
    tokens: int = 0
    loss: Tensor | float = 0.0
    parts: int = 0

    def add(self, share: Tensor, tokens: int) -> None:
        """Count a micro-batch; share: what it contributes to the loss of the whole step."""
        self.loss = self.loss + share
        self.tokens += tokens
        self.parts += 1


@dataclass
class FitRecord:
    """What `fit` did: `steps` behind the model, `start` among them; `losses` and `depths` of the
    steps of this call; its `seconds`."""

    steps: int
    losses: list[float] = field(default_factory=list)
    depths: list[Drawn | None] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss | None = None,
    *,
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: str = "constant",
    warmup: int = 0,
    cooldown: float = 0.3,
    grad_clip: float | None = 1.0,
    accumulate: int = 1,
    sleep_passes: Any = None,
    seed: int = 0,
    start: int = 0,
    on_step: Callable[[StepRecord], bool | None] | None = None,
) -> FitRecord:
    """Train `model` for `steps` steps on `batches`, and say what happened.

    Args:
        batches: mappings such as `{"input_ids": [B, T], "labels": [B, T]}`, read in order,
            `accumulate` of them a step. Tensors are moved to the device of the model.
        loss: (model, batch) to a scalar, the mean over the batch; of several micro-batches the
            mean is taken. A penalty is added inside of it. None: the model's own loss, for which
            every batch needs `labels`; a step's is then the mean over all of its tokens.
        optimizer: over parameters of `model`. None: `optimizer_for(model)`.
        schedule, warmup, cooldown: of the learning rates that the optimizer has, over `steps` (see
            `learning_rates`). It has the same rates again afterwards.
        grad_clip: largest norm of the gradient of a step, None: not clipped.
        sleep_passes: a depth, a `DepthPolicy`, or what `parse_depth` reads: drawn for each step
            and given in the batch as `sleep_passes`, with `supervised` (see `MarkSupervised`).
            None: batches stay as they are.
        seed: what depths and dropout are drawn from, anew for each step.
        start: steps that an earlier call has done. With its optimizer and the batches that it left,
            the result is bit for bit that of one call.
        on_step: called after each update; may change the weights (a proximal step, say), and ends
            training when it returns True.

    The model is in train mode meanwhile; every module is left in the mode it came in, the global
    random state as it was, and no gradient. In one process, in the dtype of the weights: with
    DeepSpeed, or in bfloat16, `SleepTrainer` takes the same steps.

    Raises ValueError, before anything changes, for an argument out of range, and later, with the
    weights as the last whole step left them, for a loss that is no finite scalar with a gradient
    and for batches that end too early.
    """
    rate_of = rate_factors(schedule, steps, warmup, cooldown)
    check_count("accumulate", accumulate)
    check_count("seed", seed, minimum=0)
    check_count("start", start, minimum=0)
    if start > steps:
        raise ValueError(f"start must be at most steps={steps}, got {start}")
    if grad_clip is not None:
        check_number("grad_clip", grad_clip, above=0)
    for name, given in (("loss", loss), ("on_step", on_step)):
        if given is not None and not callable(given):
            raise ValueError(f"{name} must be None or a function, got {given!r}")
    policy = None if sleep_passes is None else parse_depth(sleep_passes)
    needed = (steps - start) * accumulate
    if isinstance(batches, Sized) and len(batches) < needed:
        raise _too_few(needed, len(batches))
    optimizer = optimizer_for(model) if optimizer is None else optimizer
    own = {id(parameter) for parameter in model.parameters()}
    groups = optimizer.param_groups
    if not any(id(parameter) in own for group in groups for parameter in group["params"]):
        raise ValueError("optimizer must be over parameters of model, got one over none of them")
    began, source = time.perf_counter(), iter(batches)
    record, rates = FitRecord(steps=start), [group["lr"] for group in groups]
    with in_train_mode(model), torch.enable_grad():
        try:
            for step in range(start, steps):
                done = StepRecord(step, None if policy is None else policy.draw(seed, step))
                parts = list(itertools.islice(source, accumulate))
                if len(parts) < accumulate:
                    raise _too_few(needed, (step - start) * accumulate + len(parts))
                for batch in parts:
                    if not isinstance(batch, Mapping):
                        raise ValueError(f"batches must hold mappings, got {type(batch).__name__}")
                _backward(model, parts, loss, done, seed)
                if grad_clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * rate_of(step)
                optimizer.step()
                _forget_gradients(model, optimizer)
                record.steps = step + 1
                record.losses.append(float(done.loss))
                record.depths.append(done.depth)
                if on_step is not None and on_step(done):
                    break
        finally:
            _forget_gradients(model, optimizer)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
    record.seconds = time.perf_counter() - began
    return record


def seed_step(seed: int, step: int, part: int, rank: int = 0) -> None:
    """Seed torch for micro-batch `part` of training step `step`.

    Dropout depends on these alone, so a resumed run draws what one that never stopped would, and
    no random state has to be saved.
    """
    torch.manual_seed(derive_seed("step", seed, step, part, rank))


def _backward(
    model: nn.Module, batches: list[Batch], loss: Loss | None, done: StepRecord, seed: int
) -> None:
    """Leave the gradient of a step in the parameters, its loss in `done`."""
    device = next(model.parameters()).device
    _forget_gradients(model)
    supervised = _supervised_tokens(batches).to(device) if loss is None else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for part, batch in enumerate(batches):
            batch = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            if done.depth is not None:
                batch = {**mark_supervised(batch), "sleep_passes": done.depth}
            seed_step(seed, done.step, part)
            if loss is None:
                # Over the tokens of the whole step: micro-batches may differ in how many they have.
                kept = None if done.depth is None else labelled_columns(batch)
                batch |= {} if kept is None else {"logits_to_keep": kept}
                value = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            else:
                value = loss(model, batch)
            if not (isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad):
                raise ValueError(f"loss must return a scalar tensor with a gradient, got {value!r}")
            share = value if loss is None else value / len(batches)
            share.backward()
            tokens = batch["input_ids"].numel() if "input_ids" in batch else 0
            done.add(share.detach(), tokens)
    done.loss = float(done.loss)
    if not math.isfinite(done.loss):
        raise ValueError(
            f"loss must be finite, got {done.loss} at step {done.step + 1} "
            f"(sleep_passes={done.depth}); the weights are those of the step before"
        )


def _supervised_tokens(batches: list[Batch]) -> Tensor:
    """How many tokens of a step are predicted: labels are shifted, so the first of a row never."""
    for batch in batches:
        if batch.get("labels") is None:
            raise ValueError(
                f"batches must have labels where loss is None, got one of {', '.join(batch)}"
            )
    return sum((batch["labels"][..., 1:] != -100).sum() for batch in batches)


def rate_factors(
    schedule: str, steps: int, warmup: int = 0, cooldown: float = 0.3
) -> Callable[[int], float]:
    """The factor of the learning rates at each step, from transformers' own schedule."""
    arguments = learning_rates(schedule, steps=steps, warmup=warmup, cooldown=cooldown)
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        arguments["lr_scheduler_type"],
        probe,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.get("lr_scheduler_kwargs"),
    )
    return scheduler.lr_lambdas[0]


@contextlib.contextmanager
def in_train_mode(model: nn.Module) -> Iterator[None]:
    """All of `model` in train mode; every module comes back to its own."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _forget_gradients(*owners: nn.Module | torch.optim.Optimizer) -> None:
    for owner in owners:
        owner.zero_grad(set_to_none=True)


def _too_few(needed: int, found: int) -> ValueError:
    return ValueError(
        f"batches must hold {needed}, accumulate of them for each step to do, got {found}"
    )
