"""The training of a night, by transformers' Trainer: in one process, or in several under ZeRO 2."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hybrid_sleep.parametric.experience.course import Clock, Course, Steps, share_of
from hybrid_sleep.parametric.experience.experts import grown
from hybrid_sleep.parametric.experience.imitation import Semantic
from hybrid_sleep.parametric.experience.nearness import NearnessCallback
from hybrid_sleep.parametric.experience.on_policy import OnPolicy
from hybrid_sleep.parametric.experience.zero import (
    ZERO_2,
    Moments,
    full_moments,
    load_full_moments,
    released,
)
from hybrid_sleep.parametric.guard import Guard, GuardCallback
from hybrid_sleep.parametric.lessons import Lesson, lesson_loss
from hybrid_sleep.training.callbacks import StopOnSignal
from hybrid_sleep.training.data import only_item
from hybrid_sleep.training.loop import in_train_mode, rate_factors, seed_step
from hybrid_sleep.training.optimizer import optimizer_for
from hybrid_sleep.training.ranks import over_ranks, ranks
from hybrid_sleep.training.zero import prepare

if TYPE_CHECKING:
    from hybrid_sleep.parametric.experience.options import StudyOptions
    from hybrid_sleep.parametric.experience.unfinished import Unfinished

CLIP = 1.0
WEIGHT = "weight"


def train(
    model: nn.Module,
    lessons: Sequence[Lesson],
    options: StudyOptions,
    names: Sequence[str],
    guard: Guard,
    unfinished: Unfinished,
    *,
    tokenizer: Any = None,
    semantic: Semantic | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Course:
    """Train the parameters `names` of `model` on `lessons`, in their order, `options.rows` a step.

    AdamW, its rate falling linearly; gradients are clipped to norm 1. With `options.experts` it is
    experts beside the matrices among them that are trained, and merged at the end. tokenizer,
    semantic: for rows on policy, where a text ends, and see `imitation.reward`.

    In several processes, which all call this with the same, each has its share of every step, and
    the result is that of one but for rounding. The state is kept in `unfinished` about every
    minute, and at SIGINT and SIGTERM, which raise KeyboardInterrupt after the current step; another
    call goes on from there, on a CPU in one process to the same bits. Modes, the global random
    state and gradients stay as they were.

    Raises ValueError, before anything changes, for a guard that is anchored elsewhere than the
    matrices of experts; and for a loss that is not finite, with weights as the steps before left
    them, or as they were before the night where it is experts that were trained.
    """
    planned = math.ceil(len(lessons) / options.rows)
    course = Course(planned, min(planned, options.steps or planned), options.seconds)
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name] for name in names}
    holding = GuardCallback(guard)
    with ExitStack() as stack:
        experts = None
        if options.experts is not None:
            experts = stack.enter_context(grown(model, names, options.experts, seed=seed))
            trained, holding = experts.factors, NearnessCallback(guard, experts)
            course.experts = options.experts
        course.parameters = sum(p.numel() for p in trained.values())
        writer = OnPolicy(
            model, tokenizer, lessons, options, trained, semantic=semantic, seed=seed
        )
        course.rewards = None if options.imitation is None else 0.0
        moments = _resumed(course, trained, unfinished)
        if course.step < course.steps and not course.late:
            trainer_of = partial(
                NightTrainer, course=course, lessons=lessons, rows=options.rows, trained=trained,
                moments=moments, unfinished=unfinished, writer=writer, seed=seed,
            )  # fmt: skip
            callbacks = [holding, Clock(course, progress)]
            _run(model, trainer_of, callbacks, course, options, trained, unfinished, seed)
        course.on_policy = writer.count(course.step)
        if experts is not None:
            experts.merge()
    return course


def _resumed(
    course: Course, trained: Mapping[str, nn.Parameter], unfinished: Unfinished
) -> Moments:
    """Put `course` and `trained` where an interrupted training was; the moments that it had."""
    moments: Moments = {}
    held = unfinished.state()
    if held is not None:
        tensors, told = held
        course.step, course.seconds = told["step"], told["seconds"]
        course.resumed, course.rewards = course.step, told["rewards"]
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            moments.setdefault(name, {})[kind] = value
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(moments[name].pop(WEIGHT))
    return moments


def _run(
    model: nn.Module,
    trainer_of: Callable[..., NightTrainer],
    callbacks: Sequence[TrainerCallback],
    course: Course,
    options: StudyOptions,
    trained: Mapping[str, nn.Parameter],
    unfinished: Unfinished,
    seed: int,
) -> None:
    """All steps that are left."""
    stop = StopOnSignal()
    with ExitStack() as stack:
        stack.enter_context(_alone(model, trained))
        stack.enter_context(stop.listening())
        # Trainer makes its folder, and has nothing to put into it.
        unused = stack.enter_context(TemporaryDirectory())
        trainer = trainer_of(model, _arguments(model, unused, course, options, seed))
        for callback in (*callbacks, stop):
            trainer.add_callback(callback)
        try:
            trainer.train()
        finally:
            released(trainer.model_wrapped, trained)
    if stop.requested:
        what = (
            f"is kept in {unfinished.folder}; the next sleep over the same experience goes on from "
            "there"
            if unfinished.keeps
            else "is lost; a night over caches begins anew"
        )
        raise KeyboardInterrupt(f"step {course.step} of {course.steps} {what}")


class NightTrainer(Trainer):
    """`Trainer` over lessons: no file in plain text, and no epoch but one."""

    model: Any
    args: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        course: Course,
        lessons: Sequence[Lesson],
        rows: int,
        trained: Mapping[str, nn.Parameter],
        moments: Moments,
        unfinished: Unfinished,
        writer: OnPolicy,
        seed: int,
    ):
        self.seed, self.writer = seed, writer
        self.course, self.trained, self.unfinished = course, trained, unfinished
        self._moments = moments
        data = Steps(lessons, rows, course.step, course.steps, args.process_index, args.world_size)
        super().__init__(model, args, train_dataset=data)
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        data: Any = self.train_dataset
        # Steps differ by rank already.
        return DataLoader(data, batch_size=1, collate_fn=only_item)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = optimizer_for(self.model, None, self.args.learning_rate)
            if self._moments and not self.is_deepspeed_enabled:
                _load_moments(self.optimizer, self.trained, self._moments)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            factor, first = rate_factors("linear", self.course.steps), self.course.step
            trained: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(trained, lambda step: factor(first + step))
        return self.lr_scheduler

    def _prepare_for_training(self, *args: Any) -> Any:
        prepared = super()._prepare_for_training(*args)
        if self._moments and self.is_deepspeed_enabled:
            load_full_moments(self.optimizer, self.trained, self._moments)
        self._moments = {}
        return prepared

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        found = super()._init_training_state(*args)
        self.state.global_step = self.course.step
        return found

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Tensor:
        step, rank = self.state.global_step, self.args.process_index
        if self.writer.chosen:
            # Not where Trainer fetches it: that is a step ahead, before the student's last one.
            lessons, rewards = self.writer.step(step)
            inputs = share_of(lessons, rank, self.args.world_size)
            if self.course.rewards is not None:
                self.course.rewards += sum(rewards)
        seed_step(self.seed, step, 0, rank)
        # A weight with an expert is put together once a step.
        with cached():
            loss = super().training_step(model, inputs, *args)
        wrong = torch.tensor([not bool(torch.isfinite(loss))], dtype=torch.float64)
        if bool(over_ranks(wrong, "MAX")):
            raise ValueError(
                f"loss must be finite, got {float(loss)} at step {self.state.global_step + 1} of "
                f"{self.course.steps}; a lower rate may help"
            )
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        return lesson_loss(model, inputs["lessons"]) * inputs["share"]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        of = full_moments if self.is_deepspeed_enabled else _moments_of
        tensors = {f"{WEIGHT}/{name}": p.detach() for name, p in self.trained.items()}
        for name, moments in of(self.optimizer, self.trained).items():
            tensors |= {f"{kind}/{name}": value for kind, value in moments.items()}
        course = self.course
        told = {"step": course.step, "seconds": course.seconds, "rewards": course.rewards}
        self.unfinished.save(tensors, told)


def _arguments(
    model: nn.Module, folder: str, course: Course, options: StudyOptions, seed: int
) -> TrainingArguments:
    on_cpu = next(model.parameters()).device.type == "cpu"
    deepspeed = None
    if ranks() > 1:
        deepspeed = {**ZERO_2}
        prepare(deepspeed, "cpu" if on_cpu else "cuda")
    made = TrainingArguments(
        output_dir=folder,
        max_steps=course.steps,
        per_device_train_batch_size=math.ceil(options.rows / ranks()),
        learning_rate=options.rate,
        max_grad_norm=CLIP,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        # A nan must end the night, not be averaged away.
        logging_nan_inf_filter=False,
        # Nothing is drawn by it, and numpy takes no larger one.
        seed=seed % 2**32,
        use_cpu=on_cpu,
        deepspeed=deepspeed,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    if made.world_size != ranks():
        raise ValueError(
            f"processes must be started by torchrun or deepspeed, got {ranks()} of which Trainer "
            f"finds {made.world_size}"
        )
    return made


@contextmanager
def _alone(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Train `trained` and nothing else in the block, and take back all else that Trainer changes.

    That is the global random state, what a model has besides parameters, environment variables, and
    a GPU of its own choice.
    """
    device = next(model.parameters()).device
    own = {id(p) for p in trained.values()}
    frozen = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(random.setstate, random.getstate())
        stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.callback(_put_back, os.environ, dict(os.environ))
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        hooks = (model._forward_hooks, model._forward_pre_hooks)
        touched: list[Any] = [vars(model), *hooks, *map(vars, model.parameters())]
        for of in touched:
            stack.callback(_put_back, of, dict(of))
        config: Any = getattr(model, "config", None)
        if hasattr(config, "use_cache"):
            stack.callback(setattr, config, "use_cache", config.use_cache)
        stack.callback(model.zero_grad)
        for p in frozen:
            p.requires_grad_(False)
            stack.callback(p.requires_grad_, True)
        stack.enter_context(in_train_mode(model))
        stack.enter_context(torch.enable_grad())
        yield


def _put_back(now: Any, before: Mapping[Any, Any]) -> None:
    """Make the mapping `now` what it was."""
    for key in set(now) - set(before):
        del now[key]
    for key, value in before.items():
        if now.get(key) is not value:
            now[key] = value


def _moments_of(optimizer: Any, trained: Mapping[str, nn.Parameter]) -> Moments:
    """The state of AdamW by parameter; a part of it has none that got no gradient yet."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return {name: dict(optimizer.state.get(p, {})) for name, p in trained.items()}


def _load_moments(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], moments: Moments
) -> None:
    names = {id(p): name for name, p in trained.items()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {number: moments[name] for number, name in enumerate(ordered) if moments[name]}
    # Groups stay those that were made now: the rate of a step is that of its number.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
