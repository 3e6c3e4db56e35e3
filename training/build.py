"""From a run config to what transformers trains with: arguments, data and model."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainingArguments, set_seed

from hybrid_sleep.training import zero
from hybrid_sleep.training.config import RunConfig
from hybrid_sleep.training.data import HeldOut, TaskBatches
from hybrid_sleep.training.losses import LossByPosition
from hybrid_sleep.training.schedules import learning_rates, parse_windows
from hybrid_sleep.training.start import build_model
from hybrid_sleep.training.text.batches import TextBatches, TextHeldOut
from hybrid_sleep.training.text.source import open_source
from hybrid_sleep.training.trainer import SleepTrainer


def training_arguments(run: RunConfig, *, universal: bool = False) -> TrainingArguments:
    """`run.train` as arguments of transformers; joins the other processes if there are any.

    universal: DeepSpeed is to load a checkpoint that other numbers of processes can load too.
    Raises ValueError where the batch does not divide among the processes, or for what DeepSpeed
    needs and the machine lacks.
    """
    settings = run.train
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shares = settings.accumulate * world
    if settings.batch_size % shares:
        raise ValueError(
            f"train.batch_size must be a multiple of {shares}, the number of processes ({world}) "
            f"times train.accumulate ({settings.accumulate}), got {settings.batch_size}"
        )
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    deepspeed = None
    if settings.deepspeed is not None:
        deepspeed = zero.read_config(settings)
        zero.prepare(deepspeed, "cpu" if on_cpu else "cuda")
        if universal:
            deepspeed["checkpoint"] = {"load_universal": True}
    schedule = learning_rates(
        settings.schedule,
        steps=settings.steps,
        warmup=settings.warmup,
        cooldown=settings.cooldown,
    )
    return TrainingArguments(
        output_dir=run.output_dir,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // shares,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr_adamw,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.grad_clip or 0.0,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or settings.steps,
        save_total_limit=settings.keep_checkpoints,
        logging_steps=settings.log_every,
        # A nan must end the run, not be averaged away.
        logging_nan_inf_filter=False,
        seed=settings.seed,
        # Under DeepSpeed its own autocast does this (see `zero.read_config`).
        bf16=settings.dtype == "bfloat16" and deepspeed is None,
        use_cpu=on_cpu,
        deepspeed=deepspeed,
        # Pass 1 of the last window reads every parameter.
        ddp_find_unused_parameters=False,
        dataloader_num_workers=settings.workers,
        # Text goes on from its own position; a task's batches are skipped without being made.
        ignore_data_skip=run.text is not None,
        use_cache=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        # TensorBoard's callback is added with a folder of its own.
        report_to=[name for name in settings.reporters if name != "tensorboard"],
        **schedule,
    )


def build_trainer(
    run: RunConfig,
    arguments: TrainingArguments | None = None,
    *,
    position: dict[str, Any] | None = None,
) -> SleepTrainer:
    """Model, data, optimizer and schedule of `run`, ready to train.

    position: where to go on in the text, as a checkpoint has it. Raises ValueError or
    FileNotFoundError for text or a first checkpoint that is not there.
    """
    settings = run.train
    arguments = arguments or training_arguments(run)
    depths = settings.eval_depths or run.sleep_passes.depths()
    train, held_out = _data(run, arguments, tuple(depths), position)
    set_seed(settings.seed)
    model = build_model(run)
    granularity: Any = settings.activation_checkpointing
    model.set_activation_checkpointing(granularity)
    model.set_truncation(settings.backprop_passes, settings.backprop_windows)
    trainer = SleepTrainer(
        model,
        arguments,
        sleep_passes=run.sleep_passes,
        lr_muon=settings.lr_muon,
        windows=None if settings.windows is None else parse_windows(settings.windows),
        losses=LossByPosition(run.sleep_passes.depths()),
        train_dataset=train,
        eval_dataset=held_out,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _data(
    run: RunConfig,
    arguments: TrainingArguments,
    depths: tuple[int, ...],
    position: dict[str, Any] | None,
) -> tuple[Dataset, HeldOut | TextHeldOut | None]:
    settings = run.train
    if settings.deepspeed is not None and zero.stage(settings) == 3 and arguments.world_size > 1:
        _check_in_step(run)
    shared = {
        "accumulate": settings.accumulate,
        "seed": settings.seed,
        "rank": arguments.process_index,
        "world": arguments.world_size,
    }
    if run.text is not None:
        tokenizer, source = run.load_tokenizer(), open_source(run.text)
        vocab_size = run.model_config().vocab_size
        source.check(tokenizer, vocab_size=vocab_size, rows=settings.batch_size)
        batches = TextBatches(source, tokenizer, rows=settings.batch_size, start=position, **shared)
        held_out = None
        if run.text.held_out:
            held_out = TextHeldOut(source, tokenizer, depths=depths, count=settings.eval_examples)
            len(held_out)  # reads them, so that a share without documents is refused now
        elif settings.eval_every is not None:
            raise ValueError(
                "train.eval_every must be null where text.held_out=0 keeps nothing to evaluate on, "
                f"got {settings.eval_every}"
            )
        return batches, held_out
    task = run.load_task()
    train = TaskBatches(
        task,
        length=settings.steps * settings.accumulate,
        size=arguments.per_device_train_batch_size,
        asked=partial(run.sleep_passes.asked, settings.seed),
        **shared,
    )
    count = settings.eval_examples
    return train, HeldOut(task=task, depths=depths, count=count, seed=settings.seed)


def _check_in_step(run: RunConfig) -> None:
    """Refuse what makes processes call layers a different number of times.

    ZeRO-3 gathers the weights of a layer on all processes at once: one that calls it once more
    would wait for the others for ever.
    """
    if run.text is not None or "attention_mask" in run.load_task().batch("train", 0, 1):
        what = "text" if run.task is None else f"task {run.task.name!r}"
        raise ValueError(
            f"train.deepspeed must be ZeRO stage 0, 1 or 2 for {what}, whose rows have boundaries "
            "of their own, at which processes would wait for each other, got stage 3 of "
            f"{run.train.deepspeed!r}"
        )
