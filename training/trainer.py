"""transformers' Trainer for models that sleep: a depth for every step, Muon, whole checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from hybrid_sleep.eval.tasks.accuracy import measure_accuracy
from hybrid_sleep.eval.tasks.perplexity import measure_perplexity
from hybrid_sleep.support.io import write_json_atomic
from hybrid_sleep.training import zero
from hybrid_sleep.training.callbacks import scalars
from hybrid_sleep.training.data import (
    HeldOut,
    TaskBatches,
    labelled_columns,
    mark_supervised,
    only_item,
)
from hybrid_sleep.training.depth import DepthPolicy, Drawn, parse_depth
from hybrid_sleep.training.folder import (
    STAGING,
    STATE_FILE,
    check_checkpoint,
    checkpoints,
    list_files,
    publish,
    written,
)
from hybrid_sleep.training.loop import StepRecord, seed_step
from hybrid_sleep.training.losses import LossByPosition
from hybrid_sleep.training.optimizer import optimizer_for, parameter_groups
from hybrid_sleep.training.ranks import of_all_ranks, of_first
from hybrid_sleep.training.schedules import WindowSchedule
from hybrid_sleep.training.text.batches import TextBatches, TextHeldOut, merge_positions
from hybrid_sleep.training.text.tokenizer import FIRST_BYTE, reads_bytes
from hybrid_sleep.training.weights import WEIGHTS_FILE, check_fits, shapes
from hybrid_sleep.validation import check_number

ADAMW = ("adamw_torch", "adamw_torch_fused")  # the default of transformers, by version
METRICS = ("exact", "per_label", "loss", "perplexity", "bits_per_byte", "by_window")


class SleepTrainer(Trainer):
    """`transformers.Trainer` whose model sleeps at a depth drawn anew for every step.

    Args (besides Trainer's):
        sleep_passes: a depth, a `DepthPolicy`, or what `parse_depth` reads; drawn from
            (`args.seed`, step), so that ranks agree and a resumed run draws the same. Evaluation
            uses the depth of the model's config, or the depths of a `HeldOut`.
        lr_muon: if given, matrices are trained by Muon at this rate and the rest by AdamW at
            `args.learning_rate` (see `parameter_groups`), under ZeRO 1 to 3 by DeepSpeed's own;
            otherwise everything by torch's AdamW, or what else `args.optim` names.
        windows: the window to train with at each step, if not always the model's.
        losses: gets the loss of every token in training, by position and depth.

    `train_dataset` may be a `TaskBatches` or `TextBatches`, whose items are batches already;
    `eval_dataset` may be a `HeldOut`, for exact accuracy by depth, or a `TextHeldOut`, for
    perplexity. A checkpoint is written under another name and renamed, so that each one found is
    complete, and one with weights that are not finite is never written. `resume_from_checkpoint`
    goes on bit for bit as if nothing had stopped, on a CPU and as many processes; a checkpoint that
    is not whole any more is refused with ValueError.

    `args.activation_checkpointing` stands for `model.set_activation_checkpointing("block")`.
    """

    model: Any
    args: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        sleep_passes: Any = 1,
        lr_muon: float | None = None,
        windows: WindowSchedule | None = None,
        losses: LossByPosition | None = None,
        **kwargs: Any,
    ):
        if lr_muon is not None:
            check_number("lr_muon", lr_muon, above=0)
        self.policy: DepthPolicy = parse_depth(sleep_passes)
        self.lr_muon = lr_muon
        self.windows, self.losses = windows, losses
        self.last_step: StepRecord | None = None
        self.measured: dict[str, float] = {}  # by `RunLog`, for reporters
        self._position: dict[str, Any] | None = None
        self._staging: Path | None = None
        self.checked: Path | None = None  # a checkpoint that was found to be whole
        super().__init__(model, args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        ours = self.lr_muon is not None or self.args.optim in ADAMW
        if self.optimizer is None and ours:
            trained: Any = self.model if model is None else model
            rates = (self.lr_muon, self.args.learning_rate, self.args.weight_decay)
            adam: dict[str, Any] = {
                "betas": (self.args.adam_beta1, self.args.adam_beta2),
                "eps": self.args.adam_epsilon,
            }
            if self.lr_muon is not None and self._zero_stage:
                self.optimizer = zero.muon(parameter_groups(trained, *rates), **adam)
            else:
                self.optimizer = optimizer_for(trained, *rates, **adam)
            self._decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        return super().create_optimizer(model)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trainer's, from a checkpoint that is whole."""
        if resume_from_checkpoint is True:
            saved = checkpoints(self.args.output_dir)
            resume_from_checkpoint = str(saved[-1]) if saved else True
        if resume_from_checkpoint and resume_from_checkpoint is not True:
            checkpoint = Path(resume_from_checkpoint)
            if checkpoint != self.checked:
                of_first(check_checkpoint, checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        # A model that is given is wrapped, its weights in other shapes.
        if model is None and (Path(checkpoint) / WEIGHTS_FILE).exists():
            where = f"checkpoint {checkpoint!r}"
            check_fits(self.model, shapes(checkpoint, where), where)
        super()._load_from_checkpoint(checkpoint, model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer takes a step before it asks whether one is left, and text has no end.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._zero_stage == 3:
            zero.mend(self.optimizer, self._decays)

    @property
    def _zero_stage(self) -> int:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return 0 if plugin is None else plugin.zero_stage

    def get_train_dataloader(self) -> DataLoader:
        data = self.train_dataset
        if not isinstance(data, (TaskBatches, TextBatches)):
            return super().get_train_dataloader()
        # Batches differ by rank already; accelerate's sharding would only cost time.
        return DataLoader(
            data,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available() and not self.args.use_cpu,
            **{"batch_size": 1, "collate_fn": only_item}
            if isinstance(data, TaskBatches)
            else {"batch_size": None},
        )

    def depth(self) -> Drawn:
        """The depth of the current training step, or of each group of its rows."""
        return self.policy.draw(self.args.seed, self.state.global_step)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        # Trainer keeps labels to itself for label smoothing and for `compute_loss_func`.
        given = mark_supervised(inputs)
        if not model.training:
            return super().compute_loss(model, given, return_outputs, num_items_in_batch)
        kept, depth = self._columns_to_keep(inputs), self.depth()
        if isinstance(self.train_dataset, TaskBatches):
            depth = self.train_dataset.depths(depth)
        given |= {"sleep_passes": depth, "use_cache": False}
        given |= {} if kept is None else {"logits_to_keep": kept}
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        if self.losses is not None:
            labels = inputs["labels"]
            which = {name: inputs.get(name) for name in ("attention_mask", "document_ids")}
            if kept is not None:
                place = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
                which["positions"], labels = place[:, -kept:], labels[:, -kept:]
            self.losses.add(
                outputs.logits.detach(),
                labels,
                self.model.config.window,
                depth=depth,
                **which,
            )
        return (loss, outputs) if return_outputs else loss

    def _columns_to_keep(self, inputs: dict[str, Any]) -> int | None:
        """`labelled_columns` where nothing but the model's own loss reads the logits."""
        if self.label_smoother is not None or self.compute_loss_func is not None:
            return None
        # Under ZeRO-3 the backward of a slice finds the head's weight released.
        return None if self._zero_stage == 3 else labelled_columns(inputs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        self._position = inputs.pop("position", None)
        tokens = inputs["input_ids"].numel()
        step = self.state.global_step
        if self.last_step is None or self.last_step.step != step:
            self.last_step = StepRecord(step, self.depth())
        seed_step(self.args.seed, step, self.last_step.parts, self.args.process_index)
        with self._window_of(step):
            share = super().training_step(model, inputs, *args)
        self.last_step.add(share, tokens)
        return share

    @contextlib.contextmanager
    def _window_of(self, step: int) -> Iterator[None]:
        """Train with the curriculum's window; evaluations and files have the model's own."""
        config = self.model.config
        own = config.window
        if self.windows is not None:
            config.window = self.windows.at(step)
        try:
            yield
        finally:
            config.window = own

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Trainer's; for a `HeldOut` `eval_exact_N` and `eval_per_label_N` for each depth N, for a
        `TextHeldOut` `eval_loss_N`, `eval_perplexity_N` and, of bytes, `eval_bits_per_byte_N`.

        Every rank evaluates everything: under ZeRO-3 all of them must call the same layers.
        """
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        scores: dict[Any, dict[str, Any]]
        if isinstance(held_out, HeldOut):
            batches, depths = held_out.batches(), held_out.depths
            measured = measure_accuracy(self.model, held_out.task, batches, depths)
            scores = {depth: vars(accuracy) for depth, accuracy in measured.items()}
        elif isinstance(held_out, TextHeldOut):
            first_byte = FIRST_BYTE if reads_bytes(held_out.encoder.tokenizer) else None
            scores = measure_perplexity(
                self.model, held_out.batches(), held_out.depths, bytes_from=first_byte
            )
        else:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = {
            f"{metric_key_prefix}_{name}_{depth}": x
            for depth, score in scores.items()
            for name, x in score.items()
            if name in METRICS
        }
        self.log(scalars(metrics))
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's; a log of training steps also has what `RunLog` measured of them."""
        if "loss" in logs:
            logs, self.measured = {**logs, **self.measured}, {}
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        check_finite(self.model, f"step {self.state.global_step}")
        run_dir = Path(self._get_output_dir(trial))
        place = run_dir / f"checkpoint-{self.state.global_step}"
        if place.exists():
            return
        staging = run_dir / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            with written(f"the checkpoint of step {self.state.global_step}", run_dir):
                super()._save_checkpoint(model, trial)
                self._save_state(staging / place.name)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._publish(staging, place)
        except OSError:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()

    def _save_state(self, place: Path) -> None:
        """What a run needs to go on, beyond Trainer's own: collective."""
        positions = of_all_ranks(self._position)
        if self.args.should_save:
            text = None if self._position is None else merge_positions(positions)
            write_json_atomic(
                place / STATE_FILE, {"processes": self.args.world_size, "position": text}
            )

    def _publish(self, staging: Path, place: Path) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = best = str(place.parent / Path(best).name)
        if best is not None:
            self.state.save_to_json(str(staging / place.name / "trainer_state.json"))
        list_files(staging / place.name)
        publish(staging / place.name, place)
        shutil.rmtree(staging, ignore_errors=True)
        if self.args.save_total_limit:
            for old in checkpoints(place.parent)[: -self.args.save_total_limit]:
                if str(old) != best:
                    shutil.rmtree(old)


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Raise ValueError, naming the parameter, if a weight of `model` is nan or infinite.

    Collective where processes train together: each looks at what it holds, all of them raise.
    """
    wrong = None
    for name, parameter in model.named_parameters():
        # Under ZeRO-3 a parameter is empty and its share of this rank lies here.
        held = getattr(parameter, "ds_tensor", parameter)
        if not bool(torch.isfinite(held).all()):
            wrong = name
            break
    for name in of_all_ranks(wrong):
        if name is not None:
            raise ValueError(
                f"weight {name} is not finite at {where}, so nothing was saved; try a lower "
                "lr_muon or lr_adamw, a longer warmup or a smaller grad_clip"
            )
